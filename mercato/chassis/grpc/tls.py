"""TLS of a gRPC server. gRPC has its own TLS: it takes certificates as text, and no context of Python's."""

from __future__ import annotations

from pathlib import Path

import grpc
import msgspec


class GrpcTls(msgspec.Struct, frozen=True):
    """A certificate with its key, both PEM. With `client_ca`, clients must show a certificate of that authority."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None = None

    @classmethod
    def read(cls, certificate: Path, key: Path, client_ca: Path | None = None) -> GrpcTls:
        """From files. Raises `OSError`."""
        ca = None if client_ca is None else client_ca.read_bytes()
        return cls(certificate.read_bytes(), key.read_bytes(), ca)

    def credentials(self) -> grpc.ServerCredentials:
        pairs = [(self.key, self.certificate)]
        return grpc.ssl_server_credentials(pairs, self.client_ca, require_client_auth=self.client_ca is not None)
