"""Reports as plain data: what `--json` prints under every outcome.

Every command prints one object: `schema_version`, `command`, `status` ("ok", "wrong" or "error") and, under
`report` or `error`, the same facts that the text shows.
"""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from typing import Literal

from cogtools.errors import CogtoolsError

SCHEMA_VERSION = 1

Status = Literal["ok", "wrong", "error"]


def report_json(command: str, status: Status, report: object) -> str:
    """The object for a command that has done its work; `report` is a dataclass."""
    return _dumps({"command": command, "status": status, "report": plain(report)})


def error_json(command: str | None, error: CogtoolsError) -> str:
    """The object for a command that could not do its work; `command` is None if the words were no command."""
    return _dumps({"command": command, "status": "error", "error": error.to_dict()})


def plain(value: object) -> object:
    """Dataclasses, paths and tuples as what JSON has: objects, strings and arrays."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, CogtoolsError):
        return value.to_dict()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if isinstance(value, (str, int, float)) or value is None else str(value)


def _dumps(content: dict[str, object]) -> str:
    return json.dumps({"schema_version": SCHEMA_VERSION, **content}, indent=2, sort_keys=True, allow_nan=False)
