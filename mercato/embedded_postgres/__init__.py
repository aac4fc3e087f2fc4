"""The data folder of a shop, and an embedded PostgreSQL that the shop starts and supervises."""

from mercato.embedded_postgres.folder import DataFolder, DataFolderBusy, SupervisorError
from mercato.embedded_postgres.place import remove_cluster
from mercato.embedded_postgres.postgres import EmbeddedPostgres
from mercato.embedded_postgres.record import require_known_format

__all__ = [
    "DataFolder",
    "DataFolderBusy",
    "EmbeddedPostgres",
    "SupervisorError",
    "remove_cluster",
    "require_known_format",
]
