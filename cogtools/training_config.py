"""What the trainer's `training_config.yaml` says of a LoRA: its rank, its alpha, the layers that it was trained on.

The trainer writes the file into the save folder, beside the folders of the iterations. In it, the LoRA stands under
model.network_config.params.modules.lora_config.params: `r` always, `lora_alpha` and `layer_range` if the user set
them (SwissArmyTransformer, sat/model/finetune/lora2.py, `LoraMixin`).

The file comes from a stranger as much as the checkpoint does. It is read by PyYAML's safe loader, which makes plain
data only; merge keys, which can make a short file grow without bound, are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

from cogtools.checkpoint.storage import SourceFile, is_file
from cogtools.errors import CheckpointError
from cogtools.layouts.cogvideox import MAX_LAYERS
from cogtools.numbers import is_number, is_positive

if TYPE_CHECKING:
    from pathlib import Path

FILE_NAME = "training_config.yaml"

MAX_BYTES = 1 << 17
"""The longest file that is read. Real ones have 6 KB; PyYAML takes a second for this many."""

MAX_NUMBER_CHARACTERS = 100
"""The longest number that is read. YAML has numbers to the base 60, which take long to make if they are long."""

_NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")

_BAD_SCALAR = (ValueError, ArithmeticError, LookupError, AttributeError)
"""What PyYAML raises for a scalar that is none of its tag: `2024-99-99`, `1:1:…:1.5`, `!!bool x`, `!!timestamp x`."""

_PATH = ("model", "network_config", "params", "modules", "lora_config", "params")


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """The LoRA's part of a training configuration. A field is None if the file does not say.

    Attributes:
        path: the file.
        rank: `r`.
        alpha: `lora_alpha`.
        layers: `layer_range`, the layers that were trained.
    """

    path: Path
    rank: int | None
    alpha: float | None
    layers: tuple[int, ...] | None


def find_training_config(checkpoint: Path) -> Path | None:
    """The training configuration beside a checkpoint file, or in the save folder above its iteration's folder.

    If the checkpoint is a link, it is looked for where the link lies first, then where it points to.
    """
    folders = (checkpoint.absolute().parent, checkpoint.resolve().parent)
    places = (place / FILE_NAME for folder in folders for place in (folder, folder.parent))
    return next(filter(is_file, places), None)


def read_training_config(path: Path) -> TrainingConfig:
    """Read what a training configuration says of the LoRA.

    Raises:
        CheckpointError: if the file cannot be read, or says something that cannot be.
    """
    params: object = _load(path)
    for name in _PATH:
        params = params.get(name) if isinstance(params, dict) else None
    if not isinstance(params, dict):
        params = {}
    rank, alpha, layers = params.get("r"), params.get("lora_alpha"), params.get("layer_range")
    if rank is not None and (not is_number(rank) or rank != int(rank) or rank < 1):
        raise _wrong(path, "r", rank, "a whole number from 1 on")
    if alpha is not None and (not is_positive(alpha)):
        raise _wrong(path, "lora_alpha", alpha, "a number above 0")
    if layers is not None and not _are_layers(layers):
        raise _wrong(path, "layer_range", layers, "a list of layer numbers")
    return TrainingConfig(
        path=path,
        rank=None if rank is None else int(rank),
        alpha=alpha,
        layers=None if layers is None else tuple(sorted(set(layers))),
    )


def _are_layers(value: object) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or not value:
        return False
    return all(type(item) is int and 0 <= item < MAX_LAYERS for item in value)


def _load(path: Path) -> object:
    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML's safe loader without merge keys and without endless numbers."""

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
                raise yaml.constructor.ConstructorError(None, None, "it has a merge key (<<)", node.start_mark)

        def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
            if node.tag in _NUMBER_TAGS and len(node.value) > MAX_NUMBER_CHARACTERS:
                raise yaml.constructor.ConstructorError(None, None, "it has a number too long to be one")
            return str(super().construct_scalar(node))

    with SourceFile.open(path) as file:
        if file.size_bytes > MAX_BYTES:
            raise _unreadable(path, f"{file.size_bytes:,} bytes", f"at most {MAX_BYTES:,}")
        content = file.read(0, file.size_bytes)
    try:
        return yaml.load(content, Loader)  # noqa: S506 - the class is derived from SafeLoader
    except (yaml.YAMLError, RecursionError, *_BAD_SCALAR) as error:
        reason = getattr(error, "problem", None) or str(error)
        raise _unreadable(path, reason, "YAML as the trainer writes it") from error


def _unreadable(path: Path, found: str, expected: str) -> CheckpointError:
    return CheckpointError(
        "the training configuration cannot be read",
        file=path,
        found=found,
        expected=expected,
        hint="mend it, or move it away and state the LoRA's alpha with --alpha",
    )


def _wrong(path: Path, name: str, value: object, expected: str) -> CheckpointError:
    return CheckpointError(
        f"the training configuration has a {name} that cannot be",
        file=path,
        # Not str(value): a list may hold itself, or be made of aliases that print without end.
        found=str(value)[:100] if isinstance(value, (int, float, str)) else f"a {type(value).__name__}",
        expected=expected,
        hint="mend it, or move it away and state the LoRA's alpha with --alpha",
    )
