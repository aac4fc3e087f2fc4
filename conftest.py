"""Before any test: assertions of the code that tests share count as those of tests, also under `python -O`."""

import pytest

pytest.register_assert_rewrite(
    "mercato.testing", "chassis", "cli", "contracts", "embedded_nats", "embedded_postgres", "gateway", "models",
    "operations", "pgbouncer", "placements", "reference", "services", "simulators", "system",
)  # fmt: skip
