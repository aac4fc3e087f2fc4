"""The settings of a process, read from its environment once at start-up.

Each variable but `NATS_URL` begins with `MERCATO_`. A wrong one ends the start with a sentence that names it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Final, Literal, TypeVar

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from mercato.chassis.rpc.limits import CallLimits

from . import variables
from .variables import PREFIX, SettingsError

LEAST_AUDIT_SECONDS: Final = 1.0


class Settings(BaseSettings):
    """The settings of a process, with their defaults."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", env_ignore_empty=True)

    postgres_dsn: SecretStr | None = None
    """An administrator's DSN of a PostgreSQL >= 16 to use instead of the embedded one.

    Commands that look at databases on several servers take `SERVICE,SERVICE=DSN` for each, with spaces between."""
    secret: SecretStr | None = None
    """At least 32 characters from which all keys and database passwords are derived, instead of `<data>/secret`.

    Machines that share one PostgreSQL need the same one."""
    transport: Literal["local", "loopback"] = "local"
    """How services call each other; `loopback` encodes every message and repeats what may be repeated, for tests:
    refused where tokens are required."""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    """`info`: slow and failed requests, declines and cancellations; `debug`: every request."""

    currency: str = "USD"
    """The shop's currency (ISO 4217): of new products, and of amounts that belong to nothing with a currency."""
    pool_size: Annotated[int, Field(ge=1, le=50)] = 6
    """Database connections of one service in one process, at most."""
    cors_origin: str = ""
    """The origins whose pages a browser lets call the API: `https://shop.example, http://localhost:3000`."""
    metrics_token: SecretStr | None = None
    """At least 32 characters that a collector of metrics shows: `Authorization: Bearer ...`."""
    requests_in_work: Annotated[int, Field(ge=1, le=1_024)] = 512
    """Requests that one process has in work at once, at most; what it measures may lower that."""
    streams: Annotated[int, Field(ge=1, le=20_000)] = 2_000
    """Streams of events that one process has open at once, at most."""
    streams_of_one: Annotated[int, Field(ge=1, le=20_000)] = 100
    """Streams of one account, or without an account of one address, that one process has open at once, at most."""
    audit_seconds: Annotated[float, Field(ge=0, le=7 * 86_400)] = 300.0
    """How often the shop audits itself, all its processes together; 0: never, and else at least 1."""
    breaker_window_seconds: Annotated[float, Field(ge=0.1, le=3_600)] = CallLimits().window_seconds
    """The sliding window of calls by which a circuit breaker (one for a service's reads, one for its writes) opens."""
    breaker_minimum_calls: Annotated[int, Field(ge=1, le=1_000_000)] = CallLimits().minimum_calls
    """A breaker does not open with fewer calls in the window."""
    breaker_failure_share: Annotated[float, Field(ge=0.01, le=1)] = CallLimits().failure_share
    """A breaker opens when this share of the calls has failed."""
    breaker_slow_share: Annotated[float, Field(ge=0.01, le=1)] = CallLimits().slow_share
    """A breaker opens when this share of the calls was slow."""
    breaker_slow_seconds: Annotated[float, Field(ge=0.01, le=3_600)] = CallLimits().slow_seconds
    """A call without an answer after this time is slow."""
    breaker_open_seconds: Annotated[float, Field(ge=0.01, le=3_600)] = CallLimits().open_seconds
    """How long a breaker refuses calls before it lets one through; each further failure doubles it."""
    breaker_longest_open_seconds: Annotated[float, Field(ge=0.01, le=3_600)] = CallLimits().longest_open_seconds
    """The longest time for which a breaker refuses calls."""
    retry_share: Annotated[float, Field(ge=0, le=1)] = CallLimits().retry_share
    """The share of requests between processes that may be sent again if their service does not answer; 0: none."""
    tracing: Literal["on", "off"] = "on"
    """`off`: no request has spans."""
    trace_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """The share of requests whose traces are recorded, and exported if OTEL_EXPORTER_OTLP_ENDPOINT is set."""
    faults: str = ""
    """Faults to inject at start, for crash tests: `orders.place.after_commit=kill`. Refused where tokens are
    required."""

    @property
    def log_requests(self) -> bool:
        """Whether each request is logged, which costs CPU."""
        return self.log_level == "debug"

    @property
    def metrics_token_text(self) -> str:
        """The token, or an empty text."""
        return self.metrics_token.get_secret_value() if self.metrics_token else ""

    @property
    def call_limits(self) -> CallLimits:
        return CallLimits(
            window_seconds=self.breaker_window_seconds,
            minimum_calls=self.breaker_minimum_calls,
            failure_share=self.breaker_failure_share,
            slow_share=self.breaker_slow_share,
            slow_seconds=self.breaker_slow_seconds,
            open_seconds=self.breaker_open_seconds,
            longest_open_seconds=self.breaker_longest_open_seconds,
            retry_share=self.retry_share,
        )


class ServeSettings(Settings):
    """Further settings of a process that serves some of the services, while other processes serve the rest."""

    rpc_transport: Literal["auto", "nats", "http", "grpc"] = "auto"
    """How the processes call each other; all of a shop the same. `auto`: over NATS with NATS_URL, else over HTTP.
    `grpc` needs the extra `grpc`."""
    nats_url: Annotated[SecretStr | None, Field(validation_alias="NATS_URL")] = None
    """The NATS server: `nats://orders:PASSWORD@127.0.0.1:4222`. Without it the processes call each other over HTTP."""
    services: str = ""
    """Where the other processes are, for HTTP or gRPC: `orders=127.0.0.1:9083; users=127.0.0.1:9081,127.0.0.1:9181`."""
    registry: Literal["static", "dns", "mdns", "etcd", "consul"] = "static"
    """`dns`: MERCATO_SERVICES has a name for each service, whose addresses are looked up again and again. `mdns`: the
    processes on a network find each other; MERCATO_SERVICES is not read. `etcd`, `consul`: they register there."""
    registry_url: str = ""
    """For `etcd` and `consul`: the addresses of its servers: `https://10.0.0.5:2379,https://10.0.0.6:2379`."""
    registry_user: str = ""
    """For an `etcd` with authentication: the user; with `registry_password`."""
    registry_password: SecretStr | None = None
    """For an `etcd` with authentication: the password; with `registry_user`."""
    registry_token: SecretStr | None = None
    """For a `consul` with access control: the token."""
    registry_ca: Path | None = None
    """The certificates (PEM) by which etcd or Consul is verified; by default those of `tls_ca`, else the system's."""
    mdns_interfaces: str = ""
    """For `mdns`: addresses of this machine, in whose networks the others are found: `10.0.0.5`. Empty: all."""
    log_file: Path | None = None
    """A file to which the log is written besides standard error; with an older one beside it, of 16 MB each."""
    diagnostics_address: str = ""
    """The address at which this process answers the operator (`mercato trace --at`): `127.0.0.1:9190`. Empty: none."""
    rpc_address: str = ""
    """The address at which this process accepts the calls of others, over HTTP or gRPC: `127.0.0.1:9083`."""
    public_keys: str = ""
    """The public keys of all callers, as `mercato migrate` writes them."""
    tls_ca: Path | None = None
    """The certificates (PEM) by which others are verified. With it, every connection between processes is encrypted."""
    tls_cert: Path | None = None
    """The certificate (PEM) of this process, for those that call it over HTTP or gRPC."""
    tls_key: Path | None = None
    """The private key (PEM) of that certificate."""
    tls_name: str = ""
    """The name in the certificates of processes, for HTTP or gRPC: `{service}.shop.svc`, where `{service}` is orders,
    users and so on. Empty: with `dns` the name in MERCATO_SERVICES, else the host of the address; `{address}`:
    the latter always."""
    plaintext: Literal["loopback", "everywhere"] = "loopback"
    """Where connections may go without TLS; `everywhere` is for networks that encrypt by themselves."""

    @property
    def carrier(self) -> Literal["nats", "http", "grpc"]:
        """How the processes call each other."""
        if self.rpc_transport == "auto":
            return "http" if self.nats_url is None else "nats"
        return self.rpc_transport


def variable_of(service: str, name: str, *, alone: bool) -> str:
    """The value of `NAME_SERVICE`, or of `NAME` if the process serves this service `alone`.

    Raises `SettingsError` if neither is set.
    """
    own = f"{name}_{service.upper()}"
    value = variables.value(own) or (variables.value(name) if alone else None)
    if not value:
        hint = f" (or {name}, for this one service)" if alone else ""
        raise SettingsError(f"The setting {own} is missing{hint}: `mercato migrate` writes it.")
    return value


def service_options(services: Iterable[str]) -> dict[str, str]:
    """The variables that belong to services: `MERCATO_<SERVICE>_<OPTION>`. Each service reads its own."""
    prefixes = tuple(f"{PREFIX}{service.upper()}_" for service in services)
    return {name: value for name, value in variables.given().items() if name.startswith(prefixes)}


S = TypeVar("S", bound=Settings)


def load(kind: type[S] = Settings) -> S:
    """Reads the environment. Raises `SettingsError`."""
    try:
        settings = kind()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = str(first["loc"][0])
        name = field if field.isupper() else PREFIX + field.upper()
        raise SettingsError(f"The setting {name} is not valid: {first['msg']}.") from None
    if settings.secret is not None and len(settings.secret.get_secret_value()) < 32:
        raise SettingsError("The setting MERCATO_SECRET is not valid: it must have at least 32 characters.")
    if len(settings.metrics_token_text or "x" * 32) < 32:
        raise SettingsError("The setting MERCATO_METRICS_TOKEN is not valid: it must have at least 32 characters.")
    if settings.breaker_open_seconds > settings.breaker_longest_open_seconds:
        raise SettingsError(
            "The setting MERCATO_BREAKER_OPEN_SECONDS is not valid: it must be at most "
            f"MERCATO_BREAKER_LONGEST_OPEN_SECONDS ({settings.breaker_longest_open_seconds:g})."
        )
    if isinstance(settings, ServeSettings) and settings.carrier == "nats" and settings.nats_url is None:
        raise SettingsError("The setting NATS_URL is missing, while MERCATO_RPC_TRANSPORT is nats.")
    if 0 < settings.audit_seconds < LEAST_AUDIT_SECONDS:
        raise SettingsError("The setting MERCATO_AUDIT_SECONDS is not valid: it must be 0, or at least 1.")
    return settings
