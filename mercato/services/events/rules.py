"""The names of events and subjects in the feed. Pure."""

from __future__ import annotations


def event_id(source: str, id: int) -> str:
    """`orders:17`: unique in the shop, and the same at every delivery."""
    return f"{source}:{id}"


def subject(kind: str, id: int) -> str:
    """`order 1001`."""
    return f"{kind} {id}"


def written_subject(subject: str) -> str:
    """The part of a row by which the events of a subject (`order 1001`) are found in it: JSON of two fields."""
    kind, _, number = subject.partition(" ")
    return f'"subject":"{kind}","subject_id":{number},'
