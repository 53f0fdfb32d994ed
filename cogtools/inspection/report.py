"""What `inspect` finds out, as plain data: the text and the JSON are renderings of these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from cogtools.checkpoint.paths import AnyPath
    from cogtools.checkpoint.pickle.dangers import Danger
    from cogtools.conversion.readers import Reader
    from cogtools.errors import Hint, Problem


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the elements of a tensor are like. The first five are of its finite elements.

    Attributes:
        min: the smallest; None if none is finite, as the next three.
        max: the largest.
        mean: their mean.
        std: their standard deviation with Bessel's correction, as `torch.std` has it; None if there is one only.
        norm: their L2 norm.
        zeros: the share that is 0, of all.
        nans: how many are no number.
        infs: how many are infinite.
        not_computed: why the others are not there; None if they are.
    """

    min: float | None = None
    max: float | None = None
    mean: float | None = None
    std: float | None = None
    norm: float | None = None
    zeros: float | None = None
    nans: int | None = None
    infs: int | None = None
    not_computed: str | None = None


@dataclass(slots=True)
class TensorReport:
    """One tensor.

    Attributes:
        key: its key in the state dict, or the path that leads to it beside that.
        section: what it belongs to.
        dtype: its dtype.
        shape: its shape.
        stride: elements from one index to the next, per dimension.
        size_bytes: bytes of its elements.
        storage: the number of the storage that it views; equal numbers share their bytes.
        storage_offset: elements from the start of the storage to its first one.
        in_state_dict: false for a tensor beside the state dict.
        container: the first part of the key of a tensor beside the state dict: what leads to the dict it is in.
        file: the file that it lies in; None if not asked for.
        offset_bytes: where in that file its first element lies; None if not asked for.
        statistics: None if not asked for.
    """

    key: str
    section: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    size_bytes: int
    storage: int
    storage_offset: int
    in_state_dict: bool
    container: str
    file: AnyPath | None = None
    offset_bytes: int | None = None
    statistics: Statistics | None = None


@dataclass(frozen=True, slots=True)
class SectionReport:
    """One section of a checkpoint.

    Attributes:
        section: its name.
        tensors: how many tensors it has.
        parameters: their elements; tensors that are the same view of one storage count once.
        size_bytes: the bytes of these elements.
        stored_bytes: the bytes of the storages that no section before it has.
    """

    section: str
    tensors: int
    parameters: int
    size_bytes: int
    stored_bytes: int


@dataclass(frozen=True, slots=True)
class DTypeReport:
    """The tensors of one dtype, same views of one storage counted once in all but `tensors`."""

    dtype: str
    tensors: int
    parameters: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class SecondCopy:
    """Tensors beside the state dict that are the state dict's again, in storages of their own.

    Attributes:
        tensors: how many.
        size_bytes: of their storages.
        checked: how many of them have the same CRC-32 as the first; the others have the same key, dtype and shape.
    """

    tensors: int
    size_bytes: int
    checked: int


@dataclass(frozen=True, slots=True)
class EntryReport:
    """Something that is no tensor: its name, and what it is in a few words."""

    name: str
    kind: str


@dataclass(frozen=True, slots=True)
class GlobalReport:
    """A name that the pickle mentions besides tensors and plain data. It was neither imported nor called."""

    name: str
    count: int
    danger: Danger


@dataclass(frozen=True, slots=True)
class ModelReport:
    """The transformer that a checkpoint holds or its LoRA belongs to.

    Attributes:
        name: its name, or what can be said of it.
        slugs: the published models that fit.
        layers: how many it has.
        hidden: its hidden size.
    """

    name: str
    slugs: tuple[str, ...]
    layers: int
    hidden: int


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """How one module is changed by its LoRA.

    Attributes:
        layer: of the module; None if it lies beside the layers.
        module: its name: "q", "ff_in", "proj_out" …
        scaling: what lora_B @ lora_A is multiplied by; None if that is not known.
        norm: the Frobenius norm of scaling * lora_B @ lora_A, of lora_B @ lora_A without a scaling; None if it is not
            computed.
        effective_rank: exp of the entropy of its singular values, normalised to sum 1: between 1 and rank; 0 if all
            are 0; None if it is not computed.
        not_computed: what the module has that kept them from being computed, such as "NaN or infinity"; None if both
            are there.
    """

    layer: int | None
    module: str
    scaling: float | None = None
    norm: float | None = None
    effective_rank: float | None = None
    not_computed: str | None = None


@dataclass(frozen=True, slots=True)
class ModuleChange:
    """How the update of one module differs between two LoRAs.

    Attributes:
        layer: of the module; None if it lies beside the layers.
        module: its name.
        first_norm: the Frobenius norm of the first's scaling * lora_B @ lora_A; 0 if it does not adapt the module.
        second_norm: the same of the second.
        difference: the norm of the difference of the two over the first's norm; None if that is 0.
        cosine: the cosine of the angle between the two, as vectors; None if one of them is 0.
        not_computed: why none of this is there; None if it is.
    """

    layer: int | None
    module: str
    first_norm: float | None = None
    second_norm: float | None = None
    difference: float | None = None
    cosine: float | None = None
    not_computed: str | None = None


@dataclass(frozen=True, slots=True)
class LoraComparison:
    """What changed from one LoRA to another, over all modules that could be computed.

    Attributes:
        modules: each module that one of them adapts.
        first_norm: the norm of all the first's updates together.
        second_norm: the same of the second.
        difference: the norm of the difference over the first's; None if that is 0.
        cosine: the cosine of the angle between the two, as vectors; None if one of them is 0.
        only_first: how many modules only the first adapts.
        only_second: how many modules only the second adapts.
    """

    modules: tuple[ModuleChange, ...]
    first_norm: float
    second_norm: float
    difference: float | None
    cosine: float | None
    only_first: int
    only_second: int


@dataclass(frozen=True, slots=True)
class ExportOutlook:
    """What `export-lora` would make of a LoRA.

    Attributes:
        possible: whether it would.
        tensors: how many it would write; 0 if it would not.
        size_bytes: of these tensors.
        formats: those that can hold it.
        notices: what it would say.
        reason: why it would not.
        found: what it finds instead of what it needs.
        hint: a command that makes a file for another program, or what it would advise where it would not.
        problems: what is wrong with single keys.
    """

    possible: bool
    tensors: int = 0
    size_bytes: int = 0
    formats: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    reason: str | None = None
    found: str | None = None
    hint: Hint | None = None
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class LoraReport:
    """The LoRA in a checkpoint.

    Attributes:
        layout: whose names its keys have: "sat", "diffusers", "peft" …; None if they are no known program's.
        names: what sets its names apart from those of that layout: "diffusers' names without a prefix"; None if
            nothing does.
        tensors: how many tensors it has.
        size_bytes: of these.
        layers: the layers that it adapts.
        modules: how many modules it adapts.
        ranks: the ranks that occur; a LoRA of the SAT trainer has one.
        dtypes: the dtypes that occur.
        complete: whether every layer has all its tensors; None if the layout is not known.
        missing: what is missing, folded: "layers 3-5: to_v lora_B".
        unplaced: keys of a LoRA that the layout has no place for.
        alpha: None if it is stated nowhere and the layout has no default.
        alpha_source: where the scale is stated: "training_config.yaml", "default" (SAT's), "lora_adapter_metadata",
            "adapter_config.json", "alpha tensors" …; None if it is not.
        reader: the program that the file is for.
        unstated_scaling: what that multiplies the updates by where nothing states the scale; None if it then loads
            nothing, or that differs by module.
        misstated: what is wrong with what a file in diffusers' or PEFT's layout states of its scale.
        scalings: what its updates are multiplied by, each once: alpha / rank, or 1 where nothing is stated; () if
            that is not known.
        export: what `export-lora` would make of it.
        readers: what every program that is known does with the file.
        updates: per module; None if not asked for.
    """

    layout: str | None
    names: str | None
    tensors: int
    size_bytes: int
    layers: tuple[int, ...]
    modules: int
    ranks: tuple[int, ...]
    dtypes: tuple[str, ...]
    complete: bool | None
    missing: tuple[str, ...]
    unplaced: tuple[str, ...]
    alpha: float | None
    alpha_source: str | None
    reader: str
    unstated_scaling: float | None
    misstated: tuple[Problem, ...]
    scalings: tuple[float, ...]
    export: ExportOutlook
    readers: tuple[Reader, ...]
    updates: tuple[UpdateReport, ...] | None = None


@dataclass(frozen=True, slots=True)
class FileReport:
    """One file of a checkpoint that has several.

    Attributes:
        file: the file.
        format: what kind of file it is.
        size_bytes: its size.
        tensors: how many it has.
    """

    file: AnyPath
    format: str
    size_bytes: int
    tensors: int


@dataclass(frozen=True, slots=True)
class IterationReport:
    """One iteration in a trainer's save folder.

    Attributes:
        name: of its folder, such as "1000-ema".
        ema: whether it holds EMA weights.
        latest: whether the save folder's file `latest` names it.
        inspected: whether it is the one that this report is about.
    """

    name: str
    ema: bool
    latest: bool
    inspected: bool


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """An adapter that is not a LoRA: what it is called, and who loads it."""

    name: str
    readers: str


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """What a checkpoint holds.

    Attributes:
        checkpoint: the file, or the index of several.
        format: what kind of file it is.
        size_bytes: of its files.
        files: its files, if it has several.
        iterations: those of the trainer's save folder that it lies in.
        wrapper: the keys under which the state dict lies, joined with dots; "" if it is the top level.
        state_dict_tensors: tensors in the state dict.
        beside_tensors: tensors beside it.
        parameters: elements in the state dict, or of all tensors if it has none; tied ones once.
        stored_bytes: the storages of all tensors.
        unviewed_bytes: the bytes of these that are in no tensor.
        dtypes: the same tensors by dtype, the largest first.
        sections: what it consists of, in the order of the table of sections.
        second_copy: what is stored twice; None if nothing is.
        trainer: what the trainer wrote beside the weights: iteration, versions, world sizes.
        entries: the other entries beside the state dict and its wrappers.
        not_tensors: the entries of the state dict that are no tensors.
        globals: names in the pickle besides tensors and plain data, the dangerous first.
        metadata: the text entries of a safetensors header.
        model: None if it is not known.
        lora: None if there is none.
        other_adapter: an adapter of another kind; None if there is none.
        tensors: those that were asked for, in the order that was asked for.
        selected: how many were asked for; more than `tensors` has if there was a limit.
    """

    checkpoint: AnyPath
    format: str
    size_bytes: int
    files: tuple[FileReport, ...]
    iterations: tuple[IterationReport, ...]
    wrapper: str
    state_dict_tensors: int
    beside_tensors: int
    parameters: int
    stored_bytes: int
    unviewed_bytes: int
    dtypes: tuple[DTypeReport, ...]
    sections: tuple[SectionReport, ...]
    second_copy: SecondCopy | None
    trainer: dict[str, int | float | str]
    entries: tuple[EntryReport, ...]
    not_tensors: tuple[EntryReport, ...]
    globals: tuple[GlobalReport, ...]
    metadata: dict[str, str]
    model: ModelReport | None
    lora: LoraReport | None
    other_adapter: AdapterReport | None
    tensors: tuple[TensorReport, ...]
    selected: int


@dataclass(frozen=True, slots=True)
class InspectReport:
    """What `inspect` prints.

    Attributes:
        checkpoints: one report per checkpoint.
        plot: the picture that was drawn; None if none was asked for.
        comparison: what changed from the first LoRA to the second; None unless statistics of two were asked for.
    """

    checkpoints: tuple[CheckpointReport, ...]
    plot: Path | None = None
    comparison: LoraComparison | None = None
