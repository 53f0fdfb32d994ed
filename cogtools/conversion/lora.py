"""A LoRA, whatever file it is in: its modules, their factors and ranks, and who states its scale.

One function reads it from any opened checkpoint, for every command. What is odd about the file is kept beside it:
keys that mean nothing, keys that are spelled as no program reads them, tensors that cannot be read.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from cogtools.checkpoint.limits import MAX_ADAPTER_CONFIG_BYTES
from cogtools.checkpoint.plausible import is_positive
from cogtools.checkpoint.tensors import whole_tensor
from cogtools.conversion import scale as scales
from cogtools.conversion.adapter_config import Stated, parse_config
from cogtools.conversion.record import RECORD_KEY, ExportRecord, read_record
from cogtools.conversion.scale import Factors, Scale, Statement
from cogtools.conversion.training_config import TrainingConfig, find_training_config, read_training_config, record_in
from cogtools.errors import CheckpointError, CogtoolsError, ExportError, OptionError, Problem
from cogtools.formatting import number
from cogtools.layouts import diffusers, peft, sat
from cogtools.layouts.diffusers import module_path
from cogtools.layouts.family import OTHER_SAT_MODELS, LoraKey, Module, Transformer, hidden_of, rank_of, recognise
from cogtools.layouts.folded import ATTENTION_KINDS, Kind, fold_modules, folded_names
from cogtools.layouts.lora import lora_keys, other_adapter
from cogtools.layouts.recognition import LAYOUTS, layout_of_names, read_names, recognise_transformer
from cogtools.layouts.transformer import runs_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.tensors import TensorEntry
    from cogtools.errors import ProblemKind
    from cogtools.layouts.lora import LoraLayout, OtherAdapter, ScalePlace
    from cogtools.layouts.recognition import KeyReading, LoraNames


class LoraTensor(NamedTuple):
    """A tensor of a LoRA: its key in the checkpoint, and what is known of it."""

    key: str
    entry: TensorEntry


@dataclass
class Lora:
    """The LoRA in a checkpoint.

    Attributes:
        checkpoint: the checkpoint, open.
        entries: where its keys were found: the state dict, or what lies beside it.
        names: how its keys are spelled; None if they are no known program's.
        layout: the layout whose names they are; None if unknown.
        tensors: its factors, biases and magnitude vectors.
        alphas: the tensors that hold an alpha, by module.
        unplaced: keys of a LoRA that mean nothing in its layout.
        unreadable: tensors that are there, but not as plain tensors.
        collisions: keys of tensors that another key has already given, by key.
        record: what cogtools recorded in the file, or beside it, when it wrote it.
        stated: what the file states in the places where diffusers and PEFT look, by place.
        asked: the layout of the program that the user asks about; None leaves it to the file.
    """

    checkpoint: Checkpoint
    entries: Mapping[str, TensorEntry]
    names: LoraNames | None
    layout: LoraLayout | None
    tensors: dict[LoraKey, LoraTensor]
    alphas: dict[Module, LoraTensor]
    unplaced: tuple[str, ...]
    unreadable: dict[LoraKey, str]
    collisions: dict[str, LoraKey]
    record: ExportRecord
    stated: dict[ScalePlace, Stated]
    asked: LoraLayout | None = None

    @property
    def foreign(self) -> list[str]:
        """The keys of the state dict that are none of its tensors."""
        own = {tensor.key for tensor in [*self.tensors.values(), *self.alphas.values()]}
        return [key for key in self.checkpoint.tensors if key not in own]

    @cached_property
    def base_weights(self) -> list[str]:
        """The keys of base weights that its program loads with the adapter, as PEFT does; biases mostly."""
        if not self.intended.loads_base_weights:
            return []
        adapted = set(map(module_path, self.modules))
        prefix = self.intended.written.prefix
        return [key for key in self.foreign if key.startswith(prefix) and _is_base(key[len(prefix) :], adapted)]

    @property
    def everything(self) -> list[TensorEntry]:
        """Every tensor under a key of it, whatever the key means."""
        own = [tensor.entry for tensor in [*self.tensors.values(), *self.alphas.values()]]
        return own + [self.entries[key] for key in [*self.unplaced, *self.collisions] if key in self.entries]

    @cached_property
    def modules(self) -> list[Module]:
        """The adapted modules, by layer."""
        return sorted({key.module for key in self.tensors}, key=lambda module: module.order)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that it adapts."""
        return tuple(sorted({key.layer for key in self.tensors if key.layer is not None}))

    @cached_property
    def ranks(self) -> dict[Module, int]:
        """The rank of every module whose factors tell one: that of lora_A where they disagree."""
        found: dict[Module, int] = {}
        for key, tensor in self.tensors.items():
            rank = rank_of(key, tensor.entry.shape)
            if rank is not None and (key.part == "A" or key.module not in found):
                found[key.module] = rank
        return found

    @property
    def factors(self) -> Factors:
        """What its scale is worked out from."""
        return Factors(self.ranks, {module: tensor.entry for module, tensor in self.alphas.items()})

    @property
    def intended(self) -> LoraLayout:
        """The layout of the program that the file is for.

        The one that the user asks about; else the one whose loader looks for a file of this name, or that its header
        or the folder speaks to; else the one whose names it has.
        """
        if self.asked is not None:
            return self.asked
        path = self.checkpoint.path
        by_name = next((layout for layout in LAYOUTS if layout.file_name == path.name), None)
        if by_name is not None:
            return by_name
        header = self.stated.get("header")
        if header is not None and not header.is_nothing and not self._has_own_names(peft.LAYOUT):
            return diffusers.LAYOUT
        if "adapter_config" in self.stated and not self._has_own_names(diffusers.LAYOUT):
            return peft.LAYOUT
        return self.layout or diffusers.LAYOUT

    def _has_own_names(self, layout: LoraLayout) -> bool:
        return self.names is not None and self.names.spelling == layout.written

    def reading(self, key: str) -> KeyReading | None:
        """What a key of the file was found to be; None if nothing."""
        return None if self.names is None else self.names.readings.get(key)

    def key(self, name: LoraKey) -> str:
        """The key of a tensor: the one that it has, or should have in its layout."""
        if name in self.tensors:
            return self.tensors[name].key
        if self.names is not None and (key := self.names.spelling.key(name)) is not None:
            return key
        return self.intended.key(name) or str(name)

    def problems(
        self,
        kind: ProblemKind,
        names: Iterable[LoraKey],
        found: str | None = None,
        expected: str | None = None,
        every: Collection[Kind] = ATTENTION_KINDS,
    ) -> list[Problem]:
        """A problem that several tensors have alike, folded; `every` as in `folded_names`."""
        return [
            Problem(kind, text, found, expected, tuple(map(self.key, alike)))
            for text, alike in folded_names(names, every).items()
        ]

    @property
    def unknown_prefix(self) -> str | None:
        """What stands before all keys, where no program of this layout writes or reads it; None if nothing odd does."""
        if self.names is None or self.layout is None:
            return None
        spelling = self.names.spelling
        known = {spelled.prefix for layout in LAYOUTS for spelled in (layout.written, *layout.also_read)
                 if spelled.names is spelling.names}  # fmt: skip
        return None if spelling.prefix in known else spelling.prefix

    def most_common_hidden(self) -> int | None:
        """The hidden size that most of its factors have on their other side; None if none tells one."""
        sizes = Counter(hidden_of(key, tensor.entry.shape) for key, tensor in self.tensors.items())
        sizes.pop(None, None)
        return sizes.most_common(1)[0][0] if sizes else None

    def expected(self, layers: Iterable[int]) -> frozenset[LoraKey]:
        """The tensors that a complete LoRA of this kind has: each kind that occurs in the layers, in all of these.

        A kind that does not occur is no fault, unless its trainer always adapts it; what lies beside the layers is
        complete if it has both factors.
        """
        in_layers: dict[str, set[str]] = {}
        beside: dict[str, set[str]] = {}
        for key in [*self.tensors, *self.unreadable]:
            (beside if key.layer is None else in_layers).setdefault(key.name, {"A", "B"}).add(key.part)
        # What cogtools has converted from another trainer's file may lack what this layout's trainer always adapts.
        for name in self.layout.always if self.layout is not None and self.record.version is None else ():
            in_layers.setdefault(name, {"A", "B"})
        return frozenset(
            [LoraKey(layer, name, part) for layer in layers for name, parts in in_layers.items() for part in parts]
            + [LoraKey(None, name, part) for name, parts in beside.items() for part in parts]
        )

    def stated_names(self, transformer: Transformer) -> frozenset[LoraKey] | None:
        """The tensors that it should have, as the place states where its program looks; None if that names no modules.

        They are both factors of every module that `target_modules` names, and what else modules of their kind have.
        """
        stated = self.stated.get(self.intended.scale)
        if stated is None or stated.config is None:
            return None
        targeted = [module for module in transformer.modules if stated.config.is_targeted(module)]
        parts: dict[str, set[str]] = {}
        for name in self.expected(self.layers):
            parts.setdefault(name.name, {"A", "B"}).add(name.part)
        found = [LoraKey(*module, part) for module in targeted for part in parts.get(module.name, ("A", "B"))]
        return frozenset(found) or None

    def statements(self) -> dict[ScalePlace, Statement]:
        """What the file states of its scale, by the place where programs look for it."""
        found = [scales.by_config(stated, self.factors) for stated in self.stated.values()]
        found += [scales.by_tensors(self.factors), self._by_training_config]
        return {statement.place: statement for statement in found if statement is not None and statement.place}

    @cached_property
    def _by_training_config(self) -> Statement | None:
        """What the training configuration beside it states; None if it states nothing that can be used."""
        try:
            config, _ = read_config(self, by_hand=None)
        except CheckpointError:
            return None
        return None if config is None or config.alpha is None else scales.by_training_config(config, self.factors)

    def scaling_as_run(self, layout: LoraLayout) -> Statement | None:
        """What the program of a layout multiplies each module's update by; None if it loads nothing."""
        return scales.scaling_as_run(layout, self.statements(), self.factors)


def _is_base(name: str, adapted: Collection[str]) -> bool:
    """Whether a name is that of a base weight in a model in which these modules are adapted."""
    bare = name.replace(".base_layer.", ".")
    is_wrapped = bare.rpartition(".")[0] in adapted
    return is_wrapped == (bare != name) and runs_of(bare, "diffusers") is not None


def find_lora(checkpoint: Checkpoint) -> Lora | None:
    """The LoRA in a checkpoint's state dict, in whatever layout; None if it has no key of one.

    Alphas alone, among the keys of another kind of adapter, are that one's.
    """
    lora = read_lora(checkpoint)
    if not lora.tensors and not lora.unreadable and find_other_adapter(checkpoint) is not None:
        return None
    return lora if lora.tensors or lora.alphas or lora.unplaced or lora.unreadable else None


def read_lora(checkpoint: Checkpoint) -> Lora:
    """The same, where it may have nothing in it."""
    odd = [key for key, value in checkpoint.not_tensors.items() if not isinstance(value, (dict, list, tuple))]
    tensors = checkpoint.tensors
    keys = lora_keys([*tensors, *odd])
    if not keys:  # some save it beside the state dict, under a name of its own
        tensors = checkpoint.beside
        own = set(lora_keys([checkpoint.places[key].key for key in tensors]))
        keys = [key for key in tensors if checkpoint.places[key].key in own]
    names = read_names(keys)
    layout = None if names is None else layout_of_names(names.spelling)
    stated = _stated(checkpoint)
    if layout is diffusers.LAYOUT and names is not None and names.spelling.prefix == "" and "adapter_config" in stated:
        layout = peft.LAYOUT
    lora = Lora(checkpoint, tensors, names, layout, {}, {}, (), {}, {}, _record(checkpoint, layout), stated)
    unplaced = []
    for key in keys:
        reading = lora.reading(key)
        if reading is None:
            unplaced.append(key)
            continue
        name, entry = reading.name, tensors.get(key)
        if entry is None:
            lora.unreadable[name] = key
        elif name in lora.tensors or (name.part == "alpha" and name.module in lora.alphas):
            lora.collisions[key] = name
        elif name.part == "alpha":
            lora.alphas[name.module] = LoraTensor(key, whole_tensor(entry))
        else:
            lora.tensors[name] = LoraTensor(key, whole_tensor(entry))
    lora.unplaced = tuple(unplaced)
    return lora


def find_other_adapter(checkpoint: Checkpoint) -> OtherAdapter | None:
    """Another kind of adapter than a LoRA that most of a checkpoint's keys belong to; None if none."""
    found = Counter(other_adapter(key) for key in checkpoint.tensors)
    kind, count = found.most_common(1)[0] if found else (None, 0)
    if kind is None and found:  # alphas lie between them
        known = [(count, kind) for kind, count in found.items() if kind is not None]
        count, kind = max(known, default=(0, None), key=lambda item: item[0])
    return kind if 3 * count >= len(checkpoint.tensors) else None


def _record(checkpoint: Checkpoint, layout: LoraLayout | None) -> ExportRecord:
    """What cogtools recorded: in the header, or in the training configuration beside a file that has none."""
    metadata = checkpoint.metadata
    if layout is sat.LAYOUT:
        with contextlib.suppress(CheckpointError):  # whoever needs the configuration itself will say so
            config = find_training_config(checkpoint)
            metadata = {RECORD_KEY: (None if config is None else record_in(config.content)) or "{}"}
    return read_record(metadata)


def _stated(checkpoint: Checkpoint) -> dict[ScalePlace, Stated]:
    """What a file states where diffusers and PEFT look for it."""
    stated: dict[ScalePlace, Stated] = {}
    text = checkpoint.metadata.get(diffusers.METADATA_KEY)
    if text is not None:
        stated["header"] = parse_config(text, diffusers.METADATA_KEY, diffusers.PREFIX)
    try:
        config = checkpoint.read_beside(peft.CONFIG_NAME, MAX_ADAPTER_CONFIG_BYTES)
    except CheckpointError as error:
        problem = Problem("unreadable", peft.CONFIG_NAME, error.found or error.what, error.expected)
        stated["adapter_config"] = Stated(peft.CONFIG_NAME, problems=(problem,))
    else:
        if config is not None:
            stated["adapter_config"] = parse_config(config.content.decode(errors="replace"), peft.CONFIG_NAME)
    return stated


# Its scale


def find_scale(
    lora: Lora, *, alpha: float | None = None, scaling: float | None = None, config: TrainingConfig | None = None
) -> Scale:
    """What a LoRA's updates are multiplied by, and who states it.

    Args:
        lora: the LoRA.
        alpha: given by the user; None takes what is stated.
        scaling: the same of the scaling itself.
        config: the training configuration, for a LoRA in SAT's layout.

    Raises:
        OptionError: if both are given, or one that is not a number above 0.
        ExportError: if the file states a scale, but not in a way that can be used.
    """
    if alpha is not None and scaling is not None:
        raise OptionError(
            "--alpha and --scaling both say how strong the LoRA is",
            found=f"--alpha {alpha} --scaling {scaling}",
            hint="leave one of them out: the scaling is alpha / rank",
        )
    found = _statements(lora, config)
    if alpha is not None:
        return Scale(scales.by_alpha(alpha, lora.factors), tuple(found))
    if scaling is not None:
        return Scale(scales.by_scaling(scaling, lora.factors), tuple(found))
    own = lora.layout.scale if lora.layout is not None else None
    unusable = lora.stated.get(own) if own is not None else None
    if unusable is not None and scales.by_config(unusable, lora.factors) is None:
        raise ExportError(
            "what the file states of its scale cannot be used",
            file=lora.checkpoint.path,
            problems=unusable.problems,
            hint="state it with --alpha or --scaling",
        )
    if not found:
        return Scale(scales.by_nothing(lora.factors))
    first = next((statement for statement in found if statement.place == own), found[0])
    wrong = {module: value for module, value in first.scalings.items() if not is_positive(value)}
    if wrong:
        raise ExportError(
            "what the file states of its scale cannot be used",
            file=lora.checkpoint.path,
            problems=[
                Problem("scale", f"{first.source}: {text}", shown, "a number above 0")
                for text, shown in _by_value(first, wrong).items()
            ],
            hint="state it with --alpha or --scaling",
        )
    return Scale(first, tuple(statement for statement in found if statement is not first))


def _by_value(statement: Statement, wrong: Mapping[Module, float | None]) -> dict[str, str]:
    """The modules whose scale cannot be used, folded, and what is stated for them."""
    alike: dict[str, list[Module]] = {}
    for module, scaling in wrong.items():
        alpha = statement.alphas.get(module)
        text = "not a single number" if scaling is None else f"alpha {number(alpha)}" if alpha is not None else "0"
        alike.setdefault(text, []).append(module)
    return {fold_modules(modules): text for text, modules in alike.items()}


def _statements(lora: Lora, config: TrainingConfig | None) -> list[Statement]:
    """All places that state something, in the order in which they count."""
    if lora.layout is sat.LAYOUT:
        return [scales.by_training_config(config, lora.factors)]
    metadata = lora.checkpoint.metadata
    found = [
        *lora.statements().values(),
        scales.by_peft_header(metadata, lora.factors) if "adapter_config" not in lora.stated else None,
        scales.by_finetrainers(metadata, lora.factors),
        scales.by_record(lora.record, lora.factors),
    ]
    return [statement for statement in found if statement is not None]


def read_config(lora: Lora, *, by_hand: str | None) -> tuple[TrainingConfig | None, list[str]]:
    """The training configuration of a LoRA in SAT's layout, as far as it is needed, and notes on one that is not right.

    Args:
        lora: the LoRA.
        by_hand: the option by which the user states the scale: then a configuration that cannot be read does not
            matter.

    Raises:
        CheckpointError: if it cannot be read.
    """
    if lora.layout is not sat.LAYOUT:
        return None, []
    file = None
    try:
        file = find_training_config(lora.checkpoint)
        return (None if file is None else read_training_config(file)), []
    except CheckpointError as error:
        if by_hand is None:
            raise
        note = f"{error.what}{f' ({error.found})' if error.found else ''}: not used, as {by_hand} is given."
    try:
        return (None if file is None else read_training_config(file, with_alpha=False)), [note]
    except CheckpointError:
        return None, [note]


def scale_of(lora: Lora) -> Scale | None:
    """A LoRA's scale, and who states it; None if that cannot be read."""
    if lora.layout is None:
        return None
    try:
        config, _ = read_config(lora, by_hand=None)
        return find_scale(lora, config=config)
    except CogtoolsError:
        return None


# Its transformer


def has_base_weights(checkpoint: Checkpoint) -> bool:
    """Whether there are base weights of a transformer in a checkpoint."""
    return recognise_transformer({key: entry.shape for key, entry in checkpoint.tensors.items()}) is not None


def find_transformer(checkpoint: Checkpoint, lora: Lora | None) -> Transformer | None:
    """The transformer that the base weights are, else the one that the LoRA fits; None if nothing tells its layers."""
    entries = checkpoint.tensors if lora is None else lora.entries
    shapes = {key: whole_tensor(entry).shape for key, entry in entries.items()}
    prefix = None if lora is None else lora.unknown_prefix
    if prefix:  # the base weights have it too
        shapes = {sat.unwrapped_key(key).removeprefix(prefix): shape for key, shape in shapes.items()}
    known = recognise_transformer(shapes)
    if known is not None or lora is None:
        return known
    hidden = lora.record.hidden_size or lora.most_common_hidden()
    if hidden is None:
        return None
    if lora.layout is sat.LAYOUT:  # a few base weights may be there, beside layers that are not
        known = sat.recognise_transformer(shapes, hidden)
    known = known or recognise(hidden, lora.record.transformer_layers)
    if known is None and hidden in OTHER_SAT_MODELS:
        return Transformer(max(lora.layers, default=-1) + 1, hidden, ())
    if known is None:
        return None
    recorded = tuple(model for model in known.models if model.slug in lora.record.models)
    return _narrowed(known._replace(models=recorded or known.models), lora)


def _narrowed(transformer: Transformer, lora: Lora) -> Transformer:
    """The same, of the models that fit those only whose modules have the LoRA's shapes."""
    beside = {key: tensor.entry.shape for key, tensor in lora.tensors.items() if key.layer is None}
    fitting = tuple(model for model in transformer.models if _fits(transformer._replace(models=(model,)), beside))
    return transformer._replace(models=fitting or transformer.models)


def _fits(transformer: Transformer, shapes: Mapping[LoraKey, tuple[int, ...]]) -> bool:
    for key, shape in shapes.items():
        rank = rank_of(key, shape)
        expected = transformer.lora_shape(key, rank or 0)
        is_convolution = key.name == "patch_proj" and transformer.models[0].patch_size_t is None
        if not transformer.has(key.module) or is_convolution != (len(shape) == 4 and key.name == "patch_proj"):
            return False
        if expected is not None and expected != shape:
            return False
    return True
