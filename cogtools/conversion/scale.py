"""What a LoRA's updates are multiplied by: who states it, and how each layout's reader takes it.

Training multiplies lora_B @ lora_A of every module by alpha / rank. Files state that in different places, or not at
all, and each program looks in its own place only. So what a file *states* is kept apart from what a program *does*
with it:

    Statement        one place that states a scale, and the scaling that it gives to each module
    Scale            what the LoRA means: the statement that counts, and the others
    scaling_as_run   what the program of a layout multiplies each module's update by when it loads the file
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from cogtools.checkpoint.gather import scalar
from cogtools.checkpoint.plausible import is_positive
from cogtools.conversion.adapter_config import Stated, config_fields, parse_config
from cogtools.conversion.options import BY_HAND, BY_SCALING
from cogtools.conversion.training_config import FILE_NAME as TRAINING_CONFIG
from cogtools.conversion.training_config import config_text
from cogtools.errors import OptionError
from cogtools.layouts import diffusers, peft
from cogtools.layouts.sat import DEFAULT_ALPHA

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from cogtools.checkpoint.tensors import TensorEntry
    from cogtools.conversion.record import ExportRecord
    from cogtools.conversion.training_config import TrainingConfig
    from cogtools.layouts.family import Module
    from cogtools.layouts.lora import LoraLayout, ScalePlace

BY_CONFIG, BY_DEFAULT = TRAINING_CONFIG, "default"
BY_HEADER, BY_ADAPTER_CONFIG = diffusers.METADATA_KEY, peft.CONFIG_NAME
BY_PEFT_HEADER = f"{BY_HEADER} ({peft.PREFIX})"
BY_TENSORS, BY_FINETRAINERS, BY_RECORD, BY_NOTHING = "alpha tensors", "lora_config", "cogtools", "nothing"

ALPHA_SOURCES = {
    BY_HAND: "given by --alpha",
    BY_SCALING: "given by --scaling",
    BY_CONFIG: "from training_config.yaml",
    BY_DEFAULT: "SAT's default",
    BY_HEADER: "stated in the header",
    BY_ADAPTER_CONFIG: "from adapter_config.json",
    BY_PEFT_HEADER: "stated in the header, under PEFT's prefix",
    BY_TENSORS: "stated in alpha tensors",
    BY_FINETRAINERS: "stated in the header entry lora_config of finetrainers, which diffusers ignores",
    BY_RECORD: "recorded by cogtools when it was exported",
    BY_NOTHING: "nothing states the scale",
}
"""Where a LoRA's scale comes from, by the names that reports have for it."""

_PLACES: dict[str, ScalePlace] = {
    BY_HEADER: "header",
    BY_ADAPTER_CONFIG: "adapter_config",
    BY_TENSORS: "alpha_tensors",
    BY_CONFIG: "training_config",
    BY_DEFAULT: "training_config",
}
"""In which place, as layouts name them, a statement stands."""


class Statement(NamedTuple):
    """What one place states of the scale.

    Attributes:
        source: the place, a key of `ALPHA_SOURCES`.
        scalings: what each module's update is multiplied by; None where that is not known.
        alphas: the alpha of each module, where it states one.
    """

    source: str
    scalings: dict[Module, float | None]
    alphas: dict[Module, float | None]

    @property
    def alpha(self) -> float | None:
        """The alpha that all modules have; None if they differ, or none is stated."""
        found = set(self.alphas.values())
        return found.pop() if len(found) == 1 else None

    @property
    def scaling(self) -> float | None:
        """What every module's update is multiplied by; None if that differs, or is not known."""
        found = set(self.scalings.values())
        return found.pop() if len(found) == 1 else None

    @property
    def place(self) -> ScalePlace | None:
        """Where it stands, as layouts name the place; None if no program looks there."""
        return _PLACES.get(self.source)


class Scale(NamedTuple):
    """What a LoRA's updates are multiplied by, and who says so.

    Attributes:
        statement: the one that counts.
        others: other places that state something.
    """

    statement: Statement
    others: tuple[Statement, ...] = ()

    @property
    def scalings(self) -> dict[Module, float | None]:
        """What each module's update is multiplied by."""
        return self.statement.scalings

    @property
    def alpha(self) -> float | None:
        """The alpha that all modules have; None if they differ, or none is stated."""
        return self.statement.alpha

    @property
    def source(self) -> str:
        """Where it is stated: a key of `ALPHA_SOURCES`."""
        return self.statement.source


class Factors(NamedTuple):
    """What a scale is worked out from.

    Attributes:
        ranks: of every module.
        alphas: the tensors that hold an alpha, by module.
    """

    ranks: Mapping[Module, int]
    alphas: Mapping[Module, TensorEntry]


def _by_alpha(source: str, factors: Factors, alpha_of: Callable[[Module], float | None]) -> Statement:
    alphas = {module: alpha_of(module) for module in factors.ranks}
    scalings = {
        module: None if alpha is None or not factors.ranks[module] else alpha / factors.ranks[module]
        for module, alpha in alphas.items()
    }
    return Statement(source, scalings, alphas)


def by_alpha(alpha: float, factors: Factors, source: str = BY_HAND) -> Statement:
    """One alpha for all modules: the scaling of each is alpha / rank.

    Raises:
        OptionError: if alpha is not a number above 0.
    """
    return _by_alpha(source, factors, lambda _: checked("alpha", alpha))


def by_scaling(scaling: float, factors: Factors) -> Statement:
    """One scaling for all modules, whatever their ranks.

    Raises:
        OptionError: if it is not a number above 0.
    """
    number = checked("scaling", scaling)
    return Statement(
        BY_SCALING, dict.fromkeys(factors.ranks, number), {module: number * r for module, r in factors.ranks.items()}
    )


def by_training_config(config: TrainingConfig | None, factors: Factors) -> Statement:
    """What SAT's training used: the configuration's alpha, else SAT's default."""
    if config is not None and config.alpha is not None:
        return by_alpha(config.alpha, factors, BY_CONFIG)
    return by_alpha(DEFAULT_ALPHA, factors, BY_DEFAULT)


def by_config(stated: Stated, factors: Factors) -> Statement | None:
    """What a LoraConfig states; None if it states nothing that can be used."""
    config = stated.config
    if config is None or config.alpha is None:
        return None
    scalings = {module: config.scaling_of(module) for module in factors.ranks}
    return Statement(stated.place, scalings, {module: config.alpha_of(module) for module in factors.ranks})


def by_tensors(factors: Factors) -> Statement | None:
    """What the tensors of alphas state; a module without one is run at 1. None if no module has one."""
    if factors.alphas.keys().isdisjoint(factors.ranks):
        return None
    found = {module: scalar(entry) for module, entry in factors.alphas.items()}

    def alpha_of(module: Module) -> float | None:
        return found[module] if module in found else float(factors.ranks[module])

    return _by_alpha(BY_TENSORS, factors, alpha_of)


def by_finetrainers(metadata: Mapping[str, str], factors: Factors) -> Statement | None:
    """What finetrainers writes into its header entry `lora_config`, which diffusers ignores; None if it did not."""
    if BY_FINETRAINERS not in metadata:
        return None
    config = parse_config(metadata[BY_FINETRAINERS], BY_FINETRAINERS).config
    if config is None or config.alpha is None or config.rank is None:
        return None
    scaling = config.alpha / config.rank
    return Statement(BY_FINETRAINERS, dict.fromkeys(factors.ranks, scaling), dict.fromkeys(factors.ranks, config.alpha))


def by_peft_header(metadata: Mapping[str, str], factors: Factors) -> Statement | None:
    """What the header of a PEFT folder's file states, for one that has lost its adapter_config.json; None if nothing.

    diffusers' `load_lora_adapter` reads it, if it is called with PEFT's prefix.
    """
    if diffusers.METADATA_KEY not in metadata:
        return None
    return by_config(parse_config(metadata[diffusers.METADATA_KEY], BY_PEFT_HEADER, peft.PREFIX), factors)


def by_record(record: ExportRecord, factors: Factors) -> Statement | None:
    """What cogtools recorded of an export whose file does not state the scale; None if it did not.

    A scale that was multiplied into the weights is 1 from then on.
    """
    if record.scale == "fold":
        return Statement(BY_RECORD, dict.fromkeys(factors.ranks, 1.0), {})
    if record.scale != "none":
        return None
    scalings = {module: record.scaling_of(rank) for module, rank in factors.ranks.items()}
    if None in scalings.values():
        return None
    return Statement(BY_RECORD, scalings, dict.fromkeys(factors.ranks, record.alpha))


def by_nothing(factors: Factors) -> Statement:
    """What is taken where nothing states a scale: 1, as every program but SAT takes it."""
    return Statement(BY_NOTHING, dict.fromkeys(factors.ranks, 1.0), {})


def by_reader(layout: LoraLayout, factors: Factors) -> Statement | None:
    """What the program of a layout takes where nothing states a scale; None if it loads nothing."""
    if layout.unstated_scaling is None:
        return None
    scalings = {module: layout.scaling_unstated(rank) if rank else None for module, rank in factors.ranks.items()}
    return Statement(BY_NOTHING, scalings, {})


def scaling_as_run(
    layout: LoraLayout, statements: Mapping[ScalePlace, Statement], factors: Factors
) -> Statement | None:
    """What the program of a layout multiplies each update by when it loads the file; None if it loads nothing.

    Args:
        layout: the program's.
        statements: what the file states, by place.
        factors: the LoRA's ranks.
    """
    own = statements.get(layout.scale)
    return own if own is not None else by_reader(layout, factors)


def checked(name: str, value: float) -> float:
    """A number that a user gave, whole ones as whole numbers.

    Raises:
        OptionError: if it is not a number above 0.
    """
    if not is_positive(value):
        raise OptionError(f"{name} must be a number above 0", found=str(value), hint=f"leave --{name} out if unsure")
    return int(value) if value == int(value) else value


class Carried(NamedTuple):
    """How a file carries its scale.

    Attributes:
        header: entries of its header.
        files: files beside it, by name.
        alphas: alpha tensors, by module.
    """

    header: dict[str, str] = {}  # noqa: RUF012 - never changed
    files: dict[str, bytes] = {}  # noqa: RUF012
    alphas: dict[Module, float] = {}  # noqa: RUF012


def carry(
    layout: LoraLayout,
    ranks: Mapping[Module, int],
    alphas: Mapping[Module, float],
    *,
    parts: Collection[str] = (),
    layers: Sequence[int] = (),
    record: str | None = None,
) -> Carried:
    """State a scale in the place where a layout's reader looks for it.

    Args:
        layout: the layout. Where it has one alpha for all modules, they have one.
        ranks: of every module.
        alphas: of every module: its scaling is alpha / rank.
        parts: the parts that adapters of the LoRA have beside their factors.
        layers: those that it adapts, where that is not all; () if it is.
        record: how the file was made, for a file beside it that has no header.
    """
    match layout.scale:
        case "header":
            fields = config_fields(ranks, alphas, parts)
            return Carried({diffusers.METADATA_KEY: _header_text(fields, diffusers.PREFIX)})
        case "adapter_config":
            fields = config_fields(ranks, alphas, parts)
            text = json.dumps({**peft.CONFIG_DEFAULTS, **fields}, indent=2, sort_keys=True) + "\n"
            header = {diffusers.METADATA_KEY: _header_text(fields, layout.written.prefix)}
            return Carried(header, {peft.CONFIG_NAME: text.encode()})
        case "alpha_tensors":
            return Carried(alphas=dict(alphas))
        case "training_config":
            rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
            text = config_text(rank, alpha, layers, record)
            return Carried(files={TRAINING_CONFIG: text.encode()})
        case _:
            return Carried()


def _header_text(fields: Mapping[str, object], prefix: str) -> str:
    """A LoraConfig as diffusers has it in a header: a JSON object whose fields have a prefix."""
    return json.dumps({prefix + name: value for name, value in fields.items()}, sort_keys=True)
