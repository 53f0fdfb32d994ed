"""Folders that are given in place of a checkpoint file, and which files in them are meant.

    a trainer's save folder    latest, 1000/, 1000-ema/, training_config.yaml …; `latest` decides
    an iteration's folder      mp_rank_00_model_states.pt
    sharded weights            model.safetensors.index.json or pytorch_model.bin.index.json, and the shards beside it
    a diffusers model          diffusion_pytorch_model.safetensors, or its shards
    a diffusers pipeline       model_index.json, and a folder per component
    a LoRA                     pytorch_lora_weights.safetensors; PEFT's adapter_model.safetensors
    one checkpoint             whatever its name: where no name tells, the largest files are looked into

Optimizer shards beside the weights are no checkpoints. Nothing is guessed: if several checkpoints could be meant, the
error lists them.
"""

from __future__ import annotations

import contextlib
import heapq
import re
from pathlib import Path
from typing import TYPE_CHECKING

from cogtools.checkpoint.files import SourceFile, is_file, is_folder
from cogtools.checkpoint.formats.kinds import looks_like_checkpoint
from cogtools.checkpoint.run import Iteration, Run
from cogtools.checkpoint.shards import PIPELINE_INDEX, SHARD_INDEX_SUFFIXES, kind_of_index, read_index
from cogtools.errors import SHOWN_PROBLEMS, CheckpointError
from cogtools.formatting import MAX_SHOWN_CHARS

if TYPE_CHECKING:
    from collections.abc import Iterable

LATEST = "latest"
EMA_SUFFIX = "-ema"

TRAINER_FILES = ("mp_rank_00_model_states.pt", "z3_rank_00_model_states.pt")
"""The names under which the trainer saves weights."""

WEIGHTS_FILES = (
    *TRAINER_FILES,
    "diffusion_pytorch_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
)
"""The names under which trainers and libraries save weights, the first one found being meant."""

_WEIGHTS_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
_ITERATION = re.compile(rf"([0-9]{{1,12}})({EMA_SUFFIX})?")
_OPTIMIZER_SHARD = re.compile(r"(bf16_)?zero_pp_rank_|.*optim_states\.pt$")
_CHOOSE = "choose one with --iteration, and --ema for those named -ema"
_MAX_LATEST_BYTES = 64

_MOST_SNIFFED = 16
"""How many files of a folder are opened at most to see what they are, where no name tells."""


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


def iteration_of(file: Path) -> Iteration | None:
    """The iteration in whose folder a checkpoint file lies, by that folder's name; None if it is not such a name."""
    return _iteration(file.absolute().parent)


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
    found, runs = _find_weights(folder), _runs_in(folder)
    if found is not None and runs:
        raise _several(folder, "this folder holds a checkpoint and trainings", [found, *runs], hint="give one of them")
    if found is not None:
        refuse_choice(found, iteration=iteration, ema=ema)
        return found
    if len(runs) == 1:
        return find_file(runs[0], iteration=iteration, ema=ema)
    if runs:
        raise _several(folder, "this folder holds several trainings", runs, hint="give one of them")
    raise CheckpointError(
        "there is no checkpoint in this folder",
        file=folder,
        found=_listed(map(_described, sorted(_children(folder)))) or "nothing: the folder is empty",
        expected="a checkpoint file, or folders of iterations as the trainer makes them (1000/, latest)",
    )


def find_save_folder(folder: Path) -> Path | None:
    """The trainer's save folder that a folder is, or the only one in it; None if there is none, or several."""
    if iterations_in(folder):
        return folder
    runs = _runs_in(folder)
    return runs[0] if len(runs) == 1 and _find_weights(folder) is None else None


def is_optimizer_shard(name: str) -> bool:
    """Whether a file has the name of a part of an optimizer's state, which DeepSpeed saves beside the weights."""
    return _OPTIMIZER_SHARD.match(name) is not None


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


def pipeline_components(index: Path) -> dict[str, Path]:
    """The weights of each component of a diffusers pipeline, by the component's name."""
    components: dict[str, Path] = {}
    for name in read_index(index):
        if not name.startswith("_") and re.fullmatch(r"\w+", name):
            folder = index.with_name(name)
            found = _find_weights(folder) if is_folder(folder) else None
            if found is not None and kind_of_index(found) != "pipeline":  # no pipeline is a part of another
                components[name] = found
    return components


# Iterations of a save folder


def _iteration(folder: Path) -> Iteration | None:
    match = _ITERATION.fullmatch(folder.name)
    return Iteration(int(match[1]), match[2] is not None, folder) if match else None


def iterations_in(folder: Path) -> list[Iteration]:
    """The iterations in a trainer's save folder, by number; [] if it is no such folder."""
    found = (_iteration(child) for child in _folders(folder))
    return sorted((item for item in found if item and _has_weights(item.folder)), key=lambda item: item[:2])


def _runs_in(folder: Path) -> list[Path]:
    """The trainers' save folders in a folder, but for those that may not be read."""
    runs = []
    for child in _folders(folder):
        with contextlib.suppress(CheckpointError):
            if iterations_in(child):
                runs.append(child)
    return runs


def _latest(folder: Path) -> str | None:
    path = folder / LATEST
    if not is_file(path):
        return None
    with SourceFile.open(path) as file:
        content = file.read(0, min(file.size_bytes, _MAX_LATEST_BYTES))
    return content.decode("utf-8", "backslashreplace").strip()


def _choose(folder: Path, iterations: list[Iteration], number: int | None, *, ema: bool) -> Iteration:
    """The iteration that is asked for; the latest if none is."""
    what = f"there is no iteration {number} in this folder"
    if number is None:
        number, what = _asked_by_latest(folder, iterations, ema=ema)
    for item in iterations:
        if item.number == number and item.ema == ema:
            return item
    hint = _CHOOSE
    if any(item.number == number for item in iterations):
        weights, hint = ("plain", "leave --ema out") if ema else ("EMA", "take them with --ema")
        what = f"there are only {weights} weights of iteration {number} in this folder"
    raise _several(folder, what, iterations, hint)


def _asked_by_latest(folder: Path, iterations: list[Iteration], *, ema: bool) -> tuple[int, str]:
    """The number of the iteration that the file `latest` names, and what to say if that is not there."""
    latest = _latest(folder)
    if latest is None:
        numbers = {item.number for item in iterations}
        if len(numbers) > 1:
            raise _several(folder, "there is no file `latest` to tell which iteration is meant", iterations, _CHOOSE)
        return numbers.pop(), ""
    match = _ITERATION.fullmatch(latest)
    if match is None:
        says = f"says {latest!r}, which is no iteration" if latest else "is empty"
        raise _several(folder, f"the file `latest` {says}", iterations, _CHOOSE)
    number = int(match[1])
    if match[2] and not ema:
        hint = f"take them with --ema, or the plain ones with --iteration {number}"
        raise _several(folder, f"the file `latest` names EMA weights: {latest}", iterations, hint)
    return number, f"the file `latest` names iteration {number}, which is not in this folder"


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
    files = [child for child in _children(folder) if not is_optimizer_shard(child.name) and is_file(child)]
    known = any(file.name.endswith(_WEIGHTS_SUFFIXES) for file in files)
    return known or any(_look_like_checkpoints(files, most=1))


def _find_weights(folder: Path) -> Path | None:
    """The weights that a folder stands for; None if there are none.

    Raises:
        CheckpointError: if there are several files of weights, none of them under a usual name.
    """
    files = {child.name: child for child in sorted(_children(folder)) if is_file(child)}
    indices = [name for name in files if name.endswith(SHARD_INDEX_SUFFIXES)]
    for name in (PIPELINE_INDEX, *WEIGHTS_FILES, *indices):
        if name in files:
            return files[name]
    shards = [name for name in files if is_optimizer_shard(name)]
    weights = [name for name in files if name.endswith(_WEIGHTS_SUFFIXES) and name not in shards]
    if len(weights) != 1:
        documents = [file for name, file in files.items() if name.endswith(".json")][:_MOST_SNIFFED]
        weights = [file.name for file in documents if kind_of_index(file)] or weights
    if not weights:
        others = [file for name, file in files.items() if name not in shards]
        weights = sorted(file.name for file in _look_like_checkpoints(others, most=_MOST_SNIFFED))
    if len(weights) > 1:
        raise CheckpointError(
            "this folder holds several checkpoints", file=folder, found=_listed(weights), hint="give one of them"
        )
    if shards and not weights:
        raise CheckpointError(
            "this folder holds an optimizer's state only",
            file=folder,
            found=_listed(shards),
            expected=f"the weights, which the trainer saves beside it as {WEIGHTS_FILES[0]}",
        )
    return files[weights[0]] if weights else None


def _look_like_checkpoints(files: list[Path], *, most: int) -> list[Path]:
    """Those of the largest files that begin as checkpoints do."""
    sizes = []
    for file in files:
        with contextlib.suppress(OSError):  # it has gone
            sizes.append((file.stat().st_size, file))
    return [file for _, file in heapq.nlargest(most, sizes) if looks_like_checkpoint(file)]


def _described(child: Path) -> str:
    """The name of what is in a folder, and why it is no checkpoint where that can be seen."""
    if child.is_symlink() and not (is_file(child) or is_folder(child)):
        return f"{child.name} (a link to {str(child.readlink())[:MAX_SHOWN_CHARS]}, which is not there)"
    if _iteration(child) and is_folder(child) and any(is_optimizer_shard(item.name) for item in _children(child)):
        return f"{child.name} (an optimizer's state only)"
    return child.name


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
