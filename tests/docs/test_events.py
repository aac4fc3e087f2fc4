"""`docs/events.md` names the subjects, fields, types and permissions that there are. Its programs are run elsewhere."""

from __future__ import annotations

import re
from typing import Final

from mercato import topology
from mercato.chassis.messaging.events import KEPT_DAYS
from mercato.chassis.messaging.stream import KEPT_SECONDS, STREAM_BYTES_MAX
from mercato.contracts.events import FeedEntry
from system.nats_js.documented import DOCUMENT, PROGRAMS

TYPE: Final = re.compile(r"`([a-z]+\.[a-z_]+)`")
ROW: Final = re.compile(r"^\| (.+?) \| (.+) \|$", re.MULTILINE)


def rows_behind(header: str) -> list[tuple[str, str]]:
    """The rows of the table that begins with this line."""
    _, _, table = DOCUMENT.partition(f"{header}\n")
    return ROW.findall(table.partition("\n\n")[0])[1:]


def test_the_types_are_those_of_the_contracts():
    listed = {
        type_: data.strip("`") for types, data in rows_behind("| types | `data` |") for type_ in TYPE.findall(types)
    }
    declared = {type_: data for contract in topology.SERVICES.values() for type_, data in contract.events.items()}
    assert listed == {type_: data.__name__ for type_, data in declared.items()}


def test_the_fields_are_those_of_an_entry():
    listed = [field.strip("`") for field, _ in rows_behind("| field of the body | is |")]
    assert listed == list(FeedEntry.__struct_fields__)


def test_the_permissions_are_those_of_the_subscriber():
    allowed = topology.nats_permissions(topology.SUBSCRIBER)
    assert re.findall(r"^    (\$\S+)$", DOCUMENT, re.MULTILINE) == list(allowed.publish)
    assert [subject.removesuffix(".>") in DOCUMENT for subject in allowed.subscribe] == [True]


def test_the_ages_and_sizes_are_those_of_the_feed_and_the_stream():
    kept = f"The feed keeps its entries for {KEPT_DAYS} days, the stream for {KEPT_SECONDS // 86_400}"
    assert f"{kept}, and at most {STREAM_BYTES_MAX // 1024**3} GiB" in DOCUMENT


def test_there_are_two_programs_in_each_language():
    assert sorted(PROGRAMS) == ["follow.mjs", "follow.py", "sales.mjs", "sales.py"]
    for name, text in PROGRAMS.items():
        assert "mercato.events.order.*" in text
        if name.endswith(".py"):
            compile(text, name, "exec")
