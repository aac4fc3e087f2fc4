"""Errors as `google.rpc.Status`: the code, the sentence, and details that programs read.

    ErrorInfo    `reason` is our code, the same as in problems of the HTTP API; `domain` is `mercato`
    BadRequest   all wrong fields at once, with the names that they have in the message
    RetryInfo    after how long the caller may try again, where the error says so
    RequestInfo  the id of the request and of its trace, for the log
    and the details of the error as a message of the contract, where it has some

gRPC limits the metadata of a client, by default to 8 KiB, and details are sent as metadata: what does not fit into
`DETAILS_BYTES` is left out, the last wrong fields first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo, RetryInfo
from google.rpc.status_pb2 import Status

from mercato.chassis.contract import InvalidRequest, Kind, ServiceError
from mercato.gateway.grpc.codecs import Codecs
from mercato.gateway.headers import RequestHeaders

DOMAIN: Final = "mercato"
DETAILS_KEY: Final = "grpc-status-details-bin"
DETAILS_BYTES: Final = 5_000
"""In base64 nearly 7 kB: the rest of what clients take is for the sentence and other metadata."""
FIELDS_BYTES: Final = 4_000
"""Of them for wrong fields."""
SENTENCE_CHARACTERS: Final = 500

CODE_OF_KIND: Final[Mapping[Kind, grpc.StatusCode]] = {
    Kind.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Kind.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Kind.CONFLICT: grpc.StatusCode.FAILED_PRECONDITION,
    Kind.REFUSED: grpc.StatusCode.FAILED_PRECONDITION,
    Kind.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Kind.FORBIDDEN: grpc.StatusCode.PERMISSION_DENIED,
    Kind.TOO_MANY: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Kind.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Kind.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    Kind.INTERNAL: grpc.StatusCode.INTERNAL,
}

CODE_OF_CODE: Final[Mapping[str, grpc.StatusCode]] = {
    # Where gRPC has a more exact code than that of the kind (google/rpc/code.proto).
    "events.cursor_ahead": grpc.StatusCode.OUT_OF_RANGE,
    "events.cursor_too_old": grpc.StatusCode.OUT_OF_RANGE,
    "idempotency_key_reused": grpc.StatusCode.ALREADY_EXISTS,
    "products.sku_taken": grpc.StatusCode.ALREADY_EXISTS,
    "request_in_progress": grpc.StatusCode.ABORTED,
    "stale_version": grpc.StatusCode.ABORTED,
    "users.email_taken": grpc.StatusCode.ALREADY_EXISTS,
}

SENTENCES: Final[Mapping[str, str]] = {
    # Where the sentence of the error speaks of HTTP.
    "sign_in_first": "This needs a caller who is signed in: call mercato.users.v1.UsersService/SignIn, then send the "
    "metadata authorization: Bearer ACCESS_TOKEN.",
    "idempotency_key_missing": "{operation} needs the field idempotency_key.",
    "idempotency_key_reused": "This idempotency_key was used before with another {what}; use a new key for a new "
    "request.",
    "body_too_large": "The message may have at most {limit_bytes} bytes.",
}


def code_of(error: ServiceError) -> grpc.StatusCode:
    return CODE_OF_CODE.get(error.code) or CODE_OF_KIND[error.kind]


def sentence_of(error: ServiceError) -> str:
    template = SENTENCES.get(error.code)
    sentence = str(error) if template is None else template.format_map(error.sentence_values())
    return sentence[:SENTENCE_CHARACTERS]


def status_of(error: ServiceError, headers: RequestHeaders, codecs: Codecs) -> Status:
    status = Status(code=code_of(error).value[0], message=sentence_of(error))
    _add(status, ErrorInfo(reason=error.code, domain=DOMAIN))
    _add(status, RequestInfo(request_id=headers.request_id, serving_data=headers.trace_id))
    if error.retry_after_s is not None:
        _add(status, RetryInfo(retry_delay=Duration(seconds=error.retry_after_s)))
    if isinstance(error, InvalidRequest):
        _add(status, _bad_request(error))
    elif (codec := codecs.of_error(error)) is not None:
        _add(status, codec.built(error))
    return status


def _bad_request(error: InvalidRequest) -> BadRequest:
    made = BadRequest()
    for wrong in error.errors:
        made.field_violations.add(field=wrong.field, description=wrong.message)
        if made.ByteSize() > FIELDS_BYTES:
            del made.field_violations[-1]
            break
    return made


def _add(status: Status, detail: Any) -> None:
    """Adds a detail, if it fits."""
    if status.ByteSize() + detail.ByteSize() <= DETAILS_BYTES:
        status.details.add().Pack(detail)
