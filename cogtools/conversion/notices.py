"""What the user should know beside a result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogtools.checkpoint.pickle.dangers import danger_of
from cogtools.errors import SHOWN_PROBLEMS
from cogtools.formatting import MAX_SHOWN_CHARS, number

if TYPE_CHECKING:
    from cogtools.checkpoint.index import Checkpoint
    from cogtools.conversion.plan import LoraPlan


def export_notices(checkpoint: Checkpoint, plan: LoraPlan, scale: str) -> tuple[str, ...]:
    """What to say of an export: of the checkpoint, of the choices that were made for the user, and of the output."""
    return (*source_notices(checkpoint, plan), *_of_the_scale(plan, scale), *_of_the_crc32s(plan))


def source_notices(checkpoint: Checkpoint, plan: LoraPlan) -> tuple[str, ...]:
    """What to say of a checkpoint whose LoRA is taken, and of the choices that were made for the user."""
    return (*danger_notices(checkpoint), *choice_notices(checkpoint), *plan.notices)


def danger_notices(checkpoint: Checkpoint) -> list[str]:
    """Warn of a checkpoint that would run code if it were loaded: whoever exports from it may try that next."""
    names = sorted(str(name) for name in checkpoint.foreign if danger_of(*name) == "dangerous")
    shown = ", ".join(name[:MAX_SHOWN_CHARS] for name in names[:SHOWN_PROBLEMS])
    return [f"The checkpoint names what can run code: {shown}. Nothing was run; do not torch.load it."] if names else []


def choice_notices(checkpoint: Checkpoint) -> list[str]:
    """Say which of two sets of weights was taken: the trainer saves them side by side."""
    run = checkpoint.run
    if run is None or run.twin is None:
        return []
    if run.chosen.ema:
        return [f"Took the EMA weights of iteration {run.chosen.number}. The plain ones are in {run.twin} beside them."]
    return [f"Took the plain weights of iteration {run.chosen.number}. Its EMA weights are in {run.twin} beside them."]


def _of_the_scale(plan: LoraPlan, scale: str) -> list[str]:
    if scale == "metadata":
        return [
            "The scale is stated in the file's header, which diffusers reads from 0.34 on. "
            "For ComfyUI and everything else, export with --scale fold."
        ]
    if scale == "none":
        weights = ", ".join(map(number, sorted(set(plan.scalings.values()))))
        return [f"The file does not carry its scale: the loader must apply it itself, as weight {weights}."]
    return []


def _of_the_crc32s(plan: LoraPlan) -> list[str]:
    text = "The checkpoint records no CRC-32s: damage to its weights could not be looked for."
    return [] if plan.has_crc32 else [text]
