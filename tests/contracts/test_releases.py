"""Releases: what is frozen of a version, and that its processes and those of today understand each other."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

import mercato
from contracts import update_schemas
from contracts.exchange import DIRECTIONS
from contracts.release import COMMIT, PACTS, VERSION, CannotRelease, Releases, main
from contracts.released_contract import ReleasedContract
from mercato.chassis.contract import Contract, Kind, Message, Open, Retry, ServiceError, batched
from mercato.chassis.contract.compatibility import breaks, schemas
from mercato.contracts.field_numbers import changes

RELEASES = Releases()
VERSIONS = list(RELEASES.entries())
NEIGHBOURS = VERSIONS[-2:]
"""Versions that may be deployed together with this one."""
CONTRACTS = update_schemas.contracts()
SOME_COMMIT = "0123456789" * 4


# ------------------------------------------------------------------------------------------------------- what is frozen


def test_the_first_version_is_released():
    assert "0.1.0" in VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_a_release_names_its_commit_and_has_a_section_in_the_changelog(version: str):
    assert VERSION.fullmatch(version)
    assert COMMIT.fullmatch(RELEASES.entries()[version].commit)
    assert RELEASES.has_section(version)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_released_folder_is_unchanged(version: str):
    assert RELEASES.entries()[version].contracts == RELEASES.checksum(version), (
        f"tests/contracts/released/{version} is frozen, and was changed: restore it"
    )
    assert RELEASES.schemas(version)


def test_releases_after_the_first_ones_have_pacts():
    assert [version for version in VERSIONS if not RELEASES.pacts(version)] == ["0.1.0", "0.2.0"]


def test_every_released_folder_has_an_entry():
    assert {folder.name for folder in RELEASES.folder.iterdir()} == set(VERSIONS)


def test_the_package_has_the_newest_version_or_a_later_one():
    def parts(version: str) -> list[int]:
        return [int(part) for part in version.split(".")]

    assert parts(mercato.__version__) >= parts(VERSIONS[-1])


# -------------------------------------------------------------------------------------------------------- compatibility


@pytest.mark.parametrize("version", VERSIONS)
def test_contracts_have_changed_additively_since_a_release(version: str):
    found = [
        f"{service}: {sentence}"
        for service, released in RELEASES.schemas(version).items()
        for sentence in (breaks(released, schemas(CONTRACTS[service])) if service in CONTRACTS else ["is gone"])
    ]

    assert found == []


@pytest.mark.parametrize("version", VERSIONS)
def test_field_numbers_are_those_of_a_release(version: str):
    assert changes(RELEASES.numbers(version), update_schemas.committed_numbers()) == []


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("service", sorted(CONTRACTS))
@pytest.mark.parametrize("version", NEIGHBOURS)
def test_messages_are_read_by_the_other_version(version: str, service: str, direction: str):
    released = RELEASES.schemas(version).get(service)
    if released is not None:  # that version had no such service
        DIRECTIONS[direction](ReleasedContract(released), CONTRACTS[service])


# -------------------------------------------------------------------------------- the comparison finds what differs

Size = Literal["small", "large"]


class Part(Message):
    number: int
    size: Open[Size] = "small"


class Ask(Message):
    number: int
    size: Size = "small"


class Said(Message):
    parts: tuple[Part, ...]
    note: str = ""


class NotToday(ServiceError, code="released.not_today", kind=Kind.REFUSED):
    sentence = "Not today: {reason}."
    reason: str
    hours: int = 0


class Changed(Message):
    number: int


class Shop(Contract, name="released"):
    read = batched(Ask, Said, allow=frozenset({"staff"}), retry=Retry.SAFE)

    events: ClassVar = {"thing.changed": Changed}


Change = Callable[[dict[str, Any]], object]


def fields(schema: dict[str, Any], name: str) -> dict[str, Any]:
    return schema["components"][name]["properties"]


def without(name: str, field: str) -> Change:
    """The released version does not have the field yet."""

    def change(schema: dict[str, Any]) -> None:
        del fields(schema, name)[field]
        required = schema["components"][name]["required"]
        schema["components"][name]["required"] = [each for each in required if each != field]

    return change


def besides(name: str, field: str, part: dict[str, Any], *, required: bool) -> Change:
    """The released version has a field that is gone."""

    def change(schema: dict[str, Any]) -> None:
        fields(schema, name)[field] = part
        schema["components"][name]["required"] += [field] if required else []

    return change


NUMBER = {"type": "integer"}

UNDERSTOOD: dict[str, Change] = {
    "nothing": lambda s: None,
    "a field of a request is new": without("Ask", "size"),
    "a field of an answer is new": without("Said", "note"),
    "a field of an error is new": without("NotToday", "hours"),
    "a value of an open enumeration is new": lambda s: fields(s, "Part")["size"].update(
        {"x-extensible-enum": ["small"]}
    ),
    "a value of a closed enumeration is new": lambda s: fields(s, "Ask")["size"].update({"enum": ["small"]}),
    "a default is new": lambda s: s["components"]["Said"]["required"].append("note"),
    "a kind of an error is new": lambda s: s["errors"]["released.not_today"].update(kind="newer"),
}

NOT_UNDERSTOOD: dict[str, tuple[str, Change]] = {
    "a required field of a request is gone": (
        "requests_to_the_released",
        besides("Ask", "colour", NUMBER, required=True),
    ),
    "a required field of a request is new": ("requests_from_the_released", without("Ask", "number")),
    "a type in a request is another": (
        "requests_from_the_released",
        lambda s: fields(s, "Ask").update(number={"type": "string"}),
    ),
    "a range of a request is narrower": (
        "requests_to_the_released",
        lambda s: fields(s, "Ask")["number"].update(maximum=0),
    ),
    "a value of a request is gone": (
        "requests_from_the_released",
        lambda s: fields(s, "Ask")["size"].update({"enum": ["gone"]}),
    ),
    "a required field of an answer is gone": (
        "answers_to_the_released",
        besides("Part", "colour", NUMBER, required=True),
    ),
    "a required field of an answer is new": ("answers_from_the_released", without("Part", "number")),
    "an enumeration of an answer is closed": (
        "answers_to_the_released",
        lambda s: fields(s, "Part").update(size={"enum": ["small"]}),
    ),
    "a detail of an error is gone": ("errors_to_the_released", besides("NotToday", "days", NUMBER, required=True)),
    "a detail of an error is another type": (
        "errors_from_the_released",
        lambda s: fields(s, "NotToday").update(hours={"type": "string"}),
    ),
    "a field of an event is gone": ("events_to_the_released", besides("Changed", "colour", NUMBER, required=True)),
    "a field of an event is new": ("events_from_the_released", without("Changed", "number")),
}


def changed(change: Change) -> ReleasedContract:
    schema = copy.deepcopy(json.loads(json.dumps(schemas(Shop))))
    change(schema)
    return ReleasedContract(schema)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("change", UNDERSTOOD.values(), ids=UNDERSTOOD)
def test_versions_that_differ_additively_understand_each_other(change: Change, direction: str):
    DIRECTIONS[direction](changed(change), Shop)


@pytest.mark.parametrize(("direction", "change"), NOT_UNDERSTOOD.values(), ids=NOT_UNDERSTOOD)
def test_versions_that_differ_otherwise_are_found(direction: str, change: Change):
    with pytest.raises(Exception, match=r"refused|cannot be read|read as itself|missing required|Expected|Invalid"):
        DIRECTIONS[direction](changed(change), Shop)


# ----------------------------------------------------------------------------------------------------------- to release


@pytest.fixture
def releases(tmp_path: Path) -> Releases:
    """A repository that has released nothing."""
    (tmp_path / "CHANGELOG.md").write_text(
        f"# Changelog\n\n## Unreleased\n\n## {mercato.__version__}\n\n- All of it.\n"
    )
    return Releases(tmp_path)


def test_a_release_is_frozen_and_entered(releases: Releases):
    releases.release(mercato.__version__, SOME_COMMIT)

    (entry,) = releases.entries().values()
    assert entry.commit == SOME_COMMIT
    assert entry.contracts == releases.checksum(mercato.__version__)
    assert releases.schemas(mercato.__version__) == {name: schemas(c) for name, c in CONTRACTS.items()}
    assert releases.numbers(mercato.__version__) == update_schemas.committed_numbers()
    frozen = {file.name: file.read_bytes() for file in releases.pacts(mercato.__version__)}
    assert frozen == {file.name: file.read_bytes() for file in PACTS.glob("*.json")}
    assert "orders-inventory.json" in frozen


@pytest.mark.parametrize("change", ["another byte", "a file more", "a file less", "another name"])
def test_a_changed_folder_has_another_checksum(releases: Releases, change: str):
    releases.release(mercato.__version__, SOME_COMMIT)
    frozen = releases.checksum(mercato.__version__)
    orders = releases.folder / mercato.__version__ / "schemas/orders.json"
    if change == "another byte":
        orders.write_text(orders.read_text().replace("Order", "order", 1))
    elif change == "a file more":
        orders.with_name("more.json").write_text("{}")
    elif change == "a file less":
        orders.unlink()
    else:
        shutil.move(orders, orders.with_name("orders2.json"))

    assert releases.checksum(mercato.__version__) != frozen


def test_a_version_is_released_once(releases: Releases):
    releases.release(mercato.__version__, SOME_COMMIT)
    before = releases.file.read_text()

    with pytest.raises(CannotRelease, match="was released before"):
        releases.release(mercato.__version__, SOME_COMMIT)
    assert releases.file.read_text() == before


@pytest.mark.parametrize(
    ("version", "commit", "sentence"),
    [
        ("1.0", SOME_COMMIT, "'1.0' is not a version"),
        ("0.01.0", SOME_COMMIT, "'0.01.0' is not a version"),
        ("99.0.0", SOME_COMMIT, "says .*: write 99.0.0 there first"),
        (mercato.__version__, "abc", "'abc' is not a commit"),
    ],
)
def test_a_wrong_release_is_refused_with_a_sentence(releases: Releases, version: str, commit: str, sentence: str):
    with pytest.raises(CannotRelease, match=sentence):
        releases.release(version, commit)
    assert not releases.file.exists()


@pytest.mark.parametrize(
    "changelog", ["", "## 9.9.9\n\n- x\n", "## {version}\n\n## 0.0.1\n\n- x\n", "### {version}\n- x\n"]
)
def test_a_version_without_a_section_in_the_changelog_is_refused(releases: Releases, changelog: str):
    releases.changelog.write_text(changelog.format(version=mercato.__version__))

    with pytest.raises(CannotRelease, match=r"CHANGELOG.md has no section"):
        releases.release(mercato.__version__, SOME_COMMIT)


@pytest.mark.parametrize("heading", ["## {version}", "## {version} - 2026-11-30", "## [{version}] - 2026-11-30"])
def test_the_section_of_a_version_may_have_a_date_and_others_behind_it(releases: Releases, heading: str):
    heading = heading.format(version=mercato.__version__)
    releases.changelog.write_text(f"# Changelog\n\n{heading}\n\n- x\n\n## 0.0.1\n\n- y\n")

    assert releases.has_section(mercato.__version__)


def test_the_command_says_why_it_refuses(capsys: pytest.CaptureFixture[str]):
    assert main([VERSIONS[-1]]) == 1
    assert "was released before" in capsys.readouterr().err
