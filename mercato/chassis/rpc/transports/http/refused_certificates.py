"""Says why a TLS connection to an instance was not made: the operator mends the certificate, or the setting."""

from __future__ import annotations

import ssl
from typing import Final

import aiohttp

HOSTNAME_MISMATCH: Final = 62
ADDRESS_MISMATCH: Final = 64
"""Results of OpenSSL's verification (`X509_V_ERR_*` in its `x509_vfy.h`)."""
ANSWERS_IN_THE_CLEAR: Final = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"})


def why_refused(error: BaseException | None, name: str) -> str:
    """Part of a sentence; empty for an error that is not about TLS. The certificate must have `name`."""
    match error:
        case aiohttp.ClientConnectorCertificateError(certificate_error=ssl.SSLCertVerificationError() as refused):
            if refused.verify_code in (HOSTNAME_MISMATCH, ADDRESS_MISMATCH):
                return f"its certificate is not that of {name}, which MERCATO_TLS_NAME asks for"
            return f"its certificate is refused: {refused.verify_message.rstrip('.')}"
        case aiohttp.ClientConnectorSSLError(os_error=ssl.SSLError() as failed):
            if failed.reason in ANSWERS_IN_THE_CLEAR:
                return "it answers without encryption: give it MERCATO_TLS_CERT and MERCATO_TLS_KEY"
            return f"there is no encrypted connection: {failed.reason or failed}"
        case _:
            return ""
