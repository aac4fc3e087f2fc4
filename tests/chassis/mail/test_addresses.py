"""Which e-mail addresses are taken, and when two spellings are one."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from mercato.chassis.mail import addresses


@pytest.mark.parametrize(
    "email",
    [
        "alice@example.com",
        "A.B+shop@sub.example.co",
        "o'brien@example.com",
        "x@1.de",
        "jürgen@bücher.example",
        "मेल@उदाहरण.भारत",
        "a" * 64 + "@example.com",
        "carol@corp.local",
        "carol@shop.test",
    ],
)
def test_addresses_that_people_have_are_taken(email: str):
    assert addresses.problem(addresses.canonical(email)) is None


@pytest.mark.parametrize(
    "email",
    [
        "",
        "alice",
        "@example.com",
        "alice@",
        "alice@localhost",
        "alice@example.",
        "alice@.example",
        "alice@exa..mple",
        "alice@-example.com",
        "alice@example-.com",
        "alice@exam_ple.com",
        "a@b@example.com",
        "al ice@example.com",
        "Alice <alice@example.com>",
        '"alice"@example.com',
        '"a b"@example.com',
        "a" * 65 + "@example.com",
        "é" * 33 + "@example.com",
        "alice@" + "a" * 64 + ".com",
        "alice@" + "a." * 130 + "com",
    ],
)
def test_what_is_no_address_is_refused(email: str):
    assert addresses.problem(addresses.canonical(email))


@pytest.mark.parametrize("local", [".alice", "alice.", "al..ice", "al,ice", "al(ice)", "al:ice", "al\\ice"])
def test_before_the_at_sign_stands_a_dot_atom(local: str):
    assert "before the @" in (addresses.problem(f"{local}@example.com") or "")


@pytest.mark.parametrize(
    "host", ["[127.0.0.1]", "[IPv6:::1]", "127.0.0.1", "\uff11\uff12\uff17.0.0.1", "xn--.com", "xn--a.com"]
)
def test_after_the_at_sign_stands_no_ip_address_and_no_broken_name(host: str):
    assert addresses.problem(f"alice@{host}")


@pytest.mark.parametrize(
    "character",
    [
        *("\u00a0", "\u00ad", "\u034f", "\u115f", "\u17b4", "\u180e", "\u200b", "\u200d", "\u202e", "\u2060"),
        *("\u2800", "\u3164", "\ufe0f", "\ufeff", "\uffa0", "\U000e0041", "\n", "\r", "\x00", "\x7f", "\ud800"),
    ],
)
@pytest.mark.parametrize("place", ["ali{}ce@example.com", "alice@exam{}ple.com"])
def test_what_is_not_seen_is_refused_or_makes_no_second_address(place: str, character: str):
    email = addresses.canonical(place.format(character))
    assert addresses.problem(email) or email == "alice@example.com"
    if place.startswith("ali{}"):
        assert addresses.problem(email)


@pytest.mark.parametrize("lookalike", ["\uff41lice", "ⓐlice", "ﬁne", "\U0001d41alice", "①"])
def test_what_stands_for_another_letter_is_refused(lookalike: str):
    assert "before the @" in (addresses.problem(f"{lookalike}@example.com") or "")


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        (" Ju\u0308rgen@Example.COM\t", "Jürgen@example.com"),
        ("a@xn--mnchen-3ya.de", "a@münchen.de"),
        ("a@XN--MNCHEN-3YA.DE", "a@münchen.de"),
        ("a@MÜNCHEN.de", "a@münchen.de"),
        ("a@mu\u0308nchen\u3002de", "a@münchen.de"),
        ("a@\uff45\uff58\uff41\uff4d\uff50\uff4c\uff45.com", "a@example.com"),
    ],
)
def test_spellings_of_one_address_have_one_canonical_form(written: str, canonical: str):
    assert addresses.canonical(written) == canonical


def test_different_addresses_stay_different():
    assert addresses.canonical("a@faß.de") != addresses.canonical("a@fass.de")
    assert addresses.canonical("a.b@example.com") != addresses.canonical("ab@example.com")


def test_the_spellings_of_earlier_versions_are_looked_for():
    assert addresses.spellings("a@Xn--mnchen-3ya.de") == ["a@münchen.de", "a@Xn--mnchen-3ya.de", "a@xn--mnchen-3ya.de"]
    assert addresses.spellings("a..b@example.com") == ["a..b@example.com"]
    assert addresses.spellings("a\x00@example.com") == []
    assert addresses.spellings("a\ud800@example.com") == []


@given(st.text(alphabet=st.characters(categories=None), max_size=300))
def test_whatever_passes_can_be_stored(text: str):
    """PostgreSQL takes neither NUL nor what is not UTF-8, and its checks count characters."""
    for email in (addresses.canonical(text + "@example.com"), addresses.canonical("alice@" + text)):
        if addresses.problem(email) is None:
            assert "\x00" not in email
            assert 3 <= len(email.encode().decode()) <= 254


@given(st.one_of(st.text(max_size=60), st.text(max_size=20).map("a@{}.com".format)))
def test_the_canonical_form_is_stable(text: str):
    assert addresses.canonical(addresses.canonical(text)) == addresses.canonical(text)
