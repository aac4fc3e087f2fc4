"""Names and limits that both ends of a transport know."""

from __future__ import annotations

import enum
import re
from typing import Final

AUTHORIZATION: Final = "authorization"
BEARER: Final = "Bearer "
TRACEPARENT: Final = "traceparent"  # W3C Trace Context
VERSION: Final = "mercato-version"
NOT_STARTED: Final = "mercato-not-started"
"""On an answer: nothing was started, and why, as a `NotStarted`. A proxy in between does not send this."""
DRAINING_SECONDS: Final = "mercato-draining-seconds"
"""On an answer: the instance accepts no more calls, and will have ended after so many seconds."""

LARGEST_BATCH_BYTES: Final = 16 * 1_048_576
LARGEST_ANSWER_BYTES: Final = 64 * 1_048_576
LONGEST_REMAINING_MS: Final = 600_000.0
"""Ten minutes; the longest deadline of an operation is little more than one."""

HEADER_WORD: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
"""What is put into a header unescaped."""


class NotStarted(enum.StrEnum):
    """Why the receiving process did not start a batch."""

    DRAINING = "draining"
    UNKNOWN_OPERATION = "unknown_operation"
    UNTRUSTED = "untrusted"
    WRONG_METHOD = "wrong_method"
    WRONG_CONTENT_TYPE = "wrong_content_type"
    MALFORMED_HEADER = "malformed_header"
    MALFORMED_BODY = "malformed_body"
    WRONG_BATCH_SIZE = "wrong_batch_size"
    TOO_MANY_BATCHES = "too_many_batches"
