"""What an account may look like: pure rules."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, strategies as st

from mercato.services.users import rules

GOOD_PASSWORD = "correct horse"


@pytest.mark.parametrize("name", ["Alice", "李", "Anne-Marie O'Neil", "नेहा", "نسیم\u200cجم", "👩\u200d🚀"])
def test_names_that_people_have_are_taken(name: str):
    assert rules.name_problem(rules.stored_name(name)) is None


@pytest.mark.parametrize(
    "name", ["", " \t ", "\u200b\u200b", "Al\x00ice", "Al\nice", "Al\x7fice", "Al\u2028ice", "Al\udc00ice", "A" * 201]
)
def test_what_is_no_name_is_refused(name: str):
    assert rules.name_problem(rules.stored_name(name))


def test_the_length_that_counts_is_the_stored_one():
    grows_when_composed = "\u0958" * 200
    assert len(rules.stored_name(grows_when_composed)) == 400
    assert rules.name_problem(rules.stored_name(grows_when_composed))


@pytest.mark.parametrize("password", ["demo-password", "ten chars!", "пароль и пробел", "a" * 128 + "b" * 128])
def test_good_passwords_are_taken(password: str):
    assert rules.password_problem(password, "alice@example.com") is None


@pytest.mark.parametrize(
    ("password", "reason"),
    [
        ("ninechars", "at least 10"),
        ("", "at least 10"),
        ("ab" * 129, "at most 256"),
        ("aaaaaaaaaaaa", "one character repeated"),
        ("aaaaaaAAAAAA", "one character repeated"),
        ("Alice.Liddell@Example.com", "e-mail"),
        ("ALICE.LIDDELL", "e-mail"),
        ("Password123", "commonest"),
        ("correct\x00horse", "control"),
        ("correct\ud800horse", "control"),
    ],
)
def test_bad_passwords_are_refused_and_the_reason_is_said(password: str, reason: str):
    assert reason in (rules.password_problem(password, "alice.liddell@example.com") or "")


def test_all_that_is_wrong_with_a_password_is_said_at_once():
    problem = rules.password_problem("aaa", "aaa@example.com") or ""

    assert all(reason in problem for reason in ("at least 10", "repeated", "e-mail"))


def test_the_commonest_passwords_are_those_that_no_other_rule_refuses():
    for password in rules.COMMONEST_PASSWORDS:
        assert password == password.casefold()
        assert rules.password_problem(password, "alice@example.com") == "is one of the commonest passwords"


def test_every_wrong_field_is_named_at_once():
    errors = rules.account_errors(email="alice", name=" ", password="short")

    assert [e.field for e in errors] == ["email", "name", "password"]


def test_a_field_that_is_not_given_is_not_wrong():
    assert rules.account_errors() == ()
    assert rules.account_errors(name="Alice") == ()


@given(st.text(alphabet=st.characters(categories=None), max_size=300))
def test_whatever_passes_can_be_stored(text: str):
    """PostgreSQL takes neither NUL nor what is not UTF-8, and its checks count characters."""
    name = rules.stored_name(text)
    if rules.name_problem(name) is None:
        assert "\x00" not in name
        assert 1 <= len(name.encode().decode()) <= 200


@given(st.text(max_size=60))
def test_the_stored_form_is_stable(text: str):
    decomposed = unicodedata.normalize("NFD", text)
    assert rules.stored_password(decomposed) == rules.stored_password(text)
