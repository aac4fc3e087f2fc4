"""Contracts: what a service offers, written once.

One definition of an operation gives three things: the typed client (`await users.get(GetUser(id=1))` is a `User` to a
type checker), the server's dispatch (`Server.register(Users.get, service.get)` checks the handler's type), and the
JSON schema (`schemas(Users)`).

    class Users(Contract, name="users"):
        get = batched(GetUser, User, size=512, retry=Retry.SAFE, allow={"customer", "staff"})
        register = single(Register, User, allow={"anonymous"})

Messages are frozen structs and sequences in them are tuples, so a call inside one process can hand over the object
itself and is as safe as a remote one. A contract changes additively: a new operation, a new field with a default.
"""

from .compatibility import schemas as schemas
from .context import ANONYMOUS as ANONYMOUS
from .context import SERVICE_ROLE as SERVICE_ROLE
from .context import Actor as Actor
from .context import Attempt as Attempt
from .context import Batch as Batch
from .context import Context as Context
from .context import attempt as attempt
from .context import current as current
from .errors import DeadlineExceeded as DeadlineExceeded
from .errors import ErrorMessage as ErrorMessage
from .errors import FieldError as FieldError
from .errors import Forbidden as Forbidden
from .errors import IdempotencyKeyReused as IdempotencyKeyReused
from .errors import Internal as Internal
from .errors import InvalidRequest as InvalidRequest
from .errors import Kind as Kind
from .errors import OutcomeUnknown as OutcomeUnknown
from .errors import Overloaded as Overloaded
from .errors import RemoteError as RemoteError
from .errors import RequestInProgress as RequestInProgress
from .errors import ServiceError as ServiceError
from .errors import StaleVersion as StaleVersion
from .errors import Unauthenticated as Unauthenticated
from .errors import Unavailable as Unavailable
from .messages import MAX_ID as MAX_ID
from .messages import Empty as Empty
from .messages import FrozenMeta as FrozenMeta
from .messages import Message as Message
from .messages import Open as Open
from .operations import DEFAULT_DEADLINE_MS as DEFAULT_DEADLINE_MS
from .operations import DEFAULT_SINGLE_LANES as DEFAULT_SINGLE_LANES
from .operations import BatchOperation as BatchOperation
from .operations import Call as Call
from .operations import Contract as Contract
from .operations import Operation as Operation
from .operations import Retry as Retry
from .operations import SingleOperation as SingleOperation
from .operations import batched as batched
from .operations import single as single
