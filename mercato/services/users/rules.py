"""The rules for the fields of accounts, and which actors may see and change them. Pure: no I/O, no clock.

Texts are checked in their stored form: `addresses.canonical`, `stored_name`, `stored_password`. Each `*_problem` is a
sentence about what is wrong, or None.
"""

from __future__ import annotations

import datetime
import unicodedata
from collections.abc import Sequence
from typing import Any, Final, Protocol

from mercato.chassis.contract import ANONYMOUS_ACTOR, Actor, FieldError, Forbidden, Operation
from mercato.chassis.mail import addresses
from mercato.contracts.roles import CUSTOMER, STAFF
from mercato.contracts.users import MIN_PASSWORD, UserNotFound

SESSION_LENGTH: Final = datetime.timedelta(days=30)
"""From the sign-in; a refresh does not extend it, so that a stolen session ends."""

REPEATED_WITHIN: Final = datetime.timedelta(seconds=30)
"""So long after its use a refresh token may be sent again, by a client that got no answer or sent it twice."""

SESSION_KEPT: Final = datetime.timedelta(days=7)
"""How long an ended session is kept, for investigations."""

ENDED_KEPT: Final = datetime.timedelta(minutes=20)
"""How long the log of ended sessions keeps an entry: the life of access tokens (15 minutes), and a margin."""

MAX_NAME: Final = 200
MAX_PASSWORD: Final = 256

# The passwords of at least ten characters at the top of lists of leaked passwords. Shorter ones are refused anyway.
COMMONEST_PASSWORDS: Final = frozenset(
    {
        "0123456789",
        "0987654321",
        "1122334455",
        "123123123123",
        "1234567890",
        "12345678900",
        "12345678910",
        "123456789a",
        "1234567891",
        "1q2w3e4r5t",
        "1q2w3e4r5t6y",
        "1qaz2wsx3edc",
        "9876543210",
        "abcdefghij",
        "administrator",
        "asdfghjkl1",
        "asdfghjkl;",
        "changeme123",
        "football123",
        "iloveyou123",
        "letmein1234",
        "password12",
        "password123",
        "password1234",
        "password12345",
        "passwordpassword",
        "q1w2e3r4t5",
        "q1w2e3r4t5y6",
        "qazwsxedcrfv",
        "qwerty1234",
        "qwerty12345",
        "qwerty123456",
        "qwertyuiop",
        "qwertyuiop123",
        "unknown123",
        "welcome123",
        "zaq12wsxcde3",
    }
)


def is_replaced(position: int, session_id: str | None, last: int, kept: str | None) -> bool:
    """Whether the log of ended sessions was replaced since its reader read `session_id` at `position`.

    `last` is the last position of this log, and `kept` its entry at the reader's position, None where it was deleted.
    """
    return position > last or (kept is not None and kept != session_id)


class HasRole(Protocol):
    """An account with its role."""

    @property
    def id(self) -> int: ...

    @property
    def role(self) -> str: ...


def role_of(accounts: Sequence[HasRole], user_id: int) -> str:
    return next((account.role for account in accounts if account.id == user_id), ANONYMOUS_ACTOR.role)


def check_staff(accounts: Sequence[HasRole], actor: Actor, operation: Operation[Any, Any]) -> None:
    """Raises `Forbidden` where the account of `actor`, among the read or locked `accounts`, is not staff."""
    if (role := role_of(accounts, actor.id)) != STAFF:
        raise Forbidden(operation=operation.full_name, role=role)


def check_oneself(actor: Actor, user_id: int, operation: Operation[Any, Any]) -> None:
    """Raises `UserNotFound` or `Forbidden` where an account is not the actor's own."""
    if actor.role == CUSTOMER and actor.id != user_id:
        raise UserNotFound(user_id=user_id)
    if actor.id != user_id:
        raise Forbidden(operation=operation.full_name, role=actor.role)


# ---------------------------------------------------------------------------------------------------------- the texts


def stored_name(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip())


def stored_password(password: str) -> str:
    """Composed (NFC, RFC 8265 4.2), so that it is the same from every keyboard. Spaces count."""
    return unicodedata.normalize("NFC", password)


def account_errors(
    *, email: str | None = None, name: str | None = None, password: str | None = None
) -> tuple[FieldError, ...]:
    """All errors of the given fields; the password is checked together with the e-mail address."""
    problems = {
        "email": None if email is None else addresses.problem(email),
        "name": None if name is None else name_problem(name),
        "password": None if password is None else password_problem(password, email or ""),
    }
    return tuple(FieldError(field=field, message=problem) for field, problem in problems.items() if problem)


def name_problem(name: str) -> str | None:
    if len(name) > MAX_NAME:
        return f"is longer than {MAX_NAME} characters"
    if _has_control(name):
        return "must not have control characters or line breaks"
    if not any(c.isprintable() and not c.isspace() for c in name):
        return "must not be blank"
    return None


def password_problem(password: str, email: str) -> str | None:
    """All problems at once. `email`: the address of the account."""
    if _has_control(password):
        return "must not have control characters"
    reasons = tuple(_weaknesses(password, email))
    return "; ".join(reasons) or None


def _weaknesses(password: str, email: str) -> list[str]:
    folded, whose = password.casefold(), email.casefold()
    weaknesses = {
        f"must have at least {MIN_PASSWORD} characters": len(password) < MIN_PASSWORD,
        f"must have at most {MAX_PASSWORD} characters": len(password) > MAX_PASSWORD,
        "must not be one character repeated": len(set(folded)) == 1,
        "must not be the e-mail address or its first part": bool(whose) and folded in (whose, whose.partition("@")[0]),
        "is one of the commonest passwords": folded in COMMONEST_PASSWORDS,
    }
    return [reason for reason, holds in weaknesses.items() if holds]


def _has_control(text: str) -> bool:
    """True for control characters, lone surrogates (neither can be stored as text) and line separators."""
    return any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)
