"""What an operator may set for payments."""

from __future__ import annotations

import pytest

from mercato.chassis.hosting.options import OptionError
from mercato.services.payments.app import build
from mercato.testing.cluster import Cluster
from mercato.testing.harness import ServiceHarness


@pytest.mark.parametrize("method", ["nothing", "other:ok", "sandbox:nonsense"])
async def test_a_default_method_that_no_provider_has_ends_the_start(cluster: Cluster, method: str):
    harness = ServiceHarness(cluster, "local", {"MERCATO_PAYMENTS_DEFAULT_METHOD": method})
    with pytest.raises(OptionError, match="MERCATO_PAYMENTS_DEFAULT_METHOD"):
        await harness.open({"payments": build})
    await harness.close()
