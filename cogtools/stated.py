"""What a LoRA file states of its scale and its modules, read as diffusers and PEFT read it.

diffusers has it in the header of the safetensors file, PEFT in a file of its own beside it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

from cogtools.checkpoint.storage import SourceFile, is_file
from cogtools.errors import CheckpointError, CogtoolsError, Problem
from cogtools.layouts import diffusers
from cogtools.layouts.diffusers import module_path
from cogtools.layouts.naming import DIFFUSERS, Naming
from cogtools.layouts.peft import CONFIG_FIELDS, CONFIG_NAME, AdapterConfig, is_plain_pattern
from cogtools.numbers import is_positive

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from cogtools.checkpoint.index import Checkpoint
    from cogtools.layouts.cogvideox import LoraKey

MAX_CONFIG_BYTES = 1 << 20
"""The longest adapter_config.json that is read. Real ones have 1 kB."""

_ABSENT = {
    "r": "diffusers and PEFT then take 8",
    "lora_alpha": "diffusers and PEFT then take 8",
}
_CHANGES_THE_LORA = ("use_dora", "lora_bias")
"""Fields that, when true, ask for tensors that a LoRA of the SAT trainer does not have."""


@dataclass(frozen=True, slots=True)
class Stated:
    """What a file states.

    Attributes:
        config: as far as it can be used; None if nothing is stated, or nothing of it can be read.
        problems: what is wrong with it.
        doubts: what works with some releases only, or cannot be told.
        targets: `target_modules` as it stands there.
        unstated_scaling: what a file that states nothing is run at; None if it states something, or is not run.
    """

    config: AdapterConfig | None
    problems: tuple[Problem, ...] = ()
    doubts: tuple[Problem, ...] = ()
    targets: object = None
    unstated_scaling: float | None = None

    @property
    def is_nothing(self) -> bool:
        """Whether nothing is stated, right or wrong."""
        return self.config is None and not self.problems

    def targeted(self, names: list[LoraKey]) -> list[LoraKey]:
        """Those of some tensors whose modules `target_modules` names; all of them, if it names none."""
        config = self.config
        return [name for name in names if config and config.is_targeted(module_path(name), name.layer)] or names

    def scaling_of(self, module: str) -> float | None:
        """What a module's lora_B @ lora_A is multiplied by when the file is loaded; None if that cannot be told."""
        return self.unstated_scaling if self.config is None else self.config.scaling_of(module)


def read_stated(file: Checkpoint, naming: Naming) -> Stated:
    """Read what a LoRA file states of its scale and its modules.

    Args:
        file: the safetensors file.
        naming: whose names its tensors have: that tells where it states its scale.
    """
    place = diffusers.ADAPTER_METADATA_KEY if naming is DIFFUSERS else CONFIG_NAME
    try:
        text = file.metadata.get(place) if naming is DIFFUSERS else _peft_config(file.path.with_name(place))
    except CogtoolsError as error:
        return Stated(None, (Problem("unreadable", place, error.found or error.what, error.expected),))
    if text is None:
        # diffusers takes alpha to be the rank; PEFT loads nothing.
        return Stated(None, unstated_scaling=1.0 if naming is DIFFUSERS else None)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Stated(None, (Problem("unreadable", place, f"no JSON: {error}", "a JSON object"),))
    if not isinstance(content, dict):
        return Stated(None, (Problem("unreadable", place, f"a JSON {type(content).__name__}", "a JSON object"),))
    fields = content
    if naming is DIFFUSERS:
        prefix = diffusers.PREFIX
        fields = {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}
        if not fields:
            return Stated(None, (Problem("missing", place, "no key with the prefix", f"keys such as {prefix}r"),))
    return _read_fields(fields, is_diffusers=naming is DIFFUSERS)


def _peft_config(path: Path) -> str | None:
    """The text of an adapter_config.json; None if there is none."""
    if not is_file(path):
        return None
    with SourceFile.open(path) as file:
        if file.size_bytes > MAX_CONFIG_BYTES:
            raise CheckpointError(
                "the adapter's configuration cannot be read",
                file=path,
                found=f"{file.size_bytes:,} bytes",
                expected=f"at most {MAX_CONFIG_BYTES:,}",
            )
        return file.read(0, file.size_bytes).decode(errors="replace")


def _read_fields(fields: Mapping[str, object], *, is_diffusers: bool) -> Stated:
    problems = [Problem("missing", name, _ABSENT[name], "the value") for name in _ABSENT if name not in fields]
    rank, alpha, targets = fields.get("r"), fields.get("lora_alpha"), fields.get("target_modules")
    if "r" in fields and not _is_rank(rank):
        problems.append(Problem("wrong", "r", _short(rank), "a whole number from 1 on"))
    if "lora_alpha" in fields and not is_positive(alpha):
        problems.append(Problem("wrong", "lora_alpha", _short(alpha), "a number above 0"))
    problems += [
        Problem("wrong", name, _short(fields[name]), "false") for name in _CHANGES_THE_LORA if fields.get(name)
    ]
    unknown = sorted(fields.keys() - CONFIG_FIELDS)
    doubts = []
    if is_diffusers:
        problems += [Problem("unexpected", name, expected="a field of PEFT's LoraConfig") for name in unknown]
        if "rank_pattern" not in fields:
            doubts.append(Problem("missing", "rank_pattern", "diffusers 0.34 to 0.38 raises KeyError", "{}"))
    else:
        doubts += [Problem("unexpected", name, expected="a field of PEFT's LoraConfig") for name in unknown]
    ranks, rank_doubts = _pattern("rank_pattern", fields.get("rank_pattern"), problems)
    alphas, alpha_doubts = _pattern("alpha_pattern", fields.get("alpha_pattern"), problems)
    is_list = isinstance(targets, list) and all(isinstance(target, str) for target in targets)
    config = AdapterConfig(
        rank=rank if _is_rank(rank) else None,
        alpha=alpha if is_positive(alpha) else None,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        rank_stabilised=bool(fields.get("use_rslora")),
        targets=frozenset(targets) if is_list and isinstance(targets, list) else None,
        layers=_layers(fields.get("layers_to_transform")),
    )
    return Stated(config, tuple(problems), (*doubts, *rank_doubts, *alpha_doubts), targets)


def _pattern(name: str, value: object, problems: list[Problem]) -> tuple[dict[str, float], list[Problem]]:
    """A rank_pattern or alpha_pattern as far as it can be used, and what cannot be told of it."""
    if value is None:
        return {}, []
    if not isinstance(value, dict) or not all(is_positive(item) for item in value.values()):
        problems.append(Problem("wrong", name, _short(value), "an object of numbers above 0, by module"))
        return {}, []
    doubts = [
        Problem("unreadable", name, _short(key), "a module's path, or its end")
        for key in value
        if not is_plain_pattern(key)
    ]
    return ({}, doubts) if doubts else (dict(value), [])


def _layers(value: object) -> frozenset[int] | None:
    listed = value if isinstance(value, list) else [value]
    numbers = [number for number in listed if isinstance(number, int)]
    return frozenset(numbers) if len(numbers) == len(listed) else None


def _is_rank(value: object) -> TypeGuard[int]:
    return type(value) is int and is_positive(value)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"
