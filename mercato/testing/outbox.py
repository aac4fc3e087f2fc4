"""The events of an outbox, as tests ask for them."""

from __future__ import annotations

from typing import Final

EVENTS: Final = """(
    SELECT r.id << 12 | e.n - 1 AS id, e.type, e.subject, e.subject_id, e.version, e.data, r.at
      FROM outbox r
     CROSS JOIN LATERAL ROWS FROM (
        json_to_recordset(r.events::json)
            AS (type text, subject text, subject_id bigint, version bigint, data json)
     ) WITH ORDINALITY AS e (type, subject, subject_id, version, data, n)
) AS events"""
"""Stands behind FROM: a row for each event, with `id` its position."""
