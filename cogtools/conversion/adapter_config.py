"""PEFT's LoraConfig: how a file states how strong a LoRA is and where it goes.

diffusers has one in an entry of the safetensors header, with the transformer's name before every field; PEFT has one
in `adapter_config.json` beside the weights. Both hand all that it says to `LoraConfig`.

Source: peft 0.21, tuners/lora/config.py (`LoraConfig`), tuners/lora/layer.py (`LoraLayer.update_layer`: the scaling),
tuners/tuners_utils.py (`check_target_module_exists`), utils/other.py (`get_pattern_key`).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

from cogtools.checkpoint.plausible import MAX_NUMBER, is_positive
from cogtools.errors import Problem
from cogtools.formatting import MAX_SHOWN_CHARS
from cogtools.layouts.diffusers import module_path

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from cogtools.layouts.family import Module

TYPE = "LORA"
"""The `peft_type` of a LoRA."""

MAX_PATTERNS = 1000
"""The most keys of a rank_pattern or alpha_pattern that are evaluated. Real ones have a key per module at most."""

_PLAIN_PATTERN = re.compile(r"[\w.^$\\-]{1,200}", re.ASCII)
"""Patterns come from the file. Those with repetitions could take for ever, so they are not evaluated."""


_IN_LAYERS = r"(?:^|.*?\.){}\.(?P<layer>\d+)\."
"""How PEFT finds a layer's number in a path, by a `layers_pattern`."""


class FieldRule(NamedTuple):
    """What is known of a field of LoraConfig.

    Attributes:
        values: the values that change nothing, or whose effect is checked elsewhere.
        null: whether null is one of them, as it is where PEFT has no other default.
        fits: tells the same of a value, where there are many.
        expression: the regular expression that PEFT makes of a text in a value, and matches with every module.
        is_imported: whether the libraries import a module by the name that a value gives.
    """

    values: tuple[object, ...] = ()
    null: bool = True
    fits: Callable[[object], bool] | None = None
    expression: str | None = None
    is_imported: bool = False

    def knows(self, value: object) -> bool:
        """Whether the effect of this value is known."""
        if value is None:
            return self.null
        return any(_equal(value, known) for known in self.values) or (self.fits is not None and self.fits(value))


def _equal(value: object, known: object) -> bool:
    return type(value) is type(known) and value == known


def _always(_: object) -> bool:
    """Any value is checked elsewhere, or changes nothing."""
    return True


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_names(value: object) -> bool:
    """Whether it is an expression, or a list of names."""
    return isinstance(value, str) or _names(value) is not None


def _is_layers(value: object) -> bool:
    return value == [] or _layers(value) is not None


def _is_dropout(value: object) -> TypeGuard[float]:
    """Whether PEFT takes a value for a dropout; what is not above 0 is none."""
    return isinstance(value, (int, float)) and not value > 1


FIELDS: Mapping[str, FieldRule] = {
    # how strong, and where: judged by the checks of scale, rank and target_modules
    "r": FieldRule(fits=_always),
    "lora_alpha": FieldRule(fits=_always),
    "rank_pattern": FieldRule(fits=_always, expression=r"(.*\.)?({})$"),
    "alpha_pattern": FieldRule(fits=_always, expression=r"(.*\.)?({})$"),
    "use_rslora": FieldRule((False, True)),
    "target_modules": FieldRule(fits=_always, expression="{}"),
    "exclude_modules": FieldRule(fits=_is_names, expression="{}"),
    "layers_to_transform": FieldRule(fits=_is_layers),
    "layers_pattern": FieldRule(fits=lambda value: _layer_patterns(value) is not None, expression=_IN_LAYERS),
    # what else an adapter has: held against the tensors
    "use_dora": FieldRule((False, True)),
    "lora_bias": FieldRule((False, True)),
    "bias": FieldRule(("none", "all", "lora_only"), null=False),
    # how a training begins: of no effect once the weights are loaded
    "init_lora_weights": FieldRule((True, False, "gaussian", "orthogonal")),
    "lora_dropout": FieldRule(null=False, fits=_is_dropout),
    # about the file
    "peft_type": FieldRule(fits=_always),
    "peft_version": FieldRule(fits=_is_text),
    "base_model_name_or_path": FieldRule(fits=_is_text),
    "revision": FieldRule(fits=_is_text),
    "auto_mapping": FieldRule(fits=lambda value: isinstance(value, dict)),
    "inference_mode": FieldRule((False, True)),
    "fan_in_fan_out": FieldRule((False,)),
    # of effect only if another field is set
    "megatron_core": FieldRule(("megatron.core",), is_imported=True),
    "qalora_group_size": FieldRule((16,)),
    # without effect as long as they have PEFT's default
    "alora_invocation_tokens": FieldRule(),
    "arrow_config": FieldRule(),
    "corda_config": FieldRule(),
    "ensure_weight_tying": FieldRule((False,)),
    "eva_config": FieldRule(),
    "kasa_config": FieldRule(),
    "layer_replication": FieldRule(),
    "loftq_config": FieldRule(({},)),
    "lora_ga_config": FieldRule(),
    "megatron_config": FieldRule(is_imported=True),
    "modules_to_save": FieldRule(([],), expression=r"(^|.*\.){}($|\..*)"),
    "monteclora_config": FieldRule(),
    "runtime_config": FieldRule(null=False),
    "target_parameters": FieldRule(),
    "task_type": FieldRule(),
    "trainable_token_indices": FieldRule(),
    "use_bdlora": FieldRule(),
    "use_qalora": FieldRule((False,)),
    "velora_config": FieldRule(),
}
"""Every field of LoraConfig. diffusers hands all that a file states to it, and a field that it lacks is an error. What
a value does was measured: tests/support/judge.py loads and runs files that state them."""


class Pattern(NamedTuple):
    """A key of rank_pattern or alpha_pattern: a module's path or the end of one, perhaps anchored; and its value."""

    key: str
    modules: re.Pattern[str]
    value: float


def repeats_a_choice(expression: str) -> bool:
    """Whether a regular expression repeats a group in which there is a repetition or an alternative.

    Such ones can take exponential time to match a short text, as (a+)+b does. Where that cannot be told by looking at
    the text alone, the answer is yes.
    """
    if _HIDES_GROUPS.search(expression):
        return True
    chosen = [False]  # of each open group, the innermost last: whether there is a choice in it
    closed = False  # whether a group with a choice has just ended
    before, in_class = "", ""
    characters = iter(expression)
    for char in characters:
        if in_class:  # "]" at its beginning is one of its characters
            in_class = "" if char == "]" and in_class not in ("[", "[^") else in_class + char
            if char == "\\":
                next(characters, None)
            continue
        if closed and char in "*+{":
            return True
        closed = False
        if char == "\\":
            next(characters, None)
        elif char == "[":
            in_class = char
        elif char == "(":
            chosen.append(False)
        elif char == ")" and len(chosen) > 1:
            closed = chosen.pop()
            chosen[-1] |= closed
        elif char in "*+{|" or (char == "?" and before != "("):
            chosen[-1] = True
        before = char
    return False


_HIDES_GROUPS = re.compile(r"\(\?(#|[\w-]*x)", re.ASCII)
"""Comments, and the flag that allows them: a parenthesis in one means nothing."""


def plain_pattern(key: str, value: float) -> Pattern | None:
    """A key of rank_pattern or alpha_pattern; None if it is an expression that is not evaluated."""
    if not _PLAIN_PATTERN.fullmatch(key):
        return None
    try:
        return Pattern(key, re.compile(rf"(.*\.)?({key})$"), value)
    except re.error:
        return None


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The part of a LoraConfig that says how strong a LoRA is and where it goes. None: not stated, or not usable.

    Attributes:
        fields: all that is stated.
        rank: `r`.
        alpha: `lora_alpha`.
        rank_pattern: the ranks of modules that have another one; None if some key of it is not evaluated.
        alpha_pattern: the same of alphas.
        rank_stabilised: `use_rslora`.
        targets: `target_modules`, where it is a list.
        excluded: `exclude_modules`, where it is a list.
        has_expression: whether one of these two is a regular expression, which is not evaluated.
        layers: `layers_to_transform`: the only layers that are adapted.
        layer_patterns: how PEFT finds a layer's number in a path; () if that is not evaluated.
    """

    fields: Mapping[str, object] = field(default_factory=dict)
    rank: int | None = None
    alpha: float | None = None
    rank_pattern: tuple[Pattern, ...] | None = ()
    alpha_pattern: tuple[Pattern, ...] | None = ()
    rank_stabilised: bool = False
    targets: frozenset[str] | None = None
    excluded: frozenset[str] = frozenset()
    has_expression: bool = False
    layers: frozenset[int] | None = None
    layer_patterns: tuple[re.Pattern[str], ...] = ()

    def is_targeted(self, module: Module) -> bool:
        """Whether `target_modules` names a module: by its whole path, or by the end of it in one of the layers."""
        path = module_path(module)
        ends = path_ends(path)
        if self.targets is None or not self.excluded.isdisjoint(ends):
            return False
        return path in self.targets or (not self.targets.isdisjoint(ends) and self._is_in_layers(path))

    def _is_in_layers(self, path: str) -> bool:
        """Whether PEFT finds one of the layers' numbers in a path."""
        if self.layers is None or not self.layer_patterns:
            return True
        match = next((match for pattern in self.layer_patterns if (match := pattern.match(path))), None)
        return match is not None and int(match["layer"]) in self.layers

    def idle_patterns(self, modules: Iterable[Module]) -> list[tuple[str, str]]:
        """The keys of rank_pattern and alpha_pattern that are about none of these modules, with the field's name."""
        paths = list(map(module_path, modules))
        return [
            (name, pattern.key)
            for name, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern))
            for pattern in patterns or ()
            if not any(map(pattern.modules.match, paths))
        ]

    def rank_of(self, module: Module) -> float | None:
        """The rank that a module has; None if that is not known."""
        return _pattern_value(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: Module) -> float | None:
        """The alpha that a module has; None if that is not known."""
        return _pattern_value(self.alpha_pattern, module, self.alpha)

    def scaling_of(self, module: Module) -> float | None:
        """What a module's lora_B @ lora_A is multiplied by; None if that is not known."""
        rank, alpha = self.rank_of(module), self.alpha_of(module)
        if rank is None or alpha is None:
            return None
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def path_ends(path: str) -> set[str]:
    """A module's path, and every end of it that begins with a segment."""
    segments = path.split(".")
    return {".".join(segments[first:]) for first in range(len(segments))}


def _pattern_value(patterns: tuple[Pattern, ...] | None, module: Module, default: float | None) -> float | None:
    if patterns is None:
        return None
    if not patterns:
        return default
    path = module_path(module)
    return next((pattern.value for pattern in patterns if pattern.modules.match(path)), default)


@dataclass(frozen=True, slots=True)
class Stated:
    """What a file states in one place.

    Attributes:
        place: where: the header's entry, or the file beside it.
        config: as far as it can be used; None if nothing is stated, or nothing of it can be read.
        problems: what is wrong with it.
        doubts: what works with some releases only, or is ignored, or of which only the libraries know the effect.
        unevaluated: keys of rank_pattern and alpha_pattern that only PEFT evaluates.
        not_handed_on: what the libraries must not be given: they would import what it names, or match an expression
            for ever.
    """

    place: str
    config: AdapterConfig | None = None
    problems: tuple[Problem, ...] = ()
    doubts: tuple[Problem, ...] = ()
    unevaluated: tuple[Problem, ...] = ()
    not_handed_on: tuple[Problem, ...] = ()

    @property
    def is_nothing(self) -> bool:
        """Whether nothing is stated, right or wrong."""
        return self.config is None and not self.problems

    @property
    def targets(self) -> object:
        """`target_modules` as it stands there."""
        return None if self.config is None else self.config.fields.get("target_modules")

    def targeted(self, modules: Sequence[Module]) -> list[Module]:
        """Those of some modules that `target_modules` names; all of them, if it names none."""
        config = self.config
        return [module for module in modules if config and config.is_targeted(module)] or list(modules)


def parse_config(text: str, place: str, prefix: str = "") -> Stated:
    """Read a LoraConfig.

    Args:
        text: JSON: an object.
        place: where it stands, for messages.
        prefix: what stands before the name of every field that counts, as diffusers has it; "" for PEFT's own file.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Stated(place, problems=(Problem("unreadable", place, f"not JSON: {error}", "a JSON object"),))
    if not isinstance(content, dict):
        return Stated(
            place, problems=(Problem("unreadable", place, f"a JSON {type(content).__name__}", "a JSON object"),)
        )
    fields = {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}
    if not fields and prefix:
        missing = Problem("missing", place, "no key with the prefix", f"keys such as {prefix}r")
        return Stated(place, problems=(missing,))
    return _read_fields(fields, place, in_header=bool(prefix))


def _read_fields(fields: Mapping[str, object], place: str, *, in_header: bool) -> Stated:
    problems = [
        Problem("missing", name, "diffusers and PEFT then take 8", "the value")
        for name in ("r", "lora_alpha")
        if name not in fields
    ]
    rank, alpha, targets = fields.get("r"), fields.get("lora_alpha"), fields.get("target_modules")
    if "r" in fields and not _is_rank(rank):
        problems.append(Problem("invalid", "r", _shown(rank), "a whole number, 1 or more"))
    if "lora_alpha" in fields and not is_positive(alpha):
        problems.append(Problem("invalid", "lora_alpha", _shown(alpha), "a number above 0"))
    if fields.get("layers_pattern") and fields.get("layers_to_transform") is None:
        problems.append(Problem("invalid", "layers_pattern", "stated alone", "layers_to_transform beside it"))
    unknown = sorted(fields.keys() - FIELDS.keys())
    doubts = []
    if in_header:
        problems += [Problem("unexpected", name, expected="a field of PEFT's LoraConfig") for name in unknown]
        problems += _live_dropout(fields)
        if "rank_pattern" not in fields:
            doubts.append(Problem("missing", "rank_pattern", "diffusers 0.34 to 0.38 raises KeyError", "{}"))
    else:
        doubts += [Problem("unexpected", name, expected="a field of PEFT's LoraConfig") for name in unknown]
        if fields.get("peft_type") != TYPE:
            has_type = "peft_type" in fields
            found = _shown(fields["peft_type"]) if has_type else None
            problems.append(Problem("invalid" if has_type else "missing", "peft_type", found, TYPE))
    doubts += [
        Problem("unreadable", name, _shown(value), "a value whose effect is known")
        for name, value in fields.items()
        if name in FIELDS and not FIELDS[name].knows(value)
    ]
    unevaluated: list[Problem] = []
    config = AdapterConfig(
        fields=fields,
        rank=rank if _is_rank(rank) else None,
        alpha=alpha if is_positive(alpha) else None,
        rank_pattern=_patterns("rank_pattern", fields, _is_rank, problems, unevaluated),
        alpha_pattern=_patterns("alpha_pattern", fields, is_positive, problems, unevaluated),
        rank_stabilised=bool(fields.get("use_rslora")),
        targets=_names(targets),
        excluded=_names(fields.get("exclude_modules")) or frozenset(),
        has_expression=any(isinstance(fields.get(name), str) for name in ("target_modules", "exclude_modules")),
        layers=_layers(fields.get("layers_to_transform")),
        layer_patterns=_layer_patterns(fields.get("layers_pattern")) or (),
    )
    return Stated(place, config, tuple(problems), tuple(doubts), tuple(unevaluated), tuple(_not_handed_on(fields)))


def live_dropout(fields: Mapping[str, object]) -> float | None:
    """The dropout that is stated in diffusers' header, if it is live; None if not.

    diffusers leaves the layers of an adapter in training mode, so that it drops values when videos are made. PEFT
    switches it off when it loads a folder.
    """
    value = fields.get("lora_dropout")
    return value if _is_dropout(value) and value > 0 else None


def _live_dropout(fields: Mapping[str, object]) -> list[Problem]:
    if live_dropout(fields) is None:
        return []
    found = f"{_shown(fields['lora_dropout'])}: diffusers then drops values at random whenever it runs the model"
    return [Problem("invalid", "lora_dropout", found, "0")]


def _not_handed_on(fields: Mapping[str, object]) -> list[Problem]:
    """The values that the libraries must not be given."""
    problems = []
    for name, value in fields.items():
        rule = FIELDS.get(name)
        if rule is None:
            continue
        if rule.is_imported and not rule.knows(value):
            problems.append(Problem("invalid", name, f"{_shown(value)}: PEFT imports modules by such names", "null"))
        texts = [value] if isinstance(value, str) else value if isinstance(value, (list, dict)) else ()
        problems += [
            Problem("invalid", name, _shown(text), "an expression without nested repetition: this may match for ever")
            for text in texts
            if isinstance(text, str)
            and rule.expression is not None
            and repeats_a_choice(rule.expression.replace("{}", text))
        ]
    return problems


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
        what = "whole numbers, 1 or more" if name == "rank_pattern" else "numbers above 0"
        problems.append(Problem("invalid", name, _shown(value), f"an object of {what}, by module"))
        return ()
    if len(value) > MAX_PATTERNS:
        unevaluated.append(Problem("unreadable", name, f"{len(value):,} keys", f"at most {MAX_PATTERNS:,}"))
        return None
    patterns = {key: plain_pattern(key, item) for key, item in value.items()}
    unevaluated += [
        Problem("unreadable", name, _shown(key), "a module's path, or its end")
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


_ANY_LAYER = re.compile(r".*?\.[^.]*\.(?P<layer>\d+)\.", re.ASCII)
"""How PEFT finds a layer's number in a path without layers_pattern: behind two segments, while CogVideoX's layers are
the first segment. So `layers_to_transform` without layers_pattern finds none of the attention's modules."""


def _layer_patterns(value: object) -> tuple[re.Pattern[str], ...] | None:
    """How PEFT finds a layer's number in a path, by `layers_pattern`; None if that is not evaluated."""
    if value in (None, "", []):
        return (_ANY_LAYER,)
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(
        isinstance(name, str) and _PLAIN_PATTERN.fullmatch(name) for name in names
    ):
        return None
    try:
        return tuple(re.compile(_IN_LAYERS.replace("{}", name), re.ASCII) for name in names)
    except re.error:
        return None


def _is_rank(value: object) -> TypeGuard[int]:
    return type(value) is int and is_positive(value)


def _shown(value: object) -> str:
    """A value from JSON in short."""
    if isinstance(value, int) and abs(value) >= MAX_NUMBER:
        return f"a number of {len(str(abs(value)))} digits"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return "values nested without end"
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 1] + "…"


def config_fields(
    ranks: Mapping[Module, int], alphas: Mapping[Module, float], parts: Collection[str] = ()
) -> dict[str, object]:
    """The fields that state a LoRA's scale: all that some release of diffusers from 0.34 to 0.42 needs.

    `target_modules` has full module paths: so the file itself tells which layers it adapts, and PEFT does not warn
    about layers without an adapter.

    Args:
        ranks: of every module.
        alphas: of every module, so that the update is alpha / rank * lora_B @ lora_A.
        parts: the parts that adapters have beside their factors: a bias of lora_B, DoRA's magnitude vector.
    """
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module_path(module): value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module_path(module): value for module, value in alphas.items() if value != alpha},
        "target_modules": sorted(map(module_path, ranks)),
        "use_dora": "magnitude" in parts,
        "lora_bias": "bias" in parts,
    }


def _most_common(values: Iterable[float]) -> float:
    return Counter(values).most_common(1)[0][0]
