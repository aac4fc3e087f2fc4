"""Letters of the users service: written in the transaction of their change, sent after its commit.

A link has the letter's random id and an HMAC of it. No secret is stored: a letter's text is made when it is sent.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import hashlib
import hmac
import itertools
import uuid
from collections.abc import Mapping
from typing import Final, Literal

import msgspec
import structlog

from mercato.chassis.mail.letters import Letter, LetterDelayed, LetterRefused, Sending
from mercato.chassis.observability import faults
from mercato.chassis.observability.clock import Randomness
from mercato.chassis.observability.telemetry import Telemetry
from mercato.chassis.postgres.database import Database, Tx

from . import letter_store as store

KEY_PURPOSE: Final = "users/letter-link/1"
"""The number allows a change of the key."""

Kind = Literal["proof", "reset"]
OUTCOMES: Final = ("sent", "delayed", "refused", "given_up")
"""How a try to send a letter ends."""

SENT_AT_ONCE: Final = 10
LEASE: Final = datetime.timedelta(minutes=5)
"""For all letters of a batch, one after the other. After it, other processes send the letters of one that ended."""
FIRST_PAUSE: Final = datetime.timedelta(seconds=10)
LONGEST_PAUSE: Final = datetime.timedelta(minutes=15)
LETTERS_LIMIT: Final = 3
LETTERS_WITHIN: Final = datetime.timedelta(hours=1)
"""An address gets at most `LETTERS_LIMIT` letters of a kind in this time, from all clients together."""

ID_BYTES: Final = 16

log = structlog.stdlib.get_logger("mercato.users")

faults.declare("users.letters.after_send")


class KindOfLetter(msgspec.Struct, frozen=True):
    subject: str
    path: str
    """After the address of the shop; the token follows after a `#`, which browsers do not send to servers."""
    life: datetime.timedelta
    text: str


KINDS: Final[Mapping[Kind, KindOfLetter]] = {
    "proof": KindOfLetter(
        "Confirm your e-mail address",
        "/account/email",
        datetime.timedelta(days=7),
        "Hello {name},\n\nthis address was given for an account. Open this link to confirm that it is yours:\n\n"
        "{link}\n\nIt can be used within 7 days. If you know of no account, you need not do anything.\n",
    ),
    "reset": KindOfLetter(
        "Your new password",
        "/account/password",
        datetime.timedelta(hours=1),
        "Hello {name},\n\na new password was asked for. Open this link to set one:\n\n{link}\n\n"
        "It can be used once, within an hour. If you did not ask for it, you need not do anything: nothing changes.\n",
    ),
}


class Letters:
    """Writes and sends letters. `sending` None: they wait. `address`: that of the shop, without a slash at its end."""

    def __init__(
        self,
        database: Database,
        key: bytes,
        sending: Sending | None,
        address: str,
        randomness: Randomness,
        telemetry: Telemetry,
    ) -> None:
        self._database = database
        self._key = key
        self._sending = sending
        self._address = address
        self._randomness = randomness
        self._outcomes = telemetry.counter(
            "mercato_users_letters", "Tries to send a letter, by how they ended.", ["kind", "outcome"]
        )
        # From the start, with 0: of a series that begins with 1, Prometheus sees no increase.
        for kind, outcome in itertools.product(KINDS, OUTCOMES):
            self._outcomes.labels(kind, outcome)

    async def add(self, tx: Tx, kind: Kind, address: str, user_id: int | None) -> None:
        """Writes a letter, which is sent after the commit, unless the address has reached its limit."""
        letter_id = uuid.UUID(bytes=self._randomness.token(ID_BYTES), version=4)
        await store.add_letter(tx, letter_id, kind, address, user_id, LETTERS_WITHIN, LETTERS_LIMIT)

    def letter_of(self, token: str, kind: Kind) -> uuid.UUID | None:
        """The letter whose link has the token; None for a token that this service has not made."""
        try:
            raw = base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True)
        except (ValueError, binascii.Error):
            return None
        letter_id = raw[:ID_BYTES]
        if len(letter_id) != ID_BYTES or not hmac.compare_digest(raw, self._raw_token(letter_id, kind)):
            return None
        return uuid.UUID(bytes=letter_id)

    def token(self, letter_id: uuid.UUID, kind: Kind) -> str:
        return base64.urlsafe_b64encode(self._raw_token(letter_id.bytes, kind)).decode()

    def _raw_token(self, letter_id: bytes, kind: Kind) -> bytes:
        return letter_id + hmac.digest(self._key, kind.encode() + b"/" + letter_id, hashlib.sha256)

    async def send_due(self) -> int:
        """Sends up to `SENT_AT_ONCE` letters that are due; gives how many."""
        if self._sending is None:
            return 0
        async with self._database.transaction() as tx:
            due = await store.claim_due(tx, SENT_AT_ONCE, LEASE)
        for row in due:
            await self._send(self._sending, row)
        return len(due)

    async def _send(self, sending: Sending, row: store.LetterRow) -> None:
        kind: Kind = "reset" if row.kind == "reset" else "proof"
        texts = KINDS[kind]
        link = f"{self._address}{texts.path}#{self.token(row.id, kind)}"
        letter = Letter(str(row.id), row.address, texts.subject, texts.text.format(name=row.name, link=link))
        try:
            await sending.send(letter)
        except LetterRefused as error:
            await self._settle(row, "refused", str(error))
        except LetterDelayed as error:
            await self._delay(row, str(error))
        else:
            await faults.point("users.letters.after_send")
            await self._settle(row, "sent")

    async def _settle(self, row: store.LetterRow, outcome: str, reason: str = "") -> None:
        self._outcomes.labels(row.kind, outcome).inc()
        if reason:
            log.warning("letter_not_sent", letter=str(row.id), user_id=row.user_id, outcome=outcome, reason=reason)
        async with self._database.transaction() as tx:
            await store.settle(tx, row.id, outcome)

    async def _delay(self, row: store.LetterRow, reason: str) -> None:
        """Schedules another attempt, after a pause that doubles each time, until the link has expired."""
        if row.age > KINDS["reset" if row.kind == "reset" else "proof"].life:
            await self._settle(row, "given_up", reason)
            return
        self._outcomes.labels(row.kind, "delayed").inc()
        log.warning("letter_delayed", letter=str(row.id), user_id=row.user_id, tries=row.tries, reason=reason)
        async with self._database.transaction() as tx:
            await store.delay(tx, row.id, min(FIRST_PAUSE * 2 ** min(row.tries - 1, 10), LONGEST_PAUSE))
