"""The plan of a model: what each part's tensors become, and the files that they are written to.

diffusers loads a part from `config.json` and one file of weights, or shards and their index; SAT loads a transformer
from a folder with `latest` and a file of `torch.save`. All of it is byte ranges of the source: a plan reads no weights.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from cogtools.checkpoint.formats.safetensors import safetensors_header
from cogtools.checkpoint.formats.torch_zip_writer import TorchArchive
from cogtools.checkpoint.names import LATEST, TRAINER_FILES
from cogtools.conversion import manifest
from cogtools.conversion.carry_out import PlannedFile
from cogtools.conversion.model_training import model_config_text
from cogtools.conversion.plan import Planned
from cogtools.conversion.record import RECORD_KEY
from cogtools.conversion.training_config import FILE_NAME as TRAINING_CONFIG
from cogtools.errors import OptionError
from cogtools.layouts import sat, transformer
from cogtools.layouts.key_map import Run
from cogtools.layouts.pipeline import PARTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cogtools.checkpoint.dtypes import DType
    from cogtools.checkpoint.tensors import TensorEntry
    from cogtools.conversion.model_reading import Reading
    from cogtools.conversion.model_record import ModelRecord
    from cogtools.conversion.record import MergedRecord

SHARD_SIZE = "5GB"
"""How large shards are where the user does not say: as in the released models."""

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class SourceRows(NamedTuple):
    """Rows of a tensor of the checkpoint, from `first` up to `last`, which is not one of them."""

    key: str
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class PartPlan:
    """What a part becomes.

    Attributes:
        reading: the part.
        tensors: the tensors of the output, in its order.
        rows: the rows that each of them consists of, by its key; none for a tensor that is made up.
        dropped: the keys of the checkpoint that are left out, and why.
        made_up: the keys of the output that the checkpoint does not have, and what they are.
        cast_to: the dtype that all of its tensors are cast to; None if they are not.
        merged: the LoRAs that are merged into it.
    """

    reading: Reading
    tensors: tuple[Planned, ...]
    rows: Mapping[str, tuple[SourceRows, ...]]
    dropped: Mapping[str, str]
    made_up: Mapping[str, str]
    cast_to: DType | None = None
    merged: tuple[MergedRecord, ...] = ()

    @property
    def name(self) -> str:
        """The part's name."""
        return self.reading.part.name

    @property
    def size_bytes(self) -> int:
        """How many bytes its tensors take."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of its tensors, by PyTorch's names, each once."""
        return tuple(sorted({tensor.dtype.name for tensor in self.tensors}))


def plan_for_diffusers(reading: Reading) -> PartPlan:
    """What a part becomes in diffusers (or transformers): every tensor of its class, at its shape there."""
    tensors, rows = [], {}
    for key, shape in reading.shapes.items():
        rows[key] = _rows(reading, reading.mapped.targets[key])
        tensors.append(_planned(reading, key, rows[key], shape))
    return PartPlan(reading, tuple(tensors), rows, reading.mapped.dropped, {})


def plan_for_sat(reading: Reading) -> PartPlan:
    """What a transformer becomes in SAT.

    The positions that SAT computes are left out, as in the released files. The table that it has where positions are
    rotary, and never uses, is made up: SAT demands that every tensor but those of mixins is there.
    """
    part = reading.part
    targets: dict[str, tuple[Run, ...]] = {}
    dropped: dict[str, str] = {}
    if part.layout == "sat":
        targets = {sat.table_key(key): (Run(key),) for key in part.tensors if not sat.is_lora_key(key)}
        dropped = {key: reason for key, reason in reading.mapped.dropped.items() if sat.is_lora_key(key)}
    else:
        targets = transformer.to_sat(part.tensors).targets
    tensors, rows = [], {}
    for name, runs in targets.items():
        key = sat.PREFIX + name
        rows[key] = _rows(reading, runs)
        tensors.append(_planned(reading, key, rows[key]))
    made_up = {}
    unused = sat.PREFIX + transformer.UNUSED_POSITIONS
    if reading.model is not None and reading.model.rotary and unused not in rows:
        made_up[unused] = "zeros: SAT wants it there, and never uses it"
        tensors.append(_unused_positions(reading, unused))
    return PartPlan(reading, tuple(tensors), rows, dropped, made_up)


def _unused_positions(reading: Reading, key: str) -> Planned:
    first = next(iter(reading.part.tensors.values()))
    hidden = reading.shapes["norm_final.weight"][0]
    shape = (transformer.UNUSED_POSITIONS_ROWS, hidden)
    return Planned(key, first.dtype, shape, (bytes(prod(shape) * first.dtype.itemsize),))


def _rows(reading: Reading, runs: Sequence[Run]) -> tuple[SourceRows, ...]:
    found = []
    for run in runs:
        length = reading.part.tensors[run.key].shape[0] // run.of
        found.append(SourceRows(run.key, run.number * length, (run.number + 1) * length))
    return tuple(found)


def _planned(reading: Reading, key: str, rows: Sequence[SourceRows], shape: tuple[int, ...] | None = None) -> Planned:
    tensors = reading.part.tensors
    pieces: list[TensorEntry] = [tensors[source.key].rows(source.first, source.last) for source in rows]
    if shape is None:
        shape = (sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:])
    return Planned(key, pieces[0].dtype, shape, tuple(pieces), source=rows[0].key)


# Files


def parse_size(text: str) -> int:
    """The bytes of a size such as "5GB" or "500MB", in decimal units as diffusers has them.

    Raises:
        OptionError: if it is not one.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)\s*", text, re.IGNORECASE | re.ASCII)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match and len(match[1]) <= 20 else 0
    if size < 1:
        raise OptionError("this is not a size", found=text, expected="a size such as 5GB or 500MB")
    return size


def diffusers_files(plan: PartPlan, record: ModelRecord, max_shard_bytes: int) -> tuple[PlannedFile, ...]:
    """The files of a part's folder, as diffusers' `save_pretrained` has them.

    Args:
        plan: the part.
        record: how it was made, for the header of each file of weights.
        max_shard_bytes: what the tensors of a file may take; a larger tensor has a file of its own.
    """
    part = PARTS[plan.name]
    shards = shards_of(plan.tensors, max_shard_bytes)
    names = [part.shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [part.weights_name]
    metadata = {"format": "pt", RECORD_KEY: record.text()}
    files = [_weights(name, shard, metadata) for name, shard in zip(names, shards, strict=True)]
    if len(shards) > 1:
        weight_map = {tensor.key: file.path for file in files for tensor in file.tensors}
        files.append(
            json_file(part.shard_index, {"metadata": {"total_size": plan.size_bytes}, "weight_map": weight_map})
        )
    files.append(json_file(part.config, plan.reading.config))
    return with_manifest(files)


def _weights(name: str, tensors: Sequence[Planned], metadata: Mapping[str, str]) -> PlannedFile:
    """A safetensors file.

    Larger elements come first, so that all are aligned; and what is computed comes last: the libraries for it are
    imported while the rest is copied.
    """
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.compute is not None))
    return PlannedFile(name, safetensors_header(ordered, metadata), tuple(ordered))


def shards_of(tensors: Sequence[Planned], max_bytes: int) -> list[list[Planned]]:
    """Tensors divided as huggingface_hub's `split_torch_state_dict_into_shards` divides them."""
    shards: list[list[Planned]] = []
    current: list[Planned] = []
    size_bytes = 0
    for tensor in tensors:
        if tensor.size_bytes > max_bytes:
            shards.append([tensor])
            continue
        if size_bytes + tensor.size_bytes > max_bytes:
            shards.append(current)
            current, size_bytes = [], 0
        current.append(tensor)
        size_bytes += tensor.size_bytes
    return [*shards, current] if current else shards


def with_manifest(files: Sequence[PlannedFile], record: Mapping[str, object] | None = None) -> tuple[PlannedFile, ...]:
    """Files of a folder, and the list of them, with a record of how they were made."""
    return (
        *files,
        PlannedFile(manifest.NAME, manifest.listing({file.path: file.size_bytes for file in files}, record)),
    )


def json_file(name: str, content: Mapping[str, object]) -> PlannedFile:
    """A configuration or an index, as diffusers writes them."""
    return PlannedFile(name, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


SAT_ITERATION = "1"
"""The folder of the iteration that a folder for SAT has."""


def sat_files(plan: PartPlan, record: ModelRecord) -> tuple[PlannedFile, ...]:
    """The files of a folder that SAT loads.

    Args:
        plan: the transformer.
        record: how it was made.
    """
    weights = f"{SAT_ITERATION}/{TRAINER_FILES[0]}"
    archive = TorchArchive(plan.tensors, wrapper="module")
    files = [PlannedFile(weights, tensors=plan.tensors, archive=archive), PlannedFile(LATEST, SAT_ITERATION.encode())]
    model, config = plan.reading.model, {**transformer.DEFAULTS, **plan.reading.config}
    if model is not None:  # what the tensors do not tell travels back too
        text = model_config_text(config, rotary=model.rotary)
        files.append(PlannedFile(TRAINING_CONFIG, text.encode()))
    return with_manifest(files, record.fields)
