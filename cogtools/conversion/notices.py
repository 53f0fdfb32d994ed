"""What the user should know beside a result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogtools.checkpoint.formats import safetensors
from cogtools.checkpoint.pickle.dangers import danger_of
from cogtools.conversion.adapter_config import live_dropout
from cogtools.conversion.first_values import value_notices
from cogtools.errors import SHOWN_PROBLEMS
from cogtools.formatting import MAX_SHOWN_CHARS, number

if TYPE_CHECKING:
    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.run import Iteration
    from cogtools.conversion.options import ExportOptions
    from cogtools.conversion.plan import LoraPlan


def export_notices(checkpoint: Checkpoint, plan: LoraPlan, options: ExportOptions) -> tuple[str, ...]:
    """What to say of an export: of the checkpoint, of the choices that were made for the user, and of the output."""
    layout = plan.layout
    lora_only = [layout.lora_only_note] if layout.lora_only_note is not None and options.base is None else []
    return (
        *lora_only,
        *source_notices(checkpoint, plan),
        *_of_the_scale(plan, options),
        *layout.notes,
        *_of_the_crc32s(plan),
    )


def source_notices(checkpoint: Checkpoint, plan: LoraPlan) -> tuple[str, ...]:
    """What to say of a checkpoint whose LoRA is taken, and of the choices that were made for the user."""
    return (
        *danger_notices(checkpoint),
        *choice_notices(checkpoint),
        *plan.notices,
        *value_notices(plan),
        *_of_dropout(plan),
    )


def danger_notices(checkpoint: Checkpoint) -> list[str]:
    """Warn of a checkpoint that would run code if it were loaded: whoever exports from it may try that next."""
    names = sorted(str(name) for name in checkpoint.foreign if danger_of(*name) == "dangerous")
    shown = ", ".join(name[:MAX_SHOWN_CHARS] for name in names[:SHOWN_PROBLEMS])
    return [f"The checkpoint names what can run code: {shown}. Nothing was run; do not torch.load it."] if names else []


def recorded_notice(recorded: Iteration) -> str:
    """What to say where nobody has said which weights of a checkpoint are meant, but the record has."""
    kind = "EMA weights" if recorded.ema else "plain weights"
    return f"Held against the {kind} of iteration {recorded.number}, which the file's record names."


def choice_notices(checkpoint: Checkpoint) -> list[str]:
    """Say which of two sets of weights was taken: the trainer saves them side by side."""
    run = checkpoint.run
    if run is None or run.twin is None:
        return []
    if run.chosen.ema:
        return [f"Took the EMA weights of iteration {run.chosen.number}. The plain ones are in {run.twin} beside them."]
    return [f"Took the plain weights of iteration {run.chosen.number}. Its EMA weights are in {run.twin} beside them."]


def _of_dropout(plan: LoraPlan) -> list[str]:
    """Dropout that the file states where diffusers reads it: that is left out of what is written."""
    header = plan.lora.stated.get("header")
    dropout = None if header is None or header.config is None else live_dropout(header.config.fields)
    if dropout is None:
        return []
    return [f"The file states lora_dropout {number(dropout)}, which diffusers applies whenever it runs the model: what "
            "is written does without it."]  # fmt: skip


def _of_the_scale(plan: LoraPlan, options: ExportOptions) -> list[str]:
    layout = plan.layout
    if options.way == "metadata":
        return [layout.stated_note] if layout.stated_note is not None else []
    if options.way == "none":
        weights = ", ".join(map(number, sorted(set(plan.folded.values()))[:SHOWN_PROBLEMS]))
        return [f"The file does not carry its scale: the loader must apply it itself, as weight {weights}."]
    if options.rank is not None:
        return ["What is cut to a lower rank has its scale multiplied in."]
    if options.scale is None:
        return [f"{layout.reader} reads the scale from no file: it is multiplied into the weights."]
    return []


def _of_the_crc32s(plan: LoraPlan) -> list[str]:
    text = "The checkpoint records no CRC-32s: damage to its weights could not be looked for."
    never_has_some = plan.lora.checkpoint.format.startswith(safetensors.FORMAT)
    return [] if plan.has_crc32 or never_has_some else [text]
