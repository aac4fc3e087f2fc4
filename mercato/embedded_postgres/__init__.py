"""What the product starts and keeps alive on its own machine: the data folder and an embedded PostgreSQL."""

from mercato.embedded_postgres.folder import DataFolder, DataFolderBusy, SupervisorError
from mercato.embedded_postgres.place import remove_cluster, require_known_format
from mercato.embedded_postgres.postgres import EmbeddedPostgres

__all__ = [
    "DataFolder",
    "DataFolderBusy",
    "EmbeddedPostgres",
    "SupervisorError",
    "remove_cluster",
    "require_known_format",
]
