"""Folders that are given in place of a checkpoint file, and which files in them are meant.

    a trainer's save folder    latest, 1000/, 1000-ema/, training_config.yaml …; `latest` decides
    an iteration's folder      mp_rank_00_model_states.pt
    sharded weights            model.safetensors.index.json or pytorch_model.bin.index.json, and the shards beside it
    a diffusers model          diffusion_pytorch_model.safetensors, or its shards
    a diffusers pipeline       model_index.json, and a folder per component
    a LoRA                     pytorch_lora_weights.safetensors; PEFT's adapter_model.safetensors
    one checkpoint             whatever its name

Nothing is guessed: if several checkpoints could be meant, the error lists them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cogtools.checkpoint.storage import SourceFile, is_file, is_folder
from cogtools.errors import SHOWN_PROBLEMS, CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable

LATEST = "latest"
EMA_SUFFIX = "-ema"

WEIGHTS_FILES = (
    "mp_rank_00_model_states.pt",
    "z3_rank_00_model_states.pt",
    "diffusion_pytorch_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)
"""The names under which trainers and libraries save weights, the first one found being meant."""

PIPELINE_INDEX = "model_index.json"

_INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
_WEIGHTS_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_ITERATION = re.compile(rf"([0-9]{{1,12}})({EMA_SUFFIX})?")
_MAX_LATEST_BYTES = 64
_MAX_INDEX_BYTES = 32 << 20
"""The longest index of shards. That of a model with 1,500 tensors has 0.1 MB."""


class Iteration(NamedTuple):
    """The folder of one iteration in a trainer's save folder."""

    number: int
    ema: bool
    folder: Path

    def __str__(self) -> str:
        return self.folder.name


@dataclass(frozen=True, slots=True)
class Run:
    """A trainer's save folder, and which of its iterations was taken.

    Attributes:
        folder: the save folder.
        iterations: all there are, by number, those with EMA weights after those without.
        latest: what its file `latest` says; None if there is none.
        chosen: the one that was taken.
    """

    folder: Path
    iterations: tuple[Iteration, ...]
    latest: str | None
    chosen: Iteration

    @property
    def twin(self) -> Iteration | None:
        """The same iteration with EMA weights, if the chosen one is without, and the other way round."""
        return next(
            (item for item in self.iterations if item.number == self.chosen.number and item.ema != self.chosen.ema),
            None,
        )


def find_run(file: Path) -> Run | None:
    """The save folder that a checkpoint file lies in, in the folder of an iteration; None if it does not."""
    folder = file.absolute().parent
    chosen = _iteration(folder)
    if chosen is None:
        return None
    try:
        iterations, latest = iterations_in(folder.parent), _latest(folder.parent)
    except CheckpointError:  # a folder that may not be read: the file that is asked for is none of it
        return None
    return Run(folder.parent, tuple(iterations), latest, chosen) if chosen in iterations else None


def find_file(folder: Path, *, iteration: int | None = None, ema: bool = False) -> Path:
    """The file that a folder stands for: weights, an index of shards, or a pipeline's model_index.json.

    Args:
        folder: any of the folders above.
        iteration: which iteration of a save folder; None takes the latest.
        ema: take its EMA weights.

    Raises:
        CheckpointError: if there is no checkpoint in it, or it could be one of several.
    """
    iterations = iterations_in(folder)
    if iterations:
        return _weights_in(_choose(folder, iterations, iteration, ema=ema).folder)
    found = _find_weights(folder)
    if found is not None:
        refuse_choice(found, iteration=iteration, ema=ema)
        return found
    runs = [child for child in _folders(folder) if iterations_in(child)]
    if len(runs) == 1:
        return find_file(runs[0], iteration=iteration, ema=ema)
    if runs:
        raise _several(folder, "this folder holds several trainings", runs, hint="give one of them")
    raise CheckpointError(
        "there is no checkpoint in this folder",
        file=folder,
        found=_listed(sorted(child.name for child in _children(folder))) or "nothing: the folder is empty",
        expected="a checkpoint file, or folders of iterations as the trainer makes them (1000/, latest)",
    )


def refuse_choice(path: Path, *, iteration: int | None, ema: bool) -> None:
    """Raise if `iteration` or `ema` ask for something else than this file is."""
    chosen = _iteration(path.absolute().parent)
    if iteration is not None and (chosen is None or chosen.number != iteration):
        option = f"--iteration {iteration}"
    elif ema and (chosen is None or not chosen.ema):
        option = "--ema"
    else:
        return
    raise CheckpointError(
        f"{option} does not go with this path, which already says which checkpoint is meant",
        file=path,
        expected="the trainer's save folder, in which it chooses",
    )


def read_shard_index(path: Path) -> dict[str, str]:
    """Which file each tensor of sharded weights is in.

    Raises:
        CheckpointError: if the index is no such thing, or names a file outside of its folder.
    """
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise _no_index(path, "no weight_map of names and files")
    folder = path.parent.resolve()
    for name in set(weight_map.values()):
        _refuse_outside(path, folder, name)
    return weight_map


def pipeline_components(index: Path) -> dict[str, Path]:
    """The weights of each component of a diffusers pipeline, by the component's name."""
    components: dict[str, Path] = {}
    for name in _read_json(index):
        if not name.startswith("_") and re.fullmatch(r"\w+", name):
            folder = index.with_name(name)
            found = _find_weights(folder) if is_folder(folder) else None
            if found is not None and found.name != PIPELINE_INDEX:  # no pipeline is a part of another
                components[name] = found
    return components


def is_shard_index(path: Path) -> bool:
    """Whether a file is an index of shards, by its name."""
    return path.name.endswith(_INDEX_SUFFIXES)


# Iterations of a save folder


def _iteration(folder: Path) -> Iteration | None:
    match = _ITERATION.fullmatch(folder.name)
    return Iteration(int(match[1]), match[2] is not None, folder) if match else None


def iterations_in(folder: Path) -> list[Iteration]:
    """The iterations in a trainer's save folder, by number; [] if it is no such folder."""
    found = (_iteration(child) for child in _folders(folder))
    return sorted((item for item in found if item and _has_weights(item.folder)), key=lambda item: item[:2])


def _latest(folder: Path) -> str | None:
    path = folder / LATEST
    if not is_file(path):
        return None
    with SourceFile.open(path) as file:
        content = file.read(0, min(file.size_bytes, _MAX_LATEST_BYTES))
    return content.decode("utf-8", "backslashreplace").strip()


def _choose(folder: Path, iterations: list[Iteration], number: int | None, *, ema: bool) -> Iteration:
    """The iteration that is asked for; the latest if none is."""
    latest = _latest(folder)
    if number is not None:
        asked = f"iteration {number}"
    elif latest is not None:
        asked = f"iteration {latest}, as the file `latest` says"
        number = int(latest) if _ITERATION.fullmatch(latest) and latest.isdecimal() else -1
    elif len({item.number for item in iterations}) == 1:
        number, asked = iterations[0].number, f"iteration {iterations[0].number}"
    else:
        raise _several(
            folder,
            "there is no file `latest` to tell which iteration is meant",
            iterations,
            hint="choose one with --iteration, and --ema for those named -ema",
        )
    for item in iterations:
        if item.number == number and item.ema == ema:
            return item
    raise CheckpointError(
        f"there is no {asked}{' with EMA weights' if ema else ''} in this folder",
        file=folder,
        found=_listed(map(str, iterations)),
        hint="choose one with --iteration, and --ema for those named -ema",
    )


def _several(folder: Path, what: str, choices: Iterable[Path | Iteration], hint: str) -> CheckpointError:
    names = [choice.name if isinstance(choice, Path) else str(choice) for choice in choices]
    return CheckpointError(what, file=folder, found=_listed(names), hint=hint)


# Weights in a folder


def _weights_in(folder: Path) -> Path:
    found = _find_weights(folder)
    if found is None:
        raise CheckpointError("there is no checkpoint in this folder", file=folder)
    return found


def _has_weights(folder: Path) -> bool:
    return any(child.name.endswith(_WEIGHTS_SUFFIXES) and is_file(child) for child in _children(folder))


def _find_weights(folder: Path) -> Path | None:
    """The weights that a folder stands for; None if there are none.

    Raises:
        CheckpointError: if there are several files of weights, none of them under a usual name.
    """
    names = {child.name for child in _children(folder) if is_file(child)}
    if PIPELINE_INDEX in names:
        return folder / PIPELINE_INDEX
    for name in (*WEIGHTS_FILES, *sorted(name for name in names if name.endswith(_INDEX_SUFFIXES))):
        if name in names:
            return folder / name
    weights = sorted(name for name in names if name.endswith(_WEIGHTS_SUFFIXES))
    if len(weights) > 1:
        raise CheckpointError(
            "this folder holds several checkpoints", file=folder, found=_listed(weights), hint="give one of them"
        )
    return folder / weights[0] if weights else None


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"the folder cannot be read: {error.strerror}", file=folder) from error


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in _children(folder) if is_folder(child))


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = len(every) - SHOWN_PROBLEMS
    return ", ".join(every[:SHOWN_PROBLEMS]) + (f" … and {more} more" if more > 0 else "")


# Indices of shards


def _read_json(path: Path) -> dict[str, object]:
    with SourceFile.open(path) as file:
        if file.size_bytes > _MAX_INDEX_BYTES:
            raise _no_index(path, f"{file.size_bytes:,} bytes, more than {_MAX_INDEX_BYTES:,}")
        content = file.read(0, file.size_bytes)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _no_index(path, f"no JSON: {error}") from error
    if not isinstance(value, dict):
        raise _no_index(path, "no JSON object")
    return value


def _refuse_outside(index: Path, folder: Path, name: str) -> None:
    """Refuse a shard outside of the index's folder, links followed.

    Hugging Face's cache keeps shards in a folder `blobs`, and links to them.
    """
    if not name or Path(name).name != name or "\\" in name or "\0" in name:
        raise _no_index(index, f"the file {name!r}, which is not beside it")
    try:
        shard = (folder / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # half a surrogate pair; links in a circle
        raise _no_index(index, f"the file {name!r}, which cannot be") from error
    if shard.parent != folder and shard.parent.name != "blobs":
        raise _no_index(index, f"the file {name!r}, a link to another folder")


def _no_index(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        "this is no index of a checkpoint's files",
        file=path,
        found=found,
        expected="a JSON object that names the files beside it",
    )
