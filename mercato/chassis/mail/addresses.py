"""E-mail addresses: which are accepted, and when two spellings are one address.

A dot-atom (RFC 5322, RFC 6532), `@`, and a domain name of at least two labels (IDNA 2008): no quoted local part, no
address literal. Letters beyond ASCII are accepted on both sides; invisible characters, and characters that are
equivalent to another letter, on neither. Only sending a letter shows whether the address exists.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

import idna
from email_validator import SPECIAL_USE_DOMAIN_NAMES, EmailNotValidError, ValidatedEmail, validate_email

MAX_LENGTH: Final = 254
"""RFC 5321 4.5.3.1.3: a path of 256 octets, two of them its brackets."""

MAX_LOCAL_PART: Final = 64

# The library refuses names such as shop.test and corp.local, which the mail server of a shop may know. Emptying this
# list is the documented way to accept them.
SPECIAL_USE_DOMAIN_NAMES.clear()

_BEYOND_ASCII: Final = re.compile(r"[^\x00-\x7f]+")


def composed(email: str) -> str:
    """The address as a client wrote it, without spaces around it, composed (NFC)."""
    return unicodedata.normalize("NFC", email.strip())


def canonical(email: str) -> str:
    """The spelling that is stored: the domain in lower case without A-labels, the local part as it was written.

    The canonical spellings of one address differ in case alone. A text that is no address stays as `composed` gives it.
    """
    email = composed(email)
    parsed = _parsed(email)
    return email if isinstance(parsed, str) else parsed.normalized


def spellings(email: str) -> list[str]:
    """The spellings under which the address may be stored, the canonical one first; none that PostgreSQL cannot store.

    Accounts of earlier versions have their address as it was written, also some that are no longer accepted.
    """
    email = composed(email)
    parsed = _parsed(email)
    if isinstance(parsed, str):
        return [email] if email.isprintable() and len(email) <= MAX_LENGTH else []
    with_a_labels = f"{parsed.local_part}@{parsed.ascii_domain}"
    return list(dict.fromkeys((parsed.normalized, email, with_a_labels)))


def on_the_wire(email: str) -> str:
    """The address with its domain in ASCII, as mail servers need it; a text that is no address is unchanged."""
    parsed = _parsed(composed(email))
    return email if isinstance(parsed, str) else f"{parsed.local_part}@{parsed.ascii_domain}"


def problem(email: str) -> str | None:
    """What is wrong with an address, as the end of a sentence; None if it is valid."""
    parsed = _parsed(email)
    return parsed if isinstance(parsed, str) else None


def _parsed(email: str) -> ValidatedEmail | str:
    if len(email) > MAX_LENGTH:
        return f"is longer than {MAX_LENGTH} characters"
    if not email.isprintable() or " " in email:  # of the printable characters, " " is the only space
        return "must not have spaces, control characters or invisible characters"
    local, _, domain = email.partition("@")
    if not local or not domain or "@" in domain:
        return "must look like name@example.com"
    if len(local.encode()) > MAX_LOCAL_PART:
        return f"has more than {MAX_LOCAL_PART} characters before the @"
    try:
        for letters in _BEYOND_ASCII.findall(local.lower()):
            idna.check_label(letters)
        parsed = validate_email(email, check_deliverability=False, globally_deliverable=False)
    except idna.IDNAError:
        return "has a character before the @ that is not taken here"
    except EmailNotValidError:
        is_local = _has_bad_local_part(local)
        return (
            "has a character or a dot before the @ that is not taken here"
            if is_local
            else "must have a domain such as example.com after the @"
        )
    if "." not in parsed.ascii_domain or parsed.ascii_domain.rpartition(".")[2].isdigit():
        return "must have a domain such as example.com after the @"
    if len(parsed.normalized) > MAX_LENGTH:
        return f"is longer than {MAX_LENGTH} characters"
    return parsed


def _has_bad_local_part(local: str) -> bool:
    try:
        validate_email(f"{local}@example.com", check_deliverability=False)
    except EmailNotValidError:
        return True
    return False
