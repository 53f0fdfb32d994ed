"""What a LoRA file states of its scale and its modules, read as diffusers and PEFT read it.

diffusers has it in the header of the safetensors file, PEFT in a file of its own beside it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

from cogtools.checkpoint.files import SourceFile, is_file
from cogtools.checkpoint.limits import MAX_ADAPTER_CONFIG_BYTES
from cogtools.checkpoint.plausible import MAX_NUMBER, is_positive
from cogtools.errors import CheckpointError, CogtoolsError, Problem, ProblemKind
from cogtools.layouts import diffusers
from cogtools.layouts.diffusers import module_path
from cogtools.layouts.naming import DIFFUSERS, Naming
from cogtools.layouts.peft import (
    CONFIG_FIELDS,
    CONFIG_NAME,
    MAX_PATTERNS,
    TYPE,
    AdapterConfig,
    Pattern,
    plain_pattern,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from cogtools.checkpoint.index import Checkpoint
    from cogtools.layouts.family import LoraKey

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
        doubts: what works with some releases only, or is ignored.
        unevaluated: keys of rank_pattern and alpha_pattern of which only PEFT can tell what they mean.
        targets: `target_modules` as it stands there.
        unstated_scaling: what a file that states nothing is run at; None if it states something, or is not run.
    """

    config: AdapterConfig | None
    problems: tuple[Problem, ...] = ()
    doubts: tuple[Problem, ...] = ()
    unevaluated: tuple[Problem, ...] = ()
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
        """What a module's lora_B @ lora_A is multiplied by when the file is loaded; None if that is not known."""
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
        if file.size_bytes > MAX_ADAPTER_CONFIG_BYTES:
            raise CheckpointError(
                "the adapter's configuration cannot be read",
                file=path,
                found=f"{file.size_bytes:,} bytes",
                expected=f"at most {MAX_ADAPTER_CONFIG_BYTES:,}",
            )
        return file.read(0, file.size_bytes).decode(errors="replace")


def _read_fields(fields: Mapping[str, object], *, is_diffusers: bool) -> Stated:
    problems = [Problem("missing", name, _ABSENT[name], "the value") for name in _ABSENT if name not in fields]
    rank, alpha, targets = fields.get("r"), fields.get("lora_alpha"), fields.get("target_modules")
    if "r" in fields and not _is_rank(rank):
        problems.append(Problem("invalid", "r", _short(rank), "a whole number, 1 or more"))
    if "lora_alpha" in fields and not is_positive(alpha):
        problems.append(Problem("invalid", "lora_alpha", _short(alpha), "a number above 0"))
    problems += [
        Problem("invalid", name, _short(fields[name]), "false") for name in _CHANGES_THE_LORA if fields.get(name)
    ]
    unknown = sorted(fields.keys() - CONFIG_FIELDS)
    doubts = []
    if is_diffusers:
        problems += [Problem("unexpected", name, expected="a field of PEFT's LoraConfig") for name in unknown]
        if "rank_pattern" not in fields:
            doubts.append(Problem("missing", "rank_pattern", "diffusers 0.34 to 0.38 raises KeyError", "{}"))
    else:
        doubts += [Problem("unexpected", name, expected="a field of PEFT's LoraConfig") for name in unknown]
        if fields.get("peft_type") != TYPE:
            kind: ProblemKind = "invalid" if "peft_type" in fields else "missing"
            found = _short(fields["peft_type"]) if "peft_type" in fields else None
            problems.append(Problem(kind, "peft_type", found, TYPE))
    unevaluated: list[Problem] = []
    config = AdapterConfig(
        rank=rank if _is_rank(rank) else None,
        alpha=alpha if is_positive(alpha) else None,
        rank_pattern=_patterns("rank_pattern", fields, _is_rank, problems, unevaluated),
        alpha_pattern=_patterns("alpha_pattern", fields, is_positive, problems, unevaluated),
        rank_stabilised=bool(fields.get("use_rslora")),
        targets=_names(targets),
        excluded=_names(fields.get("exclude_modules")) or frozenset(),
        has_expression=any(isinstance(fields.get(name), str) for name in ("target_modules", "exclude_modules")),
        layers=_layers(fields.get("layers_to_transform")),
    )
    return Stated(config, tuple(problems), tuple(doubts), tuple(unevaluated), targets)


def _patterns(
    name: str,
    fields: Mapping[str, object],
    is_value: Callable[[object], bool],
    problems: list[Problem],
    unevaluated: list[Problem],
) -> tuple[Pattern, ...] | None:
    """A rank_pattern or alpha_pattern; None if some of its keys are not evaluated."""
    value = fields.get(name, {})
    if not isinstance(value, dict) or not all(map(is_value, value.values())):
        what = "whole numbers, 1 or more" if is_value is _is_rank else "numbers above 0"
        problems.append(Problem("invalid", name, _short(value), f"an object of {what}, by module"))
        return ()
    if len(value) > MAX_PATTERNS:
        unevaluated.append(Problem("unreadable", name, f"{len(value):,} keys", f"at most {MAX_PATTERNS:,}"))
        return None
    patterns = {key: plain_pattern(key, item) for key, item in value.items()}
    unevaluated += [
        Problem("unreadable", name, _short(key), "a module's path, or its end")
        for key, pattern in patterns.items()
        if pattern is None
    ]
    plain = tuple(pattern for pattern in patterns.values() if pattern is not None)
    return plain if len(plain) == len(patterns) else None


def _names(value: object) -> frozenset[str] | None:
    is_list = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return frozenset(value) if is_list and isinstance(value, list) else None


def _layers(value: object) -> frozenset[int] | None:
    """The layers of `layers_to_transform`; None if it restricts nothing, as no list or an empty one does."""
    listed = value if isinstance(value, list) else [value]
    numbers = [number for number in listed if isinstance(number, int)]
    return frozenset(numbers) if numbers and len(numbers) == len(listed) else None


def _is_rank(value: object) -> TypeGuard[int]:
    return type(value) is int and is_positive(value)


def _short(value: object) -> str:
    if isinstance(value, int) and abs(value) >= MAX_NUMBER:
        return f"a number of {len(str(abs(value)))} digits"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "values nested without end"
    return text if len(text) <= 80 else text[:79] + "…"
