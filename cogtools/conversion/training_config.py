"""What the trainer's `training_config.yaml` says of a LoRA: its rank, its alpha, the layers that it was trained on.

The trainer writes the file into the save folder, beside the folders of the iterations. In it, the LoRA stands under
model.network_config.params.modules.lora_config.params: `r` always, `lora_alpha` and `layer_range` if the user set
them (SwissArmyTransformer, sat/model/finetune/lora2.py, `LoraMixin`).

The file comes from a stranger as much as the checkpoint does. It is read by PyYAML's safe loader, which makes plain
data only; merge keys, which can make a short file grow without bound, are refused.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

from cogtools.checkpoint.limits import MAX_TRAINING_CONFIG_BYTES
from cogtools.checkpoint.plausible import is_number, is_positive
from cogtools.errors import CheckpointError
from cogtools.layouts.family import MAX_LAYERS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cogtools.checkpoint.index import Checkpoint, SmallFile
    from cogtools.checkpoint.paths import AnyPath

FILE_NAME = "training_config.yaml"

MAX_NUMBER_CHARACTERS = 100
"""The longest number that is read. YAML has numbers to the base 60, which take long to make if they are long."""

MAX_SHOWN_ITEMS = 8
"""How many items of a list an error shows."""

_HINT = "fix it; export-lora does without it if --alpha states the LoRA's alpha"

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
        layers: `layer_range`, the layers that were trained; negative ones count from the last layer back.
    """

    path: AnyPath
    rank: int | None
    alpha: float | None
    layers: tuple[int, ...] | None

    def layers_of(self, count: int) -> tuple[int, ...]:
        """The layers that were trained of a transformer of so many: SAT takes the numbers as indices of a list."""
        return tuple(sorted({layer + count if layer < 0 else layer for layer in self.layers or ()}))


_RECORD_LINE = "# cogtools: "
"""Begins the first line of a file that cogtools wrote; the rest of the line is the record of the export."""


def config_text(rank: int, alpha: float, layers: Sequence[int] = (), record: str | None = None) -> str:
    """A training configuration with nothing but a LoRA in it: SAT does not read it there, cogtools does.

    Args:
        rank: of every module.
        alpha: of every module.
        layers: those that are adapted, where that is not all.
        record: how the LoRA was made.
    """
    params = [f"r: {rank}", f"lora_alpha: {_yaml_number(alpha)}"]
    params += [f"layer_range: [{', '.join(map(str, layers))}]"] if layers else []
    lines = [_RECORD_LINE + record] if record is not None else []
    lines += ["  " * depth + f"{name}:" for depth, name in enumerate(_PATH)]
    return "\n".join([*lines, *("  " * len(_PATH) + param for param in params)]) + "\n"


def _yaml_number(value: float) -> str:
    """A number as YAML 1.1 has it: with a dot before an exponent, or it would be text."""
    mantissa, e, exponent = repr(value).partition("e")
    return mantissa + (".0" if e and "." not in mantissa else "") + e + exponent


def record_in(content: bytes) -> str | None:
    """How the LoRA beside a training configuration was made, where cogtools wrote both; None if it did not."""
    first, newline, _ = content.partition(b"\n")
    text = first.decode(errors="replace")
    return text.removeprefix(_RECORD_LINE) if newline and text.startswith(_RECORD_LINE) else None


def find_training_config(checkpoint: Checkpoint) -> SmallFile | None:
    """The training configuration beside a checkpoint, or in the save folder above its iteration's folder.

    Raises:
        CheckpointError: if it cannot be read, or is too long to be one.
    """
    return checkpoint.read_beside(FILE_NAME, MAX_TRAINING_CONFIG_BYTES, above=True)


def read_training_config(file: SmallFile, *, with_alpha: bool = True) -> TrainingConfig:
    """Read what a training configuration says of the LoRA.

    Args:
        file: the file.
        with_alpha: read `lora_alpha`; if not, whatever stands there does not matter.

    Raises:
        CheckpointError: if the file is not YAML, or a value in it is not valid.
    """
    path = file.path
    params: object = load_yaml(file)
    for name in _PATH:
        params = params.get(name) if isinstance(params, dict) else None
    if not isinstance(params, dict):
        params = {}
    rank = _number(params.get("r"))
    alpha = _number(params.get("lora_alpha")) if with_alpha else None
    layers = params.get("layer_range")
    if rank is not None and (not is_number(rank) or rank != int(rank) or rank < 1):
        raise invalid(path, "r", params["r"], "a whole number, 1 or more")
    if alpha is not None and (not is_positive(alpha)):
        raise invalid(path, "lora_alpha", params["lora_alpha"], "a number above 0")
    if layers is not None and not _are_layers(layers):
        raise invalid(path, "layer_range", layers, "a list of layer numbers")
    return TrainingConfig(
        path=path,
        rank=None if rank is None else int(rank),
        alpha=alpha,
        layers=None if layers is None else tuple(sorted(set(layers))),
    )


def _number(value: object) -> object:
    """A value, as a number if it is the text of one: YAML 1.1 takes 1e0 for text, and people quote numbers."""
    if not isinstance(value, str) or len(value) > MAX_NUMBER_CHARACTERS:
        return value
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    return value


def _are_layers(value: object) -> TypeGuard[list[int]]:
    if not isinstance(value, list) or not value:
        return False
    return all(type(item) is int and -MAX_LAYERS <= item < MAX_LAYERS for item in value)


def load_yaml(file: SmallFile, hint: str = _HINT) -> object:
    """What stands in a training configuration, as plain data.

    Raises:
        CheckpointError: if it is not YAML, or makes more data than it has text.
    """
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

    try:
        return yaml.load(file.content, Loader)  # noqa: S506 - the class is derived from SafeLoader
    except (yaml.YAMLError, RecursionError, *_BAD_SCALAR) as error:
        reason = getattr(error, "problem", None) or str(error)
        raise _unreadable(file.path, reason, "YAML as the trainer writes it", hint) from error


def _unreadable(path: AnyPath, found: str, expected: str, hint: str) -> CheckpointError:
    return CheckpointError(
        "the training configuration cannot be read",
        file=path,
        found=found,
        expected=expected,
        hint=hint,
    )


def invalid(path: AnyPath, name: str, value: object, expected: str, hint: str = _HINT) -> CheckpointError:
    """The error for a value in a training configuration that cannot be."""
    return CheckpointError(
        f"`{name}` in the training configuration is not valid",
        file=path,
        found=_shown(value),
        expected=expected,
        hint=hint,
    )


def _shown(value: object) -> str:
    """A value in short. Not repr(value): a list may hold itself, or be made of aliases that print without end."""
    if isinstance(value, list):
        items = [_shown(item) if not isinstance(item, list) else "[…]" for item in value[:MAX_SHOWN_ITEMS]]
        return "[" + ", ".join(items + ["…"] * (len(value) > MAX_SHOWN_ITEMS)) + "]"
    return repr(value)[:MAX_NUMBER_CHARACTERS] if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"
