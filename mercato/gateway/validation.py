"""From bytes to typed input, with every wrong field named at once.

The fast path is one typed decode. Only when it fails is the input checked field by field, because msgspec stops at the
first error.
"""

from __future__ import annotations

import itertools
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, TypeVar, Union, cast, get_args, get_origin
from urllib.parse import parse_qsl

import msgspec

from mercato.chassis.contract import MAX_ID, FieldError, InvalidRequest, ServiceError, checks, explained
from mercato.gateway.asgi import Receive
from mercato.gateway.money import AmountIn, ExactFloat, MoneyIn, currency_errors, decode_amount, exact_float
from mercato.gateway.problems import BodyTooLarge, MalformedJson, RouteNotFound
from mercato.gateway.route import Form, Input

S = TypeVar("S", bound=msgspec.Struct)
T = TypeVar("T")


ERRORS_LIMIT: Final = 50
"""At most so many wrong fields are named; a body of a megabyte can have more."""

QUERY_FIELDS_LIMIT: Final = 50

WHOLE_DIGITS: Final = 20
"""No field takes a whole number with more digits."""


def copier(source: type[msgspec.Struct], target: type[S], *given: str) -> Callable[..., S]:
    """Makes a function that makes a `target` of a `source`. Its arguments: the source, then the fields `given`.

    Fields that both types have are copied, others have their defaults. The function is compiled once, as those of
    dataclasses are: it costs what `target(id=source.id, ...)` costs, a third of what a dict of keywords does.
    """
    copied = [name for name in target.__struct_fields__ if name in source.__struct_fields__ and name not in given]
    unknown = {*given} - {*target.__struct_fields__}
    missing = {field.name for field in msgspec.structs.fields(target) if field.required} - {*copied, *given}
    assert not unknown, f"{target.__name__} has no such field: {unknown}"
    assert not missing, f"{target.__name__} needs {missing}"
    fields = ", ".join([*(f"{name}=source.{name}" for name in copied), *(f"{name}={name}" for name in given)])
    made = eval(f"lambda source, {', '.join(given)}: target({fields})", {"target": target})  # noqa: S307  # names of fields
    return cast(Callable[..., S], made)


class ClientGone(Exception):
    """The client closed the connection before its request was complete, so there is nothing to answer."""


async def read_body(receive: Receive, limit_bytes: int) -> bytes:
    """Raises `ClientGone`, `BodyTooLarge`."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientGone
    body: bytes = message.get("body", b"")
    if message.get("more_body"):
        chunks, size = [body], len(body)
        while message.get("more_body"):
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > limit_bytes:
                break
        body = b"".join(chunks)
    if len(body) > limit_bytes:
        raise BodyTooLarge(limit_bytes=limit_bytes)
    return body


def decode_body(decoder: msgspec.json.Decoder[S], body: bytes) -> S:
    """The typed body. Raises `MalformedJson` with the position, or `InvalidRequest` with all wrong fields."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        try:
            return msgspec.convert(_with_integers(_decode(body)), decoder.type, dec_hook=decode_amount)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # of which ValidationError is one
            raise _explain_body(decoder.type, body, error) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _malformed(body, error) from None
    except RecursionError:
        raise MalformedJson(reason="it is nested too deeply", line=1, column=1, offset=0) from None


def _with_integers(value: Any) -> Any:
    """A decoded body in which 5.0 is 5: for JSON schemas, which describe the API, both are integers."""
    if isinstance(value, ExactFloat):
        whole, _, fraction = value.written.partition(".")
        is_whole = bool(fraction) and not fraction.strip("0") and whole != "-0" and len(whole) <= WHOLE_DIGITS
        return int(whole) if is_whole else value
    if isinstance(value, list):
        return [_with_integers(item) for item in cast(list[Any], value)]
    if isinstance(value, dict):
        return {name: _with_integers(item) for name, item in cast(dict[str, Any], value).items()}
    return value


def members_of(body: bytes) -> Mapping[str, Any]:
    """The members of a body that is a JSON object; empty for any other body."""
    try:
        value = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return cast(Mapping[str, Any], value) if isinstance(value, dict) else {}


def form_of(forms: Sequence[tuple[Form, T]], body: bytes) -> T | None:
    """That of the form in which a body is, where it is not in the route's own."""
    if not forms:
        return None
    members = members_of(body)
    return next((bound for form, bound in forms if form.is_body and form.is_body(members)), None)


def form_of_path(forms: Sequence[tuple[Form, T]], parts: Mapping[str, str]) -> T | None:
    """That of the form whose path has texts where the route has numbers."""
    if all(text.isascii() and text.isdigit() for text in parts.values()):
        return None
    return next((bound for form, bound in forms if form.is_body is None), None)


def decode_query(model: type[S], query: bytes) -> S:
    """The typed query parameters. Raises `InvalidRequest` for wrong, unknown and repeated ones."""
    try:
        pairs = parse_qsl(
            query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=QUERY_FIELDS_LIMIT
        )
    except ValueError:
        raise invalid(("?", "the query string is not valid, or has too many parameters")) from None
    given: dict[str, str] = {}
    repeated = [name for name, _ in pairs if name in given or given.update({name: ""})]
    given.update(pairs)
    errors = [FieldError(field=f"?{name}", message="is given more than once") for name in repeated]
    try:
        asked = msgspec.convert(given, model, strict=False, dec_hook=decode_amount)
    except msgspec.ValidationError:
        found = wrong_fields(model, given, "", strict=False)
        errors += [FieldError(field=f"?{e.field}", message=e.message) for e in found]
    else:
        errors += _stretched(asked, given)
        if not errors:
            return asked
    raise InvalidRequest(errors=tuple(errors))


def _stretched(asked: msgspec.Struct, given: Mapping[str, str]) -> list[FieldError]:
    """Texts that msgspec accepts and this refuses: `null` would mean no filter, `1e2` a hundred."""
    errors: list[FieldError] = []
    for name, text in given.items():
        value = getattr(asked, name)
        if value is None or (isinstance(value, int) and not _INTEGER.match(text)):
            message = "must be a whole number" if isinstance(value, int) else "must not be null; leave it out"
            errors.append(FieldError(field=f"?{name}", message=message))
    return errors


_INTEGER: Final = re.compile(r"-?[0-9]+\Z")


def invalid(*errors: tuple[str, str]) -> InvalidRequest:
    """An `InvalidRequest` of pairs of field and message."""
    return InvalidRequest(errors=tuple(FieldError(field=field, message=message) for field, message in errors))


def refuse_wrong(errors: Sequence[FieldError]) -> None:
    """Raises `InvalidRequest` where there are errors."""
    if errors:
        raise InvalidRequest(errors=tuple(errors))


def all_wrong(errors: Sequence[FieldError], *checks: Callable[[], object]) -> InvalidRequest:
    """One error that has `errors` and those that `checks` raise."""
    found = list(errors)
    for check in checks:
        try:
            check()
        except InvalidRequest as error:
            found += error.errors
        except ServiceError:  # of another kind: it matters only for a valid request
            pass
    return InvalidRequest(errors=tuple(found[:ERRORS_LIMIT]))


# -------------------------------------------------------------------------------------------------------- the path


def texts_of(parts: Mapping[str, str], kinds: Mapping[str, Any]) -> Mapping[str, str]:
    """The parameters of a path that are texts. Raises `InvalidRequest`."""
    for name, text in parts.items():
        try:
            msgspec.convert(text, kinds[name])
        except msgspec.ValidationError as error:
            raise invalid((f"path {name}", _message(error, kinds[name]))) from None
    return parts


def numbers_of(parts: Mapping[str, str], path: str) -> Mapping[str, int]:
    """The parameters of a path that are ids. Raises `InvalidRequest`, and `RouteNotFound` for an impossible id."""
    numbers: dict[str, int] = {}
    errors: list[FieldError] = []
    for name, text in parts.items():
        if text.isascii() and text.isdigit():
            numbers[name] = int(text) if len(text) <= MAX_ID_DIGITS else MAX_ID + 1
        else:
            errors.append(FieldError(field=f"path {name}", message="is not a number"))
    if errors:
        raise InvalidRequest(errors=tuple(errors))
    # A number that no id can be is not a malformed request: it is not found.
    if not all(1 <= number <= MAX_ID for number in numbers.values()):
        raise RouteNotFound(path=path)
    return numbers


MAX_ID_DIGITS: Final = len(str(MAX_ID))


# ---------------------------------------------------------------------------------------------------- wrong fields


def wrong_fields(model: Any, value: Any, path: str, *, strict: bool = True) -> list[FieldError]:
    """Every field of `value` that does not fit `model`, at most `ERRORS_LIMIT` of them, in the order of the model."""
    return list(itertools.islice(_wrong(model, value, path, strict), ERRORS_LIMIT))


def _wrong(model: Any, value: Any, path: str, strict: bool) -> Iterator[FieldError]:
    try:
        fitting = msgspec.convert(value, model, strict=strict, dec_hook=decode_amount)
    except msgspec.ValidationError as error:
        message = _message(error, model)
    else:
        yield from _check(model, fitting, path)
        return
    model = _without_none(model)
    model = MoneyIn if model is AmountIn and isinstance(value, Mapping) else model
    if _is_struct(model) and isinstance(value, Mapping):
        yield from _wrong_in_struct(model, cast(Mapping[str, Any], value), path, strict)
    elif (item := _item_type(model)) is not None and isinstance(value, Sequence) and not isinstance(value, str):
        elements = enumerate(cast(Sequence[Any], value))
        found = (error for i, element in elements for error in _wrong(item, element, f"{path}[{i}]", strict))
        # Where each element fits, the length is wrong.
        yield next(found, FieldError(field=path, message=message))
        yield from found
    else:
        known = get_args(model) if get_origin(model) is Literal else ()
        message = f"must be one of {', '.join(map(str, known))}" if known and isinstance(value, str) else message
        yield FieldError(field=path or "body", message=message)


def _check(model: Any, value: Any, path: str) -> Iterator[FieldError]:
    """Errors that only the service would find in a value of the right type: reported with the other errors."""
    if value is None:
        return
    for check in checks(model):
        if message := check(value):
            yield FieldError(field=path, message=message)
    if isinstance(value, AmountIn):
        yield from currency_errors(f"{path}.currency", value.currency)


def _wrong_in_struct(
    model: type[msgspec.Struct], value: Mapping[str, Any], path: str, strict: bool
) -> Iterator[FieldError]:
    dot = f"{path}." if path else ""
    fields = msgspec.structs.fields(model)
    for field in fields:
        if field.encode_name in value:
            yield from _wrong(field.type, value[field.encode_name], dot + field.encode_name, strict)
        elif field.required:
            yield FieldError(field=dot + field.encode_name, message="is missing")
    known = {field.encode_name for field in fields}
    if issubclass(model, Input):
        given = {name for name, member in value.items() if member is not None}
        for name, message in model.wrong_members(given):
            yield FieldError(field=dot + name, message=message)
    for name in value:
        if name not in known:
            yield FieldError(field=_shortened(dot + name), message="is not a known field")


def _is_struct(model: Any) -> bool:
    return isinstance(model, type) and issubclass(model, msgspec.Struct)


def _without_none(model: Any) -> Any:
    """`X` for `X | None` and for an annotated `X`."""
    while hasattr(model, "__metadata__"):
        model = model.__origin__
    if get_origin(model) in (Union, types.UnionType):
        options = [option for option in get_args(model) if option is not type(None)]
        if len(options) == 1:
            return _without_none(options[0])
    return model


def _item_type(model: Any) -> Any:
    """`X` for `tuple[X, ...]`."""
    return get_args(model)[0] if get_origin(model) is tuple else None


_PLACE: Final = re.compile(r" - at `\$\.?([^`]*)`\Z")


def _place(error: msgspec.ValidationError) -> str:
    found = _PLACE.search(str(error))
    return (found and found[1]) or "body"


def _message(error: msgspec.ValidationError, model: Any = None) -> str:
    return explained(_PLACE.sub("", str(error)), model)


def _shortened(name: str) -> str:
    return name if len(name) <= 100 else name[:100] + "..."


# -------------------------------------------------------------------------------------------------------- wrong JSON


_decode: Final = msgspec.json.Decoder(float_hook=exact_float).decode


def decoder(model: type[S]) -> msgspec.json.Decoder[S]:
    """The decoder of a route's bodies."""
    return msgspec.json.Decoder(model, dec_hook=decode_amount, float_hook=exact_float)


def _explain_body(model: Any, body: bytes, error: msgspec.ValidationError) -> Exception:
    try:
        value = _with_integers(_decode(body))
    except msgspec.ValidationError:
        # A number that only a decimal can hold. The error of the typed decode names the first wrong field.
        return InvalidRequest(errors=(FieldError(field=_place(error), message=_message(error)),))
    except (msgspec.DecodeError, UnicodeDecodeError) as broken:
        # The typed decode stopped at a wrong field; the rest of the body is not JSON.
        return _malformed(body, broken)
    except RecursionError:
        return MalformedJson(reason="it is nested too deeply", line=1, column=1, offset=0)
    errors = wrong_fields(model, value, "") or [FieldError(field="body", message=_message(error))]
    return InvalidRequest(errors=tuple(errors))


_BYTE: Final = re.compile(r"^JSON is malformed: (.*) \(byte (\d+)\)\Z")


def _malformed(body: bytes, error: Exception) -> MalformedJson:
    if not body:
        return MalformedJson(reason="it is empty", line=1, column=1, offset=0)
    found = _BYTE.match(str(error))
    if isinstance(error, UnicodeDecodeError):
        reason, offset = "it is not UTF-8", _first_bad_byte(body)
    elif found:
        reason, offset = found[1], int(found[2])
    else:
        reason, offset = "it ends too early", len(body)
    before = body[:offset]
    line = before.count(b"\n") + 1
    column = len(before) - (before.rfind(b"\n") + 1) + 1
    return MalformedJson(reason=reason, line=line, column=column, offset=offset)


def _first_bad_byte(body: bytes) -> int:
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return error.start
    return 0


def reworded(error: InvalidRequest, named: Mapping[str, str]) -> InvalidRequest:
    """The error with the API's names of the fields."""
    errors = (FieldError(field=named.get(e.field, e.field), message=e.message) for e in error.errors)
    return InvalidRequest(errors=tuple(errors))
