"""What `/health/ready` answers, for the API's description."""

from __future__ import annotations

from typing import Any, Final

READINESS: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["status", "services"],
    "properties": {
        "status": {"type": "string", "enum": ["ready", "not_ready"]},
        "services": {"type": "object", "additionalProperties": {"type": "string", "enum": ["up", "down"]}},
        "reasons": {
            "type": "object",
            "description": "Why each service that is down is so. Missing where all are up.",
            "additionalProperties": {"type": "string", "minLength": 1},
        },
        "registry": {
            "type": "string",
            "description": "Why the registry of instances does not answer. Missing where it does.",
        },
        "audit": {
            "type": "object",
            "description": "What the last audit has found; missing before the first.",
            "properties": {
                "at": {"type": "string", "format": "date-time"},
                "violations": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 1}},
                "failure": {"type": "string", "description": "Why the latest audit could not be made."},
            },
        },
    },
}
DOWN: Final = {
    "status": "not_ready",
    "services": {"orders": "down"},
    "reasons": {"orders": "its database does not answer"},
}
