"""Letters with links: proving an address, and setting a password that was forgotten."""

from __future__ import annotations

import asyncio
import email
import email.policy
import re
from collections.abc import AsyncGenerator
from email.message import EmailMessage
from pathlib import Path

import pytest
import pytest_asyncio

from mercato.chassis.contract import Actor, Internal, InvalidRequest
from mercato.chassis.hosting.options import OptionError
from mercato.contracts.users import (
    ForgotPassword,
    GetUser,
    LinkNotValid,
    ProveEmail,
    Refresh,
    Register,
    ResetPassword,
    SendProof,
    SessionEnded,
    SignIn,
    UpdateProfile,
    User,
    UserNotFound,
    Users,
    WrongCredentials,
)
from mercato.services.users.app import build
from mercato.services.users.letters import KINDS, LETTERS_LIMIT, OUTCOMES
from mercato.testing.harness import ServiceHarness
from mercato.testing.injection import Inject, fail
from mercato.testing.waiting import until, until_true

ANONYMOUS = Actor("anonymous")
EMAIL = "alice@example.com"
PASSWORD = "correct horse"
NEW_PASSWORD = "battery staple"
ADDRESS = "https://shop.example"


class Mailbox:
    """The folder that letters are put into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def letters(self, subject: str) -> list[EmailMessage]:
        found: list[EmailMessage] = []
        for file in self.folder.glob("*.eml"):
            message = email.message_from_bytes(file.read_bytes(), policy=email.policy.default)
            assert isinstance(message, EmailMessage)
            found += [message] if subject in message["Subject"] else []
        return found

    async def token(self, subject: str, path: str) -> str:
        """Of the link in the one letter with this subject, once it is there."""
        await until_true(lambda: self.letters(subject))
        [letter] = self.letters(subject)
        found = re.search(rf"{ADDRESS}{path}#([A-Za-z0-9_=-]+)", letter.get_content())
        assert found, letter.get_content()
        return found[1]

    async def proof(self) -> str:
        return await self.token("Confirm", "/account/email")

    async def reset(self) -> str:
        return await self.token("password", "/account/password")


@pytest.fixture
def mailbox(tmp_path: Path) -> Mailbox:
    return Mailbox(tmp_path / "mail")


@pytest_asyncio.fixture
async def posting(harness: ServiceHarness, mailbox: Mailbox) -> AsyncGenerator[Users]:
    """The client of a users service that sends its letters into the mailbox."""
    harness.configure(users_mail=f"folder:{mailbox.folder}", users_address=ADDRESS + "/")
    yield (await harness.open({"users": build})).client(Users)


async def registered(harness: ServiceHarness, users: Users, address: str = EMAIL) -> User:
    with harness.acting(ANONYMOUS):
        return await users.register(Register(email=address, name="Alice", password=PASSWORD))


# -------------------------------------------------------------------------------------------------- proving an address


async def test_an_address_is_proven_by_the_link_that_was_sent_to_it(
    harness: ServiceHarness, posting: Users, mailbox: Mailbox
):
    alice = await registered(harness, posting)
    assert alice.email_proven is False
    token = await mailbox.proof()
    for _ in range(2):  # a client that lost the answer asks again
        with harness.acting(ANONYMOUS):
            await posting.prove_email(ProveEmail(token=token))
    with harness.acting(Actor("customer", alice.id)):
        assert (await posting.get(GetUser(id=alice.id))).email_proven is True


async def test_an_address_that_was_changed_is_not_proven_by_the_old_one(
    harness: ServiceHarness, posting: Users, mailbox: Mailbox
):
    alice = await registered(harness, posting)
    token = await mailbox.proof()
    with harness.acting(ANONYMOUS):
        await posting.prove_email(ProveEmail(token=token))
    with harness.acting(Actor("customer", alice.id)):
        renamed = await posting.update_profile(
            UpdateProfile(id=alice.id, name="Al", email="ALICE@example.com", current_password=PASSWORD)
        )
        assert renamed.email_proven is True
        moved = await posting.update_profile(
            UpdateProfile(id=alice.id, email="al@example.com", current_password=PASSWORD)
        )
    assert moved.email_proven is False
    with harness.acting(ANONYMOUS), pytest.raises(LinkNotValid):
        await posting.prove_email(ProveEmail(token=token))
    await until_true(lambda: {"al@example.com", EMAIL} == {letter["To"] for letter in mailbox.letters("Confirm")})


async def test_another_proof_is_sent_to_its_owner_alone(harness: ServiceHarness, posting: Users, mailbox: Mailbox):
    alice = await registered(harness, posting)
    with harness.acting(Actor("customer", alice.id + 1)), pytest.raises(UserNotFound):
        await posting.send_proof(SendProof(id=alice.id))
    with harness.acting(Actor("customer", alice.id)):
        await posting.send_proof(SendProof(id=alice.id))
    await until_true(lambda: len(mailbox.letters("Confirm")) == 2)


# ------------------------------------------------------------------------------------------------ a forgotten password


async def test_a_forgotten_password_is_set_by_a_link_and_ends_every_session(
    harness: ServiceHarness, posting: Users, mailbox: Mailbox
):
    alice = await registered(harness, posting)
    with harness.acting(ANONYMOUS):
        tokens = await posting.sign_in(SignIn(email=EMAIL, password=PASSWORD))
        await posting.forgot_password(ForgotPassword(email="ALICE@Example.com"))
        reset = ResetPassword(token=await mailbox.reset(), new_password=NEW_PASSWORD)
        await posting.reset_password(reset)

        with pytest.raises(WrongCredentials):
            await posting.sign_in(SignIn(email=EMAIL, password=PASSWORD))
        with pytest.raises(SessionEnded):
            await posting.refresh(Refresh(refresh_token=tokens.refresh_token))
        signed_in = await posting.sign_in(SignIn(email=EMAIL, password=NEW_PASSWORD))
    assert (signed_in.user.id, signed_in.user.email_proven) == (alice.id, True)


async def test_a_link_sets_one_password_and_the_same_one_again(
    harness: ServiceHarness, posting: Users, mailbox: Mailbox
):
    await registered(harness, posting)
    with harness.acting(ANONYMOUS):
        await posting.forgot_password(ForgotPassword(email=EMAIL))
        token = await mailbox.reset()
        with pytest.raises(InvalidRequest):
            await posting.reset_password(ResetPassword(token=token, new_password="short"))
        await posting.reset_password(ResetPassword(token=token, new_password=NEW_PASSWORD))
        await posting.reset_password(ResetPassword(token=token, new_password=NEW_PASSWORD))
        with pytest.raises(LinkNotValid):
            await posting.reset_password(ResetPassword(token=token, new_password="another password"))
        await posting.sign_in(SignIn(email=EMAIL, password=NEW_PASSWORD))
    logged = "SELECT detail FROM security_log WHERE kind = 'password_changed'"
    assert await harness.values(logged, of="users") == ["by letter"]


async def test_of_two_passwords_that_are_set_at_once_by_a_link_one_holds(
    harness: ServiceHarness, posting: Users, mailbox: Mailbox
):
    await registered(harness, posting)
    passwords = ["first password", "second password"]
    with harness.acting(ANONYMOUS):
        await posting.forgot_password(ForgotPassword(email=EMAIL))
        token = await mailbox.reset()
        outcomes = await asyncio.gather(
            *(posting.reset_password(ResetPassword(token=token, new_password=p)) for p in passwords),
            return_exceptions=True,
        )
        assert sum(isinstance(outcome, LinkNotValid) for outcome in outcomes) == 1
        [won] = [p for p, outcome in zip(passwords, outcomes, strict=True) if not isinstance(outcome, Exception)]
        await posting.sign_in(SignIn(email=EMAIL, password=won))


async def test_a_reset_is_done_wholly_or_not_at_all(
    harness: ServiceHarness, posting: Users, mailbox: Mailbox, inject: Inject
):
    await registered(harness, posting)
    with harness.acting(ANONYMOUS):
        tokens = await posting.sign_in(SignIn(email=EMAIL, password=PASSWORD))
        await posting.forgot_password(ForgotPassword(email=EMAIL))
        token = await mailbox.reset()
        remove = inject("users.reset_password.before_commit", fail)
        with pytest.raises(Internal):
            await posting.reset_password(ResetPassword(token=token, new_password=NEW_PASSWORD))
        remove()
        await posting.refresh(Refresh(refresh_token=tokens.refresh_token))
        await posting.reset_password(ResetPassword(token=token, new_password=NEW_PASSWORD))


async def test_an_unknown_address_answers_alike_and_gets_no_letter(
    harness: ServiceHarness, posting: Users, mailbox: Mailbox
):
    await registered(harness, posting)
    with harness.acting(ANONYMOUS):
        assert await posting.forgot_password(ForgotPassword(email="mallory@example.com")) == (
            await posting.forgot_password(ForgotPassword(email=EMAIL))
        )
        await mailbox.reset()
    rows = await harness.rows(
        "SELECT address, user_id IS NULL FROM letters WHERE kind = 'reset' ORDER BY 1", of="users"
    )
    assert rows == [(EMAIL, False), ("mallory@example.com", True)]
    assert {letter["To"] for letter in mailbox.letters("")} == {EMAIL}


async def test_an_address_gets_a_bounded_number_of_letters(harness: ServiceHarness, posting: Users):
    await registered(harness, posting)
    with harness.acting(ANONYMOUS):
        for _ in range(LETTERS_LIMIT + 2):
            await posting.forgot_password(ForgotPassword(email=EMAIL))
            await posting.forgot_password(ForgotPassword(email="mallory@example.com"))
    counts = "SELECT count(*) FROM letters WHERE kind = 'reset' GROUP BY address"
    assert await harness.values(counts, of="users") == [LETTERS_LIMIT, LETTERS_LIMIT]


@pytest.mark.parametrize("change", ["used", "old", "moved", "deleted"])
async def test_a_link_that_is_no_good_any_more_is_refused(
    harness: ServiceHarness, posting: Users, mailbox: Mailbox, change: str
):
    alice = await registered(harness, posting)
    with harness.acting(ANONYMOUS):
        await posting.forgot_password(ForgotPassword(email=EMAIL))
        token = await mailbox.reset()
    changes = {
        "used": "UPDATE letters SET used_at = now() RETURNING id",
        "old": "UPDATE letters SET created_at = now() - interval '61 minutes' RETURNING id",
        "moved": "UPDATE users SET email = 'al@example.com' RETURNING id",
        "deleted": "DELETE FROM users RETURNING id",
    }
    await harness.rows(changes[change], of="users")
    with harness.acting(ANONYMOUS), pytest.raises(LinkNotValid):
        await posting.reset_password(ResetPassword(token=token, new_password=NEW_PASSWORD))
    assert alice.id


async def test_a_link_of_another_kind_or_a_forged_one_is_refused(
    harness: ServiceHarness, posting: Users, mailbox: Mailbox
):
    await registered(harness, posting)
    proof = await mailbox.proof()
    forged = [proof, "", "x", proof[:-4], proof[:40], "A" * 64, proof[:-1] + ("B" if proof[-1] == "A" else "A"), "ü"]
    for token in forged:
        with harness.acting(ANONYMOUS), pytest.raises(LinkNotValid):
            await posting.reset_password(ResetPassword(token=token, new_password=NEW_PASSWORD))


async def test_no_row_holds_what_a_link_needs(harness: ServiceHarness, posting: Users, mailbox: Mailbox):
    await registered(harness, posting)
    token = await mailbox.proof()
    [text] = await harness.values("SELECT letters::text FROM letters", of="users")
    assert token not in text
    assert token[24:] not in text


# ------------------------------------------------------------------------------------------------------------- sending


async def test_letters_wait_until_mail_is_set_up(harness: ServiceHarness, mailbox: Mailbox):
    users = (await harness.open({"users": build})).client(Users)
    await registered(harness, users)
    assert await harness.values("SELECT outcome FROM letters", of="users") == [None]
    harness.configure(users_mail=f"folder:{mailbox.folder}", users_address=ADDRESS)
    await harness.another_host()
    await mailbox.proof()


async def test_a_letter_is_tried_again_until_its_way_is_open(harness: ServiceHarness, posting: Users, mailbox: Mailbox):
    mailbox.folder.touch()  # a file: no letter can be put into it
    await registered(harness, posting)
    await until(lambda: _tried(harness))
    mailbox.folder.unlink()
    await harness.rows("UPDATE letters SET wake_at = now() RETURNING id", of="users")
    await mailbox.proof()
    await until(lambda: _outcomes(harness, ["sent"]))


async def test_a_letter_whose_link_is_too_old_is_given_up(harness: ServiceHarness, posting: Users, mailbox: Mailbox):
    mailbox.folder.touch()
    await registered(harness, posting)
    await until(lambda: _tried(harness))
    await harness.rows(
        "UPDATE letters SET wake_at = now(), created_at = now() - interval '8 days' RETURNING id", of="users"
    )
    await until(lambda: _outcomes(harness, ["given_up"]))


async def test_a_letter_whose_sender_dies_is_sent_again(
    harness: ServiceHarness, posting: Users, mailbox: Mailbox, inject: Inject
):
    """It has left, and that was not written down: the copy has the same name, so that there is still one."""
    remove = inject("users.letters.after_send", fail)
    await registered(harness, posting)
    await mailbox.proof()
    assert await harness.values("SELECT outcome FROM letters", of="users") == [None]
    remove()
    await harness.rows("UPDATE letters SET wake_at = now() RETURNING id", of="users")
    await until(lambda: _outcomes(harness, ["sent"]))
    assert len(mailbox.letters("")) == 1


async def test_each_outcome_is_counted_from_0_on_so_that_the_first_is_an_increase(
    harness: ServiceHarness, posting: Users, mailbox: Mailbox
):
    registry = harness.host.telemetry.registry

    def counted(kind: str, outcome: str) -> float | None:
        return registry.get_sample_value("mercato_users_letters_total", {"kind": kind, "outcome": outcome})

    assert {counted(kind, outcome) for kind in KINDS for outcome in OUTCOMES} == {0.0}
    mailbox.folder.touch()
    await registered(harness, posting)
    await until_true(lambda: counted("proof", "delayed") == 1)


async def _tried(harness: ServiceHarness) -> bool:
    return await harness.values("SELECT tries FROM letters", of="users") != [0]


async def _outcomes(harness: ServiceHarness, wanted: list[str]) -> bool:
    return await harness.values("SELECT outcome FROM letters", of="users") == wanted


@pytest.mark.parametrize(
    "options",
    [
        {"users_mail": "mailto:geheim@x"},
        {"users_address": "shop"},
        {"users_mail": "folder:x", "users_mail_sender": "x"},
    ],
)
async def test_wrong_settings_are_refused_at_the_start(harness: ServiceHarness, options: dict[str, str]):
    harness.configure(**options)
    with pytest.raises(OptionError, match="The setting MERCATO_USERS_") as refused:
        await harness.open({"users": build})
    assert "geheim" not in str(refused.value)
