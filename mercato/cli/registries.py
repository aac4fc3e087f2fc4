"""Connects to etcd or Consul by the settings `MERCATO_REGISTRY_*`."""

from __future__ import annotations

import ssl
from typing import Final
from urllib.parse import urlsplit

from mercato.chassis.hosting.settings import ServeSettings, SettingsError
from mercato.chassis.rpc.discovery.leased import LeasedRegistry
from mercato.cli.starting import is_loopback

URL: Final = "MERCATO_REGISTRY_URL"
ETCD_ROOT: Final = "/mercato/"
"""The prefix of all keys in etcd; below it each shop has its own prefix."""
EXAMPLES: Final = {
    "etcd": "https://10.0.0.5:2379,https://10.0.0.6:2379",
    "consul": "http://127.0.0.1:8500",
}


def leased(settings: ServeSettings, shop: str) -> LeasedRegistry:
    """The registry of a shop in etcd or Consul. Raises `SettingsError`."""
    urls = _urls(settings)
    tls = _tls(settings) if any(url.startswith("https:") for url in urls) else None
    # Each brings a client library, which takes as long to import as most of the rest.
    if settings.registry == "consul":
        from mercato.chassis.rpc.discovery.consul import ConsulStore

        token = settings.registry_token.get_secret_value() if settings.registry_token else ""
        if not token.isascii() or not token.isprintable():
            raise SettingsError("The setting MERCATO_REGISTRY_TOKEN is not valid: it has characters that no token has.")
        return LeasedRegistry(ConsulStore(urls, f"mercato-{shop}", token=token, tls=tls))
    from mercato.chassis.rpc.discovery.etcd import EtcdStore

    user = settings.registry_user
    password = settings.registry_password.get_secret_value() if settings.registry_password else ""
    if bool(user) != bool(password):
        missing = "PASSWORD" if user else "USER"
        raise SettingsError(f"The setting MERCATO_REGISTRY_{missing} is missing: etcd takes a user with a password.")
    return LeasedRegistry(EtcdStore(urls, f"{ETCD_ROOT}{shop}/", user=user, password=password, tls=tls))


def _urls(settings: ServeSettings) -> list[str]:
    urls = [url.rstrip("/") for url in settings.registry_url.replace(",", " ").split()]
    example = EXAMPLES[settings.registry]
    if not urls:
        raise SettingsError(
            f"The setting {URL} is missing: with MERCATO_REGISTRY={settings.registry} it is where that is, as in "
            f"{example}."
        )
    for url in urls:
        _check(url, settings, example)
    return urls


def _check(url: str, settings: ServeSettings, example: str) -> None:
    if "@" in url:
        raise SettingsError(
            f"The setting {URL} is not valid: it has no user or password; write these in MERCATO_REGISTRY_USER and "
            "MERCATO_REGISTRY_PASSWORD, or the token of Consul in MERCATO_REGISTRY_TOKEN."
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or not port or parts.path or parts.query:
        raise SettingsError(f"The setting {URL} is not valid: {url!r} is not a URL with a port, as in {example}.")
    if parts.scheme == "http" and not is_loopback(parts.hostname) and settings.plaintext == "loopback":
        raise SettingsError(
            f"The setting {URL} names {parts.hostname} without encryption: write https://, or set "
            "MERCATO_PLAINTEXT=everywhere where the network encrypts by itself."
        )


def _tls(settings: ServeSettings) -> ssl.SSLContext:
    """The TLS context, with the certificate of this process for a registry that requires one."""
    try:
        context = ssl.create_default_context(cafile=settings.registry_ca or settings.tls_ca)
        if settings.tls_cert is not None:
            context.load_cert_chain(settings.tls_cert, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(
            f"The files in MERCATO_REGISTRY_CA or MERCATO_TLS_CA, _CERT and _KEY cannot be used: {error}."
        ) from None
    return context
