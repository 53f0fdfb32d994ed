"""Reading the configuration of a pipeline's part: a JSON object, from a file that may come from anyone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from cogtools.checkpoint.files import read_small_file
from cogtools.checkpoint.limits import MAX_ADAPTER_CONFIG_BYTES
from cogtools.errors import CheckpointError

if TYPE_CHECKING:
    from cogtools.checkpoint.paths import AnyPath

MAX_CONFIG_BYTES = MAX_ADAPTER_CONFIG_BYTES
"""The longest configuration that is read. Real: 2 kB."""


def read_config(path: AnyPath) -> dict[str, object]:
    """What a configuration says.

    Raises:
        CheckpointError: if it cannot be read, is too long, or is not a JSON object.
    """
    return parse_config(path, read_small_file(path, MAX_CONFIG_BYTES))


def parse_config(path: AnyPath, content: bytes) -> dict[str, object]:
    """The same, of content that has been read.

    Raises:
        CheckpointError: if it is not a JSON object.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError("the configuration is not JSON", file=path, found=str(error)) from error
    if not isinstance(value, dict):
        raise CheckpointError("the configuration is not a JSON object", file=path)
    return value
