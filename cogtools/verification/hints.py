"""What to do about a check that did not pass, where the check itself does not say."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cogtools.conversion.options import CASTS, format_words
from cogtools.errors import Hint, command
from cogtools.formatting import shown
from cogtools.layouts import diffusers
from cogtools.layouts.recognition import BY_NAME
from cogtools.verification.expected import stated_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cogtools.conversion.lora import Lora
    from cogtools.conversion.record import ExportRecord
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


def with_hint(check: Check, lora: Lora, source: Sequence[object] | None) -> Check:
    """The check, with a hint if there is something to do about it.

    Args:
        check: the check.
        lora: the file.
        source: the checkpoint that it is held against, as words of a command; None if there is none.
    """
    if check.status not in ("warn", "fail") or check.hint is not None:
        return check
    if not lora.tensors:
        return replace(check, hint=command("inspect", lora.checkpoint.path))
    hint = _export_again(lora, source) if check.name in _MADE_AGAIN else _OTHERS.get(check.name)
    return replace(check, hint=hint)


def _export_again(lora: Lora, source: Sequence[object] | None) -> Hint:
    """How to make the file again, in the way that its record says it was made."""
    record, path = lora.record, lora.checkpoint.path
    if record.version is None:  # cogtools did not write it, and it may be the only copy
        return Hint(f"make it again with the program that wrote it; {lora.intended.reader} is to load it")
    if source is None:  # whether this user has it is not known
        return Hint(f"copy it again from where it came, or export it again from its checkpoint{_made_of(record)}")
    layout = BY_NAME.get(record.format or "", diffusers.LAYOUT)
    options: list[object] = [*format_words(layout)]
    for name, value in (("--alpha", record.alpha_by_hand), ("--scaling", record.scaling_by_hand)):
        options += [name, value] if value is not None else []
    for merged in record.merged or ():
        options += ["--weight", merged.weight] if merged.weight is not None else []
    if record.cut_to is not None:
        options += ["--rank", record.cut_to]
    elif record.scale == "fold" and record.merged is None:
        options += ["--scale", "fold"]
    if record.dtype in _CASTS and record.dtype != record.source_dtype:
        options += ["--dtype", _CASTS[record.dtype]]
    out = path
    for _ in (layout.path or "").split("/") if layout.is_folder or path.suffix != ".safetensors" else ():
        out = out.parent
    if record.merged is None:
        return command("export-lora", *source, out, *options, "--overwrite")
    loras = source if len(source) > 1 else [lora.source or "LORA" for lora in record.merged]
    return command("merge", *loras, out, *options, "--overwrite")


def _made_of(record: ExportRecord) -> str:
    """Which checkpoint that is, as far as the record tells."""
    facts = [shown(record.source)] if record.source is not None else []
    facts += [f"iteration {record.iteration}"] if record.iteration is not None else []
    facts += ["EMA weights"] if record.ema else []
    return f" ({', '.join(facts)})" if facts else ""


def only_load_tells(lora: Lora) -> Hint:
    """How to find out what only PEFT can tell; where it is not given that, how to do without."""
    stated = stated_of(lora)
    if stated is not None and stated.not_handed_on:
        advice = "--load does not hand this on to the libraries; write a file that states its modules by their names"
        return command("export-lora", lora.checkpoint.path, "OUT_DIR", "--format", lora.intended.name, advice=advice)
    return command("verify", lora.checkpoint.path, "--load")
