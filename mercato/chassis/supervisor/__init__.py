"""What the product starts and keeps alive on its own machine: the data folder and an embedded PostgreSQL."""

from mercato.chassis.supervisor.folder import DataFolder, DataFolderBusy, SupervisorError
from mercato.chassis.supervisor.place import remove_cluster, require_known_format
from mercato.chassis.supervisor.postgres import EmbeddedPostgres

__all__ = [
    "DataFolder",
    "DataFolderBusy",
    "EmbeddedPostgres",
    "SupervisorError",
    "remove_cluster",
    "require_known_format",
]
