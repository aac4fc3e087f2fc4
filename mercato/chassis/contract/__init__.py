"""Contracts: what a service offers, written once.

One definition of an operation gives three things: the typed client (`await users.get(GetUser(id=1))` is a `User` to a
type checker), the server's dispatch (`Server.register(Users.get, service.get)` checks the handler's type), and the
JSON schema (`compatibility.schemas(Users)`).

    class Users(Contract, name="users"):
        get = batched(GetUser, User, size=512, retry=Retry.SAFE, allow={"customer", "staff"})
        register = single(Register, User, allow={"anonymous"})

Messages are frozen structs and sequences in them are tuples, so a call inside one process can hand over the object
itself and is as safe as a remote one. A contract changes additively: a new operation, a new field with a default.
"""

from .constraints import (
    checked as checked,
    checks as checks,
    explained as explained,
    worded as worded,
)
from .context import (
    ANONYMOUS_ACTOR as ANONYMOUS_ACTOR,
    GUEST_ROLE as GUEST_ROLE,
    SERVICE_ROLE as SERVICE_ROLE,
    Actor as Actor,
    Batch as Batch,
    Context as Context,
    HandlerRun as HandlerRun,
    Place as Place,
    Span as Span,
    acting_as as acting_as,
    as_service as as_service,
    concern as concern,
    current as current,
    current_span as current_span,
    handler_run as handler_run,
    trace_of as trace_of,
    within as within,
)
from .errors import (
    DeadlineExceeded as DeadlineExceeded,
    ErrorMessage as ErrorMessage,
    FieldError as FieldError,
    Forbidden as Forbidden,
    IdempotencyKeyReused as IdempotencyKeyReused,
    Internal as Internal,
    InvalidRequest as InvalidRequest,
    Kind as Kind,
    OutcomeUnknown as OutcomeUnknown,
    Overloaded as Overloaded,
    RemoteError as RemoteError,
    RequestInProgress as RequestInProgress,
    RuleBroken as RuleBroken,
    ServiceError as ServiceError,
    StaleVersion as StaleVersion,
    Unauthenticated as Unauthenticated,
    Unavailable as Unavailable,
    check_version as check_version,
)
from .messages import (
    FILLING as FILLING,
    GIVEN as GIVEN,
    MAX_ID as MAX_ID,
    Empty as Empty,
    Filling as Filling,
    FrozenMeta as FrozenMeta,
    Message as Message,
    Open as Open,
    filled as filled,
    published_pattern as published_pattern,
)
from .operations import (
    DEFAULT_DEADLINE_MS as DEFAULT_DEADLINE_MS,
    DEFAULT_SINGLE_LANES as DEFAULT_SINGLE_LANES,
    BatchOperation as BatchOperation,
    Call as Call,
    Contract as Contract,
    Operation as Operation,
    Retry as Retry,
    SingleOperation as SingleOperation,
    batched as batched,
    single as single,
)
