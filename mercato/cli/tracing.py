"""Starts and ends the tracing of a process."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Generator
from typing import Final

from mercato import __version__
from mercato.chassis.hosting import variables
from mercato.chassis.hosting.variables import SettingsError
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.observability.tracing import Exporter

ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""OpenTelemetry's own variables: where one of them is set, spans are exported."""
INSTANCE_BYTES: Final = 6


@contextlib.contextmanager
def traced(telemetry: Telemetry, share: float, *, is_on: bool) -> Generator[None]:
    """Records traces for the time of the block: `share` of the requests. Raises `SettingsError`."""
    if not is_on:
        yield
        return
    telemetry.tracing.start(share, _exporter())
    try:
        yield
    finally:
        telemetry.tracing.close()


def _exporter() -> Exporter | None:
    endpoint = next((name for name in ENDPOINTS if variables.value(name)), None)
    if endpoint is None:
        return None
    # Imported here: the SDK takes longer to import than it should cost a shop that exports nothing.
    from mercato.chassis.observability.otlp import OtlpExporter, OtlpMissing

    try:
        return OtlpExporter(__version__, secrets.token_hex(INSTANCE_BYTES))
    except OtlpMissing:
        raise SettingsError(
            f"The setting {endpoint} is set, and the extra `otel` is not installed: "
            "install it (pip install 'mercato[otel]'), or unset the setting."
        ) from None
