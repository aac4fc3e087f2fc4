"""Letters and their transports: an SMTP server, or a folder on a laptop.

A letter may be delivered twice: the sender tries again if the outcome is unknown. The copies have one Message-ID, by
which mail programs show one of them.
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
import tempfile
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime, parseaddr
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import unquote, urlsplit

import msgspec

from mercato.chassis.observability.clock import Clock

from . import addresses

SEND_SECONDS: Final = 20.0
"""The deadline for one letter, the connection included."""
PORTS: Final = {"smtp": 587, "smtps": 465}
FORM: Final = "folder:/path/of/a/folder, smtp://USER:PASSWORD@HOST:PORT, or smtps://... (TLS from the first byte)"
LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")

_SENDER: Final = re.compile(r"^[^\x00-\x1f\x7f]*\Z")


class Letter(msgspec.Struct, frozen=True):
    id: str
    """Letters, digits and hyphens, the same for each try."""
    to: str
    """An address that `addresses.problem` finds nothing wrong with."""
    subject: str
    text: str


class LetterRefused(Exception):
    """The server permanently rejects this letter: no further try helps. The reason has no text of the letter."""


class LetterDelayed(Exception):
    """The letter may not have been sent; it may be tried again."""


class Sending(Protocol):
    """A transport of letters."""

    async def send(self, letter: Letter) -> None:
        """Returns once the letter has been accepted. Raises `LetterRefused`, `LetterDelayed`."""
        ...


class MailSettingError(ValueError):
    """The end of a sentence that says what is wrong with a setting. It holds no password."""


def sending(setting: str, sender: str, clock: Clock) -> Sending:
    """The transport that a setting names, in one of the forms of `FORM`; `sender` is `NAME <ADDRESS>` or an address.

    Raises `MailSettingError`.
    """
    name, address = parseaddr(sender)
    if not _SENDER.match(sender) or addresses.problem(address):
        raise MailSettingError("its sender is no address such as Shop <shop@example.com>")
    from_ = _address(name, address)
    if setting.startswith("folder:"):
        return _Folder(Path(setting.removeprefix("folder:")), from_, clock)
    try:
        parts = urlsplit(setting)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise MailSettingError(f"is none of {FORM}") from None
    if parts.scheme not in PORTS or not host or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise MailSettingError(f"is none of {FORM}")
    return _Smtp(
        from_,
        clock,
        host=host,
        port=port or PORTS[parts.scheme],
        is_tls=parts.scheme == "smtps",
        user=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
    )


def _address(name: str, email: str) -> Address:
    local, _, domain = addresses.on_the_wire(email).partition("@")
    return Address(name, local, domain)


def _message(letter: Letter, from_: Address, clock: Clock, encoding: str) -> EmailMessage:
    message = EmailMessage(policy=SMTP)
    message["From"] = from_
    message["To"] = _address("", letter.to)
    message["Subject"] = letter.subject
    message["Date"] = format_datetime(clock.now())
    message["Message-ID"] = f"<{letter.id}@{from_.domain}>"
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834: asks for no automatic reply
    message.set_content(letter.text, cte=encoding)
    return message


class _Folder:
    """Writes each letter to a file `ID.eml`, which a mail program opens, and a person can read unchanged."""

    def __init__(self, folder: Path, from_: Address, clock: Clock) -> None:
        self._folder, self._from, self._clock = folder, from_, clock

    async def send(self, letter: Letter) -> None:
        try:
            await asyncio.to_thread(self._write, letter)
        except OSError as error:
            raise LetterDelayed(f"the folder of letters cannot be written to: {error.strerror}") from error

    def _write(self, letter: Letter) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(dir=self._folder, suffix=".part")  # mode 0600: it may hold a link that signs in
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(bytes(_message(letter, self._from, self._clock, "8bit")))
            os.replace(path, self._folder / f"{letter.id}.eml")
        except BaseException:
            os.unlink(path)
            raise


class _Smtp:
    """One connection for each letter, because letters are few. Without TLS only to this machine."""

    def __init__(
        self,
        from_: Address,
        clock: Clock,
        *,
        host: str,
        port: int,
        is_tls: bool,
        user: str | None,
        password: str | None,
    ) -> None:
        self._from, self._clock = from_, clock
        is_local = host in LOOPBACK
        self._options: dict[str, Any] = {
            "hostname": host,
            "port": port,
            "username": user,
            "password": password,
            "use_tls": is_tls,
            # True: a server without STARTTLS gets nothing.
            "start_tls": not (is_tls or is_local),
            "tls_context": ssl.create_default_context(),
            "timeout": SEND_SECONDS,
        }

    async def send(self, letter: Letter) -> None:
        import aiosmtplib  # 0.2 s; most processes send nothing

        message = _message(letter, self._from, self._clock, "quoted-printable")
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await aiosmtplib.send(message, **self._options)
        except aiosmtplib.SMTPRecipientsRefused as error:
            code = error.recipients[0].code
            kind = LetterRefused if code >= 500 else LetterDelayed
            raise kind(f"the server does not take letters for this address ({code})") from error
        except aiosmtplib.SMTPDataError as error:
            kind = LetterRefused if error.code >= 500 else LetterDelayed
            raise kind(f"the server does not take this letter ({error.code})") from error
        except aiosmtplib.SMTPNotSupported as error:
            if not addresses.on_the_wire(letter.to).isascii():
                raise LetterRefused("the server does not take letters beyond ASCII before the @") from error
            raise LetterDelayed("the server lacks what we need of it: TLS, or the way of signing in") from error
        except aiosmtplib.SMTPResponseException as error:  # its text may contain a part of the letter
            raise LetterDelayed(f"the server refuses us ({error.code})") from error
        except (aiosmtplib.SMTPException, OSError, TimeoutError) as error:
            raise LetterDelayed(f"the mail server cannot be reached: {type(error).__name__}") from error
