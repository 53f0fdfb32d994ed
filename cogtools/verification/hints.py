"""What to do about a check that did not pass, where the check itself does not say."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cogtools.conversion.options import CASTS
from cogtools.errors import Hint, command
from cogtools.layouts import diffusers
from cogtools.layouts.recognition import BY_NAME

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cogtools.conversion.lora import Lora
    from cogtools.verification.report import Check

_MADE_AGAIN = frozenset(
    {
        "complete", "pairs", "shapes", "rank", "dtype", "constant", "scale", "target_modules", "record", "against",
        "against-scale",
    }
)  # fmt: skip
"""The checks that an export of the right checkpoint passes."""

_OTHERS = {
    "finite": Hint(
        "if the checkpoint has them too (--against tells), the training diverged: take an earlier iteration"
    ),
    "untrained": Hint("take a later iteration of the training"),
}

_CASTS = {name: cast for cast, name in CASTS.items()}


def with_hint(check: Check, lora: Lora, source: Sequence[object]) -> Check:
    """The check, with a hint if there is something to do about it.

    Args:
        check: the check.
        lora: the file.
        source: the checkpoint that it was made of, as words of a command.
    """
    if check.status not in ("warn", "fail") or check.hint is not None:
        return check
    if not lora.tensors:  # not written by cogtools: it must not be replaced
        return replace(check, hint=command("inspect", lora.checkpoint.path))
    hint = _export_again(lora, source) if check.name in _MADE_AGAIN else _OTHERS.get(check.name)
    return replace(check, hint=hint)


def _export_again(lora: Lora, source: Sequence[object]) -> Hint:
    """How to make the file again, in the way that its record says it was made."""
    record, path = lora.record, lora.checkpoint.path
    if record.version is None:  # cogtools did not write it, and it may be the only copy
        return Hint(f"make it again with the program that wrote it; {lora.intended.reader} is to load it")
    layout = BY_NAME.get(record.format or "", diffusers.LAYOUT)
    options: list[object] = [] if layout is diffusers.LAYOUT else ["--format", layout.name]
    for name, value in (("--alpha", record.alpha_by_hand), ("--scaling", record.scaling_by_hand)):
        options += [name, value] if value is not None else []
    if record.scale == "fold":
        options += ["--scale", "fold"]
    if record.dtype in _CASTS and record.dtype != record.source_dtype:
        options += ["--dtype", _CASTS[record.dtype]]
    out = path
    for _ in (layout.path or "").split("/") if layout.is_folder or path.suffix != ".safetensors" else ():
        out = out.parent
    return command("export-lora", *source, out, *options, "--overwrite")


def only_load_tells(lora: Lora) -> Hint:
    """How to find out what only PEFT can tell."""
    return command("verify", lora.checkpoint.path, "--load")
