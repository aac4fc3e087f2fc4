"""The ways on which letters leave: a folder, and a real SMTP server on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import email
import email.policy
import os
import stat
from collections.abc import AsyncGenerator
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, Session

from mercato.chassis.mail.letters import (
    Letter,
    LetterDelayed,
    LetterRefused,
    MailSettingError,
    Sending,
    sending,
)
from mercato.chassis.observability.clock import SystemClock

SENDER = "Shop <shop@example.com>"
LETTER = Letter("3f0c", "carol@example.com", "Grüße", "Hello Carol,\n\n.\nhttps://shop.example/x#abc\n")


def read(raw: bytes) -> EmailMessage:
    message = email.message_from_bytes(raw, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    return message


class Received:
    """Takes letters, or answers as a test wants."""

    def __init__(self) -> None:
        self.letters: list[bytes] = []
        self.recipients: list[str] = []
        self.rcpt = "250 OK"
        self.data = "250 OK"
        self.signed_in: list[tuple[bytes, bytes]] = []

    async def handle_RCPT(  # noqa: N802  # the library looks for this name
        self, _server: SMTP, _session: Session, envelope: Envelope, address: str, _options: Any
    ) -> str:
        if self.rcpt.startswith("250"):
            envelope.rcpt_tos.append(address)
            self.recipients.append(address)
        return self.rcpt

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802
        if self.data.startswith("250"):
            assert isinstance(envelope.content, bytes)
            self.letters.append(envelope.content)
        return self.data

    def authenticate(self, _server: SMTP, _session: Session, _envelope: Envelope, _how: str, data: Any) -> AuthResult:
        self.signed_in.append((data.login, data.password))
        return AuthResult(success=data.password == b"p:w/d", handled=False)  # the server says 535


@contextlib.asynccontextmanager
async def serving(received: Received, host: str = "127.0.0.1", **options: Any) -> AsyncGenerator[int]:
    """The port of a server that hands what it takes to `received`."""

    wanted: dict[str, Any] = {"enable_SMTPUTF8": True, "auth_require_tls": False, **options}

    def make() -> SMTP:
        return SMTP(received, **wanted)

    server = await asyncio.get_running_loop().create_server(make, host, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def way(setting: str) -> Sending:
    return sending(setting, SENDER, SystemClock())


async def test_a_folder_gets_a_file_that_its_owner_alone_reads(tmp_path: Path):
    folder = tmp_path / "mail"
    await way(f"folder:{folder}").send(LETTER)
    await way(f"folder:{folder}").send(LETTER)

    assert os.listdir(folder) == ["3f0c.eml"]
    assert stat.S_IMODE((folder / "3f0c.eml").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    message = read((folder / "3f0c.eml").read_bytes())
    assert (message["To"], message["From"], message["Subject"]) == (LETTER.to, SENDER, LETTER.subject)
    assert message["Message-ID"] == "<3f0c@example.com>"
    assert LETTER.text.replace("\n", "\r\n").encode() in (folder / "3f0c.eml").read_bytes(), "read as it is"
    assert message.get_content().replace("\r\n", "\n") == LETTER.text


async def test_a_folder_that_cannot_be_written_to_delays_a_letter(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(LetterDelayed, match="cannot be written to"):
        await way(f"folder:{tmp_path}/file/mail").send(LETTER)


async def test_a_server_takes_a_letter():
    received = Received()
    async with serving(received) as port:
        await way(f"smtp://127.0.0.1:{port}").send(LETTER)

    [raw] = received.letters
    message = read(raw)
    assert (message["Subject"], message["Auto-Submitted"]) == (LETTER.subject, "auto-generated")
    assert message.get_content().replace("\r\n", "\n") == LETTER.text


async def test_the_domain_travels_in_ascii():
    received = Received()
    async with serving(received) as port:
        await way(f"smtp://127.0.0.1:{port}").send(Letter("1", "carol@münchen.de", "s", "t"))
        await way(f"smtp://127.0.0.1:{port}").send(Letter("2", "jürgen@münchen.de", "s", "t"))
    assert received.recipients == ["carol@xn--mnchen-3ya.de", "jürgen@xn--mnchen-3ya.de"]


async def test_letters_beyond_ascii_before_the_at_sign_need_a_server_that_knows_them():
    async with serving(Received(), enable_SMTPUTF8=False) as port:
        with pytest.raises(LetterRefused, match="beyond ASCII"):
            await way(f"smtp://127.0.0.1:{port}").send(Letter("2", "jürgen@example.com", "s", "t"))


@pytest.mark.parametrize("step", ["rcpt", "data"])
@pytest.mark.parametrize(
    ("answer", "kind"), [("550 no carol@example.com here", LetterRefused), ("451 later", LetterDelayed)]
)
async def test_a_refusal_is_for_good_or_for_now_as_the_server_says(step: str, answer: str, kind: type[Exception]):
    received = Received()
    setattr(received, step, answer)
    async with serving(received) as port:
        with pytest.raises(kind) as refused:
            await way(f"smtp://127.0.0.1:{port}").send(LETTER)
    assert "carol" not in str(refused.value)
    assert received.letters == []


async def test_a_server_that_is_away_delays_a_letter():
    async with serving(Received()) as port:
        pass
    with pytest.raises(LetterDelayed, match="cannot be reached"):
        await way(f"smtp://127.0.0.1:{port}").send(LETTER)


@pytest.mark.filterwarnings("ignore:Requiring AUTH")
async def test_user_and_password_are_percent_encoded():
    received = Received()
    async with serving(received, authenticator=received.authenticate, auth_required=True) as port:
        await way(f"smtp://shop%40x:p%3Aw%2Fd@127.0.0.1:{port}").send(LETTER)
        assert received.signed_in == [(b"shop@x", b"p:w/d")]
        with pytest.raises(LetterDelayed) as refused:
            await way(f"smtp://shop:secret-word@127.0.0.1:{port}").send(LETTER)
    assert "secret-word" not in str(refused.value)
    assert len(received.letters) == 1


async def test_off_this_machine_nothing_is_sent_without_tls():
    """127.0.0.2 is this machine, and not one of the addresses that count as it."""
    received = Received()
    async with serving(received, "127.0.0.2") as port:
        with pytest.raises(LetterDelayed):
            await way(f"smtp://shop:secret@127.0.0.2:{port}").send(LETTER)
    assert (received.letters, received.signed_in) == ([], [])


@pytest.mark.parametrize("setting", ["", "smtp:", "http://example.com", "smtp://host:port", "smtp://host/path", "host"])
def test_a_wrong_setting_is_explained_without_its_password(setting: str):
    with pytest.raises(MailSettingError, match="smtp://USER"):
        way(setting)
    with pytest.raises(MailSettingError) as refused:
        way("smtp://shop:geheim@host:port")
    assert "geheim" not in str(refused.value)


@pytest.mark.parametrize("sender", ["", "Shop", "Shop <shop>", "a@example.com\r\nBcc: b@example.com"])
def test_a_wrong_sender_is_refused(sender: str):
    with pytest.raises(MailSettingError, match="sender"):
        sending("folder:/tmp/x", sender, SystemClock())
