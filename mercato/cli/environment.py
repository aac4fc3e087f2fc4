"""The environment variables of a process that serves some of the services: this module writes and reads them.

`mercato migrate` writes a file for each service, `mercato up --split` passes the same to each of its processes:

    DATABASE_URL_ORDERS              the DSN of its role, which can open its own database alone
    MERCATO_SERVICE_SECRET_ORDERS    its secret, in hexadecimal: from it come its keys (`chassis/hosting/keys.py`)
    MERCATO_PUBLIC_KEYS              of all callers, the same for all

and, depending on the placement, those of `ServeSettings`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import ipaddress
import re
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, urlsplit

import msgspec

from mercato import topology
from mercato.chassis.hosting.host import GATEWAY
from mercato.chassis.hosting.keys import SECRET_BYTES, service_secrets, signing_seed
from mercato.chassis.hosting.settings import ServeSettings, SettingsError, variable_of
from mercato.chassis.hosting.variables import replace as set_variables
from mercato.chassis.postgres.dsn import lacks_certificates, servers
from mercato.chassis.rpc.discovery import Registrar, Registry
from mercato.chassis.rpc.discovery.dns import DnsRegistry
from mercato.chassis.rpc.discovery.mdns import MdnsRegistry
from mercato.chassis.rpc.discovery.static import LARGEST_PORT, MalformedInstances, StaticRegistry
from mercato.chassis.rpc.signatures import public_key
from mercato.chassis.rpc.transports.server_names import MalformedName, ServerName, server_name
from mercato.cli import registries
from mercato.cli.settings import SERVICE_SECRET
from mercato.cli.starting import is_loopback
from mercato.contracts.money import EXPONENTS, unknown_currency
from mercato.gateway.cross_origin import origins_of

DATABASE: Final = "DATABASE_URL"
SECRET: Final = SERVICE_SECRET
PUBLIC_KEYS: Final = "MERCATO_PUBLIC_KEYS"
PUBLIC_KEY: Final = re.compile(r"[A-Za-z0-9_-]{43}")
"""32 bytes in base64url: the `x` of an Ed25519 key as a JWK."""
CURVE: Final = {"kty": "OKP", "crv": "Ed25519"}
SHOP_DIGITS: Final = 16
"""The length of the name of a shop in a registry where each process registers itself."""
CORS_ORIGIN: Final = "MERCATO_CORS_ORIGIN"
MAIL: Final = "MERCATO_USERS_MAIL"
LETTERS: Final = "letters"
"""The folder in the data folder of a shop that sends no mail."""
ENCRYPTED: Final = ("require", "verify-ca", "verify-full")


class Given(msgspec.Struct, frozen=True):
    """The credentials of the callers and services of one process."""

    dsns: Mapping[str, str]
    """By service."""
    secrets: Mapping[str, bytes]
    """By service; also that of the gateway where the process is one."""
    public_keys: Mapping[str, Mapping[str, str]]
    """JWKs, by caller."""


def variables(shop_secret: bytes, dsns: Mapping[str, str]) -> Mapping[str, Mapping[str, str]]:
    """The variables of each service of `dsns`, of the gateway and of the operator."""
    secrets = service_secrets(shop_secret, topology.CALLERS)
    keys = " ".join(f"{name}={public_key(signing_seed(secret))['x']}" for name, secret in secrets.items())
    made = {
        name: {f"{SECRET}_{name.upper()}": secrets[name].hex(), PUBLIC_KEYS: keys}
        for name in (GATEWAY, topology.OPERATOR)
    }
    for name, dsn in dsns.items():
        made[name] = {
            f"{DATABASE}_{name.upper()}": dsn,
            f"{SECRET}_{name.upper()}": secrets[name].hex(),
            PUBLIC_KEYS: keys,
        }
    return made


def as_file(values: Mapping[str, str]) -> bytes:
    """Variables as `docker run --env-file` and `cli.settings.load` read them: lines `NAME=VALUE`, nothing quoted."""
    return "".join(f"{name}={value}\n" for name, value in values.items()).encode()


def mail_defaults(data: Path, url: str) -> Mapping[str, str]:
    """The settings for letters of a shop on a laptop that listens at `url`: each becomes a file in its data folder."""
    return {MAIL: f"folder:{data.resolve() / LETTERS}", "MERCATO_USERS_ADDRESS": url}


def given(names: Sequence[str], settings: ServeSettings) -> Given:
    """The credentials, from the environment, of a process that serves `names`. Raises `SettingsError`."""
    alone = len(names) == 1
    dsns = {name: _dsn(name, settings, alone=alone) for name in names if name != GATEWAY}
    return Given(
        dsns, {name: secret_of(name, alone=alone) for name in names}, _public_keys(settings.public_keys, names)
    )


def _dsn(name: str, settings: ServeSettings, *, alone: bool) -> str:
    dsn = variable_of(name, DATABASE, alone=alone)
    try:
        elsewhere = [host for host, _ in servers(dsn) if not _is_here(host)]
        sslmode = dict(parse_qsl(urlsplit(dsn).query)).get("sslmode")
    except ValueError:
        form = "postgresql://USER:PASSWORD@HOST/DATABASE"
        raise SettingsError(f"The setting {DATABASE} of {name} is not a DSN: {form}.") from None
    if elsewhere and sslmode not in ENCRYPTED and settings.plaintext == "loopback":
        raise SettingsError(
            f"The setting {DATABASE} of {name} names the host {elsewhere[0]} without encryption: add "
            "?sslmode=verify-full&sslrootcert=FILE, or set MERCATO_PLAINTEXT=everywhere where the network encrypts by "
            "itself."
        )
    if missing := lacks_certificates(dsn):
        raise SettingsError(f"The setting {DATABASE} of {name} asks to verify the server, {missing}.")
    return dsn


def secret_of(name: str, *, alone: bool) -> bytes:
    """The secret of a caller. Raises `SettingsError`."""
    try:
        secret = bytes.fromhex(variable_of(name, SECRET, alone=alone))
    except ValueError:
        secret = b""
    if len(secret) != SECRET_BYTES:
        raise SettingsError(
            f"The setting {SECRET} of {name} is not valid: it has {2 * SECRET_BYTES} hexadecimal digits, as "
            "`mercato migrate` writes them."
        )
    return secret


def _public_keys(text: str, names: Sequence[str]) -> Mapping[str, Mapping[str, str]]:
    keys: dict[str, Mapping[str, str]] = {}
    for entry in text.split():
        name, _, x = entry.partition("=")
        if not name or not PUBLIC_KEY.fullmatch(x):
            raise SettingsError(f"The setting {PUBLIC_KEYS} is not valid: {entry[:40]!r} is not a name=key.")
        keys[name] = {**CURVE, "x": x}
    if not keys:
        raise SettingsError(f"The setting {PUBLIC_KEYS} is missing: `mercato migrate` writes it.")
    if strange := sorted(set(topology.CALLERS) - keys.keys()):
        raise SettingsError(f"The setting {PUBLIC_KEYS} has no key of {strange[0]}: take it from `mercato migrate`.")
    return keys


def registry(settings: ServeSettings) -> tuple[Registry, Registrar | None]:
    """The registry of other processes: MERCATO_SERVICES, or one in which each process registers itself.

    With MERCATO_SERVICES, the event log of a service has the addresses of the service.

    Also the registrar of this process, if the registry has one. Raises `SettingsError`.
    """
    if settings.registry == "mdns":
        found = _mdns(settings)
        return found, found
    if settings.registry in ("etcd", "consul"):
        _require_one_address(settings)
        found = registries.leased(settings, _shop(settings))
        return found, found
    return _listed(settings), None


def _mdns(settings: ServeSettings) -> MdnsRegistry:
    if importlib.util.find_spec("zeroconf") is None:
        raise SettingsError("The setting MERCATO_REGISTRY=mdns needs a library: pip install 'mercato[mdns]'.")
    interfaces = settings.mdns_interfaces.replace(",", " ").split()
    for interface in interfaces:
        if not _is_one_address(interface):
            raise SettingsError(
                f"The setting MERCATO_MDNS_INTERFACES is not valid: {interface!r} is not an address of this machine."
            )
    _require_one_address(settings)
    return MdnsRegistry(_shop(settings), interfaces)


def _require_one_address(settings: ServeSettings) -> None:
    """Raises unless other processes can connect to MERCATO_RPC_ADDRESS, which is registered unchanged."""
    address = host_and_port(settings.rpc_address)
    if address is not None and not _is_one_address(address[0]):
        raise SettingsError(
            f"The setting MERCATO_RPC_ADDRESS has {address[0]}; with MERCATO_REGISTRY={settings.registry} it is the "
            "one address that others connect to."
        )


def _shop(settings: ServeSettings) -> str:
    """The name of this shop in a registry, which distinguishes the processes of several shops."""
    if not settings.public_keys:
        raise SettingsError(f"The setting {PUBLIC_KEYS} is missing: by it the processes of one shop know each other.")
    return hashlib.sha256(settings.public_keys.encode()).hexdigest()[:SHOP_DIGITS]


def _is_one_address(text: str) -> bool:
    try:
        return not ipaddress.ip_address(text).is_unspecified
    except ValueError:
        return False


def _listed(settings: ServeSettings) -> Registry:
    setting = "MERCATO_SERVICES"
    try:
        found = StaticRegistry.parse(settings.services, setting=setting)
        listed = {name: [i.address for i in found.instances(name)] for name in topology.SERVICES}
        logs = {f"{name}.log": addresses for name, addresses in listed.items()}
        whole = {name: addresses for name, addresses in {**listed, **logs}.items() if addresses}
        if settings.registry == "static":
            return StaticRegistry.of({name: ",".join(where) for name, where in whole.items()}, setting=setting)
    except MalformedInstances as error:
        raise SettingsError(str(error)) from None
    for name, names in whole.items():
        if len(names) > 1:
            raise SettingsError(f"The setting {setting} is not valid: with MERCATO_REGISTRY=dns, {name} has one name.")
    return DnsRegistry({name: names[0] for name, names in whole.items()})


def contexts(settings: ServeSettings) -> tuple[ssl.SSLContext | None, ssl.SSLContext | None]:
    """TLS contexts of this process as a client and as a server; both None without encryption.

    Raises `SettingsError`.
    """
    files = {"ca": settings.tls_ca, "cert": settings.tls_cert, "key": settings.tls_key}
    if not any(files.values()):
        return None, None
    for name, path in files.items():
        if path is None:
            raise SettingsError(f"The setting MERCATO_TLS_{name.upper()} is missing, while another of TLS is set.")
    try:
        client = ssl.create_default_context(cafile=settings.tls_ca)
        server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        assert settings.tls_cert is not None
        server.load_cert_chain(settings.tls_cert, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"The files in MERCATO_TLS_CA, _CERT and _KEY cannot be used: {error}.") from None
    return client, server


def pem_files(settings: ServeSettings) -> tuple[bytes, bytes, bytes] | None:
    """The contents of MERCATO_TLS_CA, _CERT and _KEY; None without encryption. Raises `SettingsError`."""
    if contexts(settings) == (None, None):
        return None
    assert settings.tls_ca is not None
    assert settings.tls_cert is not None
    assert settings.tls_key is not None
    return settings.tls_ca.read_bytes(), settings.tls_cert.read_bytes(), settings.tls_key.read_bytes()


def require_grpc(what: str) -> None:
    """Raises `SettingsError` where the libraries of gRPC are not installed."""
    if importlib.util.find_spec("grpc") is None or importlib.util.find_spec("google.protobuf") is None:
        raise SettingsError(f"{what} needs libraries that are not installed: pip install 'mercato[grpc]'.")


def server_name_of(settings: ServeSettings) -> ServerName:
    """The names that the certificates of other processes must have. Raises `SettingsError`."""
    try:
        return server_name(settings.tls_name)
    except MalformedName as error:
        raise SettingsError(f"The setting MERCATO_TLS_NAME is not valid: {error}.") from None


def rpc_address(settings: ServeSettings) -> tuple[str, int]:
    """Host and port at which this process accepts the calls of others, over HTTP or gRPC. Raises `SettingsError`."""
    address = host_and_port(settings.rpc_address)
    if address is None:
        raise SettingsError(
            "The setting MERCATO_RPC_ADDRESS is missing or not valid: it is where other processes call this one over "
            "HTTP or gRPC, as in 127.0.0.1:9083; with NATS_URL it is not needed."
        )
    return address


def diagnostics_address(settings: ServeSettings) -> tuple[str, int] | None:
    """Host and port at which this process answers the operator; None: it does not. Raises `SettingsError`."""
    if not settings.diagnostics_address:
        return None
    address = host_and_port(settings.diagnostics_address)
    if address is None:
        raise SettingsError("The setting MERCATO_DIAGNOSTICS_ADDRESS is not valid: write it as in 127.0.0.1:9190.")
    return address


def host_and_port(address: str) -> tuple[str, int] | None:
    """Host and port of `HOST:PORT`; None for any other text."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > LARGEST_PORT:
        return None
    return host.removeprefix("[").removesuffix("]"), int(port)


def require_encryption(what: str, host: str, settings: ServeSettings, *, is_encrypted: bool) -> None:
    """Raises `SettingsError` if `what` would use `host`, on another machine, without encryption."""
    if not is_encrypted and not _is_here(host) and settings.plaintext == "loopback":
        raise SettingsError(
            f"{what} names {host} without encryption: set MERCATO_TLS_CA, _CERT and _KEY, or "
            "MERCATO_PLAINTEXT=everywhere where the network encrypts by itself."
        )


def _is_here(host: str) -> bool:
    """Whether `host` is on this machine: loopback, or the folder of a socket."""
    return host.startswith("/") or is_loopback(host)


def check_currency(currency: str) -> None:
    """Raises `SettingsError` for an unknown currency."""
    if currency not in EXPONENTS:
        raise SettingsError(f"The setting MERCATO_CURRENCY is not valid: {unknown_currency(currency)}.")


def set_origins(origins: Sequence[str]) -> None:
    """Origins of the command line override the setting, also in the processes that this one starts."""
    if origins:
        set_variables({CORS_ORIGIN: ",".join(origins)})


def check_origins(text: str) -> None:
    """Raises `SettingsError` for what is not an origin."""
    try:
        origins_of(text)
    except ValueError as error:
        raise SettingsError(f"The setting {CORS_ORIGIN} is not valid: {error}.") from None
