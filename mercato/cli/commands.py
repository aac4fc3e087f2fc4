"""The commands and their options. Each command imports the module that implements it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError, validators

from mercato import __version__
from mercato.chassis.hosting import variables
from mercato.cli import observing
from mercato.cli.options import (
    AccountsData,
    AsJson,
    Authorization,
    Carrier,
    DataFolder,
    GrpcOptions,
    ListenHost,
    ListenPort,
    LogLevel,
    Origins,
    Servers,
    Who,
)


def _wrong_usage(error: CycloptsError) -> str:
    if isinstance(error, UnusedCliTokensError):
        return f"mercato: Unexpected argument: {' '.join(error.unused_tokens or ())}."
    return f"mercato: {' '.join(str(error).split())}"


app = App(
    name="mercato",
    error_formatter=_wrong_usage,
    help="An e-commerce backend that keeps its promises when processes die.",
    version=__version__,
)


def _set_log_level(level: LogLevel | None) -> None:
    """An option overrides the variable, also in the processes that this one starts."""
    if level is not None:
        variables.replace({"MERCATO_LOG_LEVEL": level})


@app.command
def up(
    *,
    host: ListenHost = "127.0.0.1",
    port: ListenPort = 8080,
    grpc: GrpcOptions | None = None,
    data: DataFolder = Path(".mercato"),
    demo: Annotated[bool | None, Parameter(env_var="MERCATO_DEMO")] = None,
    workers: Annotated[int, Parameter(env_var="MERCATO_WORKERS", validator=validators.Number(gte=1, lte=64))] = 1,
    split: Annotated[bool, Parameter(negative="")] = False,
    placement: Annotated[Literal["together", "split", "cluster"] | None, Parameter(env_var="MERCATO_PLACEMENT")] = None,
    replicas: Annotated[str, Parameter(env_var="MERCATO_REPLICAS")] = "",
    transport: Annotated[Carrier | None, Parameter(env_var="MERCATO_SPLIT_TRANSPORT")] = None,
    auth: Authorization = None,
    cors_origin: Origins = (),
    log_level: LogLevel | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Start the shop: PostgreSQL, all services and the gateway.

    Ctrl-C stops it. Its data is in the data folder; under root the database may be below /var/lib/mercato.

    Parameters
    ----------
    host
        The address to listen on. On anything but loopback, tokens are required.
    port
        The port to listen on; 0 takes a free one.
    data
        The folder of the shop's data; made when it is not there.
    demo
        Put demo users and products, whose passwords are public, into an empty shop. [default: on loopback only]
    workers
        How many processes serve requests, each with all services.
    split
        Run the gateway and each service as a process of its own.
    placement
        What runs in which process: "together" in one place, "split" as --split says, "cluster" with two processes of
        each. [default: together]
    replicas
        With --split, how many processes of each there are, where not one: orders=2,gateway=2
    transport
        With --split, how the processes reach each other: over a NATS server of their own, over HTTP, or over gRPC.
        [default: nats]
    auth
        "open": callers without a token act as staff (loopback only). "required": they do not. [default: open on
        loopback, required elsewhere]
    cors_origin
        An origin whose pages may call the API from a browser: https://shop.example. May be given several times.
        [env: MERCATO_CORS_ORIGIN]
    log_level
        From which level on events are logged, instead of MERCATO_LOG_LEVEL.
    json
        Print progress as one JSON object a line.
    """
    from mercato.cli.up import Options, run

    _set_log_level(log_level)
    return run(
        Options(
            host=host,
            port=port,
            grpc=grpc,
            data=data,
            demo=demo,
            workers=workers,
            auth=auth,
            cors_origins=cors_origin,
            placement=placement or ("split" if split or replicas or transport else "together"),
            replicas=replicas,
            transport=transport,
            json=json,
        )
    )


@app.command
def serve(
    service: str,
    *more: str,
    host: ListenHost = "127.0.0.1",
    port: ListenPort = 8080,
    grpc: GrpcOptions | None = None,
    auth: Authorization = None,
    cors_origin: Origins = (),
    transport: Carrier | None = None,
    credentials: Annotated[Path | None, Parameter(env_var="MERCATO_CREDENTIALS")] = None,
    log_level: LogLevel | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Serve one service, several, or the gateway, in this process.

    Everything else comes from the environment: DATABASE_URL, MERCATO_SERVICE_SECRET and MERCATO_PUBLIC_KEYS, as
    `mercato migrate` writes them; and where the others are: NATS_URL, or MERCATO_SERVICES and MERCATO_RPC_ADDRESS for
    HTTP or gRPC. SIGTERM ends it within ten seconds, once the running requests are answered.

    Parameters
    ----------
    service
        users, products, inventory, sandbox, payments, orders, events, or gateway for the whole API.
    more
        Further services for the same process.
    host
        The address to listen on for clients. On anything but loopback, tokens are required.
    port
        The port for its rows of the API, /health and /metrics; 0 takes a free one.
    auth
        "open": callers without a token act as staff (loopback only). "required": they do not. [default: open on
        loopback, required elsewhere]
    cors_origin
        An origin whose pages may call the API from a browser: https://shop.example. May be given several times.
        [env: MERCATO_CORS_ORIGIN]
    transport
        How this process and the others call each other. [env: MERCATO_RPC_TRANSPORT]
    credentials
        The file of this process that `mercato migrate` has written, for variables that are not set. Commands that look
        at the processes of a shop read the variable too.
    log_level
        From which level on events are logged, instead of MERCATO_LOG_LEVEL.
    json
        Print progress as one JSON object a line.
    """
    from mercato.cli.serve import Options, run

    _set_log_level(log_level)
    if credentials is not None:
        variables.replace({"MERCATO_CREDENTIALS": str(credentials)})
    if transport is not None:
        variables.replace({"MERCATO_RPC_TRANSPORT": transport})
    names = (service, *more)
    return run(Options(names=names, host=host, port=port, grpc=grpc, auth=auth, cors_origins=cors_origin, json=json))


@app.command
def migrate(
    *services: str,
    data: DataFolder = Path(".mercato"),
    dsn: str | None = None,
    pooler: Annotated[str | None, Parameter(env_var="MERCATO_POOLER")] = None,
    demo: Annotated[bool, Parameter(negative="", env_var="MERCATO_DEMO")] = False,
    credentials: Path | None = None,
    folders: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Make and migrate the databases of a shop whose services run as processes of their own.

    Writes a file of environment variables for each service, with its own credentials alone. It can be repeated at any
    time.

    Parameters
    ----------
    services
        Only these. [default: all]
    data
        The folder with the secret of the shop; made when it is not there.
    dsn
        An administrator's DSN of the server. [env: MERCATO_POSTGRES_DSN]
    pooler
        HOST:PORT of PgBouncer 1.21 or newer, in transaction mode: the services reach their databases through it.
    demo
        Put demo users and products, whose passwords are public, into an empty shop.
    credentials
        The folder for those files. [default: the folder environment of the data folder]
    folders
        Give each of those files a folder of its own, orders/orders.env, so that a container can have that one alone.
    json
        Print progress as one JSON object a line.
    """
    from mercato.cli.migrating import Options, run

    return run(
        Options(
            services=services,
            data=data,
            dsn=dsn,
            pooler=pooler,
            demo=demo,
            credentials=credentials,
            folders=folders,
            json=json,
        )
    )


@app.command
def credentials(
    *services: str,
    dsn: str | None = None,
    pooler: Annotated[str | None, Parameter(env_var="MERCATO_POOLER")] = None,
    prefix: str = "mercato",
    admin_secret: str | None = None,
) -> int:
    """Print what `mercato migrate` gives each process, as Secrets of Kubernetes: | kubectl apply -f -

    A Secret for each service with its variables, one for the gateway, for the operator, and for NATS (`mercato.conf`),
    and one for `mercato migrate` with the administrator's DSN. All come from MERCATO_SECRET, which must be set: nothing
    is asked of a server, and the same secret gives the same Secrets.

    Parameters
    ----------
    services
        Only these, where others have their databases on another server. [default: all]
    dsn
        An administrator's DSN of the server, as processes in the cluster reach it. [env: MERCATO_POSTGRES_DSN]
    pooler
        HOST:PORT of PgBouncer 1.21 or newer, in transaction mode: the services reach their databases through it.
    prefix
        What the names of the Secrets begin with: mercato-orders.
    admin_secret
        The name of the Secret for `mercato migrate`; needed for some of the services. [default: the prefix with -admin]
    """
    from mercato.cli.credentials import Options, run

    return run(Options(services=services, dsn=dsn, pooler=pooler, prefix=prefix, admin_secret=admin_secret))


@app.command
def audit(
    *,
    data: DataFolder = Path(".mercato"),
    dsn: Servers = (),
    scratch: str | None = None,
    settled: Annotated[float, Parameter(validator=validators.Number(gte=0, lte=31_536_000))] = 60.0,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Check that no order is lost or doubled, no card is charged twice, nothing is oversold.

    Copies the databases of a shop, running or not, and checks the copies against each invariant that needs databases
    alone. Changes nothing in the shop; a small database for the copies, mercato_audit, stays on its server. A shop that
    does not run is checked as of its last sign of life. Exits with 0 if all hold, 1 if any does not, 2 if it could not
    be checked.

    Parameters
    ----------
    data
        The folder of the shop's data.
    scratch
        An administrator's DSN of the server that gets the copies for the audit. [default: the first of --dsn]
    settled
        Leave out what was changed within so many seconds, about which services may not agree yet. 0 for an idle shop:
        all work must be finished.
    json
        Print the result as one JSON document.
    """
    from mercato.cli.audit import Options, audit_shop

    return audit_shop(Options(data=data, dsns=dsn, scratch=scratch, settled=settled, json=json))


@app.command
def backup(
    file: Path,
    *,
    data: DataFolder = Path(".mercato"),
    dsn: Servers = (),
    scratch: str | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Write a backup of the whole shop, as it is at one moment, while it runs.

    Writes to the shop wait for at most two seconds until each database has its snapshot. The backup is audited; one
    that violates an invariant gets the name FILE.violated. Sessions and the secret of the shop are not in it. An
    existing file is never overwritten. Exits with 0 for a backup without violations, 1 for one with some, 2 if there is
    none.

    Parameters
    ----------
    file
        The file to make. It holds the data of all customers.
    data
        The folder of the shop's data.
    scratch
        An administrator's DSN of the server that gets the copies for the audit. [default: the first of --dsn]
    json
        Print the result as one JSON document.
    """
    from mercato.cli.backup import backup as run

    return run(file, data, dsn, scratch, as_json=json)


@app.command
def restore(
    file: Path,
    *,
    data: Path | None = None,
    dsn: Servers = (),
    scratch: str | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Make a new shop from a backup, in a folder or on servers. An existing shop is never overwritten.

    The whole file is checked before anything is made, and the new shop is audited. It has a new secret: all users
    sign in again. Exits with 0 for a shop without violations, 1 for one with some, 2 if there is none.

    Parameters
    ----------
    file
        What `mercato backup` has made.
    data
        The folder of the new shop, which gets a PostgreSQL of its own; it must not be there.
    dsn
        Instead of a folder, a superuser's DSN of a server without a shop; SERVICE,SERVICE=DSN for each of several.
        [env: MERCATO_POSTGRES_DSN, with spaces between]
    scratch
        An administrator's DSN of the server that gets the copies for the audit. [default: the first of --dsn]
    json
        Print the result as one JSON document.
    """
    from mercato.cli.backup import restore as run

    return run(file, data, dsn, scratch, as_json=json)


@app.command
def call(
    operation: str,
    request: str = "{}",
    *,
    data: DataFolder = Path(".mercato"),
    json: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Call one operation of a shop with several processes, in the role of staff: orders.get '{"id": 1001}'

    Parameters
    ----------
    operation
        The service and the operation.
    request
        The request as JSON.
    data
        The folder of the shop's data.
    json
        Print the answer on one line, and an error as JSON too.
    """
    from mercato.cli.calling import call as run

    return run(operation, request, data, as_json=json)


events = App(name="events", help="Read the feed of events, and replay dead events (dead letters).")
app.command(events)

users = App(name="users", help="Look at accounts, and change them where no member of staff can sign in.")
app.command(users)


@users.command(name="list")
def users_list(
    *,
    role: Literal["customer", "staff"] | None = None,
    data: AccountsData = Path(".mercato"),
    dsn: Servers = (),
    json: AsJson = False,
) -> int:
    """List all accounts.

    Parameters
    ----------
    role
        Only those with this role.
    """
    from mercato.cli.accounts import ShopLocation, list_accounts

    return list_accounts(ShopLocation(data, dsn, json), role)


@users.command
def set_password(
    who: Who,
    *,
    data: AccountsData = Path(".mercato"),
    dsn: Servers = (),
    json: AsJson = False,
) -> int:
    """Set the password of an account, from a prompt, or a line of standard input. All sessions end."""
    from mercato.cli.accounts import ShopLocation, set_password as change

    return change(ShopLocation(data, dsn, json), who)


@users.command
def set_role(
    who: Who,
    role: Literal["customer", "staff"],
    /,
    *,
    data: AccountsData = Path(".mercato"),
    dsn: Servers = (),
    json: AsJson = False,
) -> int:
    """Make an account staff, or a customer. Its sessions end, if that is a change.

    Parameters
    ----------
    role
        What it is to be.
    """
    from mercato.cli.accounts import ShopLocation, set_role as change

    return change(ShopLocation(data, dsn, json), who, role)


@users.command
def erase(
    who: Who,
    *,
    data: AccountsData = Path(".mercato"),
    dsn: Servers = (),
    json: AsJson = False,
) -> int:
    """Erase an account permanently. Its orders and payments stay, without the person; its sessions end.

    A backup that was made before still holds the account.
    """
    from mercato.cli.accounts import ShopLocation, erase as run

    return run(ShopLocation(data, dsn, json), who)


@users.command
def log(
    who: str | None = None,
    *,
    limit: Annotated[int, Parameter(validator=validators.Number(gte=1, lte=1_000_000))] = 200,
    data: AccountsData = Path(".mercato"),
    dsn: Servers = (),
    json: AsJson = False,
) -> int:
    """Print the security log, the newest entries first: sign-ins, changes and refunds of the last 90 days.

    Parameters
    ----------
    who
        Only what is about this account, or was done by it: its e-mail address, or its id, also of one that is erased.
    limit
        How many entries at most.
    """
    from mercato.cli.accounts import ShopLocation, show_log

    return show_log(ShopLocation(data, dsn, json), who, limit)


@events.command
def tail(
    *,
    after: Annotated[int, Parameter(validator=validators.Number(gte=0, lte=9_007_199_254_740_991))] | None = None,
    types: str = "",
    follow: Annotated[bool, Parameter(negative="")] = False,
    json: Annotated[bool, Parameter(negative="")] = False,
    data: DataFolder = Path(".mercato"),
    dsn: Servers = (),
) -> int:
    """Print the feed of events, the oldest first.

    Parameters
    ----------
    after
        Only positions behind this one. [default: the last 20 entries]
    types
        Only events of these types, with commas between: order.placed,order.paid
    follow
        Continue with new entries, until Ctrl-C, while the shop runs.
    json
        Print one JSON object a line.
    data
        The folder of the shop's data.
    """
    from mercato.cli.events import ShopLocation, tail as run

    return run(ShopLocation(data, dsn), after=after, types=types, follow=follow, as_json=json)


@events.command
def dead(
    *,
    json: Annotated[bool, Parameter(negative="")] = False,
    data: DataFolder = Path(".mercato"),
    dsn: Servers = (),
) -> int:
    """List dead events (dead letters): those that a consumer could not process, and why.

    Parameters
    ----------
    json
        Print one JSON object a line.
    data
        The folder of the shop's data.
    """
    from mercato.cli.events import ShopLocation, dead as run

    return run(ShopLocation(data, dsn), as_json=json)


@events.command
def replay(
    *ids: str,
    all: Annotated[bool, Parameter(negative="")] = False,
    data: DataFolder = Path(".mercato"),
    dsn: Servers = (),
) -> int:
    """Replay dead events, once the cause of their failure is fixed.

    Each is processed and marked in one transaction: the command can be repeated at any time. A replayed event is
    processed after later events of its subject. Exits with 1 if one failed again.

    Parameters
    ----------
    ids
        The events, as `mercato events dead` shows them: orders:17
    all
        All of them.
    data
        The folder of the shop's data.
    """
    from mercato.cli.events import ShopLocation, replay as run

    return run(ShopLocation(data, dsn), ids, all_=all)


@app.command
def settings(
    *,
    json: Annotated[bool, Parameter(negative="")] = False,
    markdown: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """List all settings: variables of the environment with their defaults and bounds, and who reads them.

    Parameters
    ----------
    json
        Print one JSON document, which has what each means too.
    markdown
        Print the table of docs/operations.md.
    """
    from mercato.cli.settings import show_table

    return show_table(as_json=json, as_markdown=markdown)


observing.register(app)
