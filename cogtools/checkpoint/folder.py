"""Folders that are given in place of a checkpoint file, and which files in them are meant.

    a training's save folder   latest, 1000/, 1000-ema/, training_config.yaml …; `latest` decides, whatever it names
    an iteration's folder      mp_rank_00_model_states.pt
    sharded weights            model.safetensors.index.json or pytorch_model.bin.index.json, and the shards beside it;
                               without an index, all shards by their names
    a diffusers model          diffusion_pytorch_model.safetensors, or its shards
    a diffusers pipeline       model_index.json, and a folder per component
    parts of a pipeline        transformer/ of them
    a LoRA                     pytorch_lora_weights.safetensors; PEFT's adapter_model.safetensors
    one checkpoint             whatever its name: where no name tells, the largest files are looked into

What a training saves beside its weights (optimizer, scheduler, random states …) is never taken for a checkpoint.
Nothing is guessed: if several checkpoints could be meant, the error lists them.
"""

from __future__ import annotations

import contextlib
import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from cogtools.checkpoint.files import link_target
from cogtools.checkpoint.names import EMA_SUFFIX, MAIN_PART, is_companion, spread_over
from cogtools.checkpoint.paths import RemotePath
from cogtools.checkpoint.places import is_file, is_folder, list_folder, store_of
from cogtools.checkpoint.run import (
    Iteration,
    SaveFolder,
    is_trainers_name,
    iteration_of,
    names_of_iteration,
    read_latest,
    read_save_folder,
)
from cogtools.checkpoint.shards import kind_of_index, read_index
from cogtools.checkpoint.weights import find_weights, listed, spread_error, what_is_there
from cogtools.errors import SHOWN_PROBLEMS, CheckpointError, OptionError
from cogtools.formatting import MAX_SHOWN_CHARS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cogtools.checkpoint.paths import AnyPath

_CHOOSE = "choose one with --iteration, and --ema for those named -ema"
_ONE_OF_THEM = "give one of them"
_MAX_SAVE_FOLDERS = 4
"""How many may lie in each other, as global_step500/ does in checkpoint-500/. More is a link to itself."""


def find_file(folder: AnyPath, *, iteration: int | None = None, ema: bool = False) -> AnyPath:
    """The file that a folder stands for: weights, an index of shards, or a pipeline's model_index.json.

    Where shards have no index it is the folder that they are in.

    Args:
        folder: any of the folders above.
        iteration: which iteration of a save folder; None takes the latest.
        ema: take its EMA weights.

    Raises:
        CheckpointError: if there is no checkpoint in it, or it could be one of several.
    """
    if iteration is not None and isinstance(folder, RemotePath):
        store_of(folder).ask_for(folder, names_of_iteration(iteration))
    return _find_file(folder, iteration, ema=ema, levels=_MAX_SAVE_FOLDERS)


def _find_file(folder: AnyPath, number: int | None, *, ema: bool, levels: int) -> AnyPath:
    save_folder = read_save_folder(folder)
    if save_folder.iterations and levels:
        chosen = choose(save_folder, number, ema=ema).folder
        return find_weights(chosen) or _find_file(chosen, None, ema=False, levels=levels - 1)
    found, runs = find_weights(folder), _runs_in(folder)
    if found is not None and runs:
        raise _several(folder, "this folder holds a checkpoint and trainings", [found, *runs], hint=_ONE_OF_THEM)
    if found is not None:
        refuse_choice(found, iteration=number, ema=ema)
        return found
    if len(runs) == 1 and levels:
        return _find_file(runs[0], number, ema=ema, levels=levels - 1)
    if runs:
        hint = f"{_ONE_OF_THEM}; export-lora and export-model take all of them: {folder}/*/"
        raise _several(folder, "this folder holds several trainings", runs, hint)
    main = folder / MAIN_PART
    found = find_weights(main) if is_folder(main) else None
    if found is None:
        raise _no_checkpoint(save_folder)
    refuse_choice(found, iteration=number, ema=ema)
    return found


def _no_checkpoint(save_folder: SaveFolder) -> CheckpointError:
    """The error for a folder without weights: what it holds instead, and what helps where that can be seen."""
    folder = save_folder.folder
    with contextlib.suppress(CheckpointError):
        named = save_folder.named(read_latest(folder) or "")
        if named is not None:
            return _without_weights(save_folder, named, f"the file `latest` names {named}, which has no weights in it")
    entries = list_folder(folder)
    for entry in entries[:SHOWN_PROBLEMS]:
        if entry.is_folder and not entry.path.name.startswith("optim"):
            with contextlib.suppress(CheckpointError):
                spread = spread_over(inner.path.name for inner in list_folder(entry.path) if inner.is_file)
                if spread is not None:
                    return spread_error(entry.path, *spread)
    names = [entry.path.name for entry in entries]
    only_companions = bool(names) and all(map(is_companion, names))
    described = [*map(_described, (entry.path for entry in entries[:SHOWN_PROBLEMS])), *names[SHOWN_PROBLEMS:]]
    return CheckpointError(
        "there is no checkpoint in this folder",
        file=folder,
        found=what_is_there(folder) if only_companions or not names else listed(described),
        expected="a checkpoint file, or folders of iterations as the trainer makes them (1000/, latest)",
        hint=_nearest_to(folder),
    )


def _nearest_to(folder: AnyPath) -> str | None:
    """Where the folder of an iteration is empty: which other one is not."""
    own = iteration_of(folder.absolute())
    if own is None:
        return None
    with contextlib.suppress(CheckpointError):
        nearest = read_save_folder(own.folder.parent).nearest(own.number)
        return None if nearest is None else f"the nearest iteration that has weights is {nearest.folder}"
    return None


def find_save_folder(folder: AnyPath) -> AnyPath | None:
    """The trainer's save folder that a folder is, or the only one in it; None if there is none, or several."""
    save_folder = read_save_folder(folder)
    if save_folder.iterations:
        return folder
    runs = _runs_in(folder)
    return runs[0] if len(runs) == 1 and find_weights(folder) is None else None


def iterations_in(folder: AnyPath) -> list[Iteration]:
    """The iterations in a trainer's save folder, by number; [] if it is not such a folder."""
    return list(read_save_folder(folder).iterations)


def recorded_iteration(path: AnyPath, number: int | None, *, ema: bool) -> Iteration | None:
    """The iteration of a save folder that a record names; None if it is not there, or there is no choice."""
    folder = find_save_folder(path) if number is not None and is_folder(path) else None
    every = [] if folder is None else iterations_in(folder)
    found = [item for item in every if (item.number, item.ema) == (number, ema)]
    return found[0] if len(found) == 1 and len(every) > 1 else None


def refuse_choice(path: AnyPath, *, iteration: int | None, ema: bool) -> None:
    """Raise if `iteration` or `ema` ask for something else than this file is."""
    chosen = iteration_of(path.absolute().parent)
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


def pipeline_components(index: AnyPath) -> dict[str, AnyPath]:
    """The weights of each component of a diffusers pipeline, by the component's name."""
    components: dict[str, AnyPath] = {}
    for name in read_index(index):
        if not name.startswith("_") and re.fullmatch(r"\w+", name):
            folder = index.with_name(name)
            found = find_weights(folder) if is_folder(folder) else None
            if found is not None and kind_of_index(found) != "pipeline":  # no pipeline is a part of another
                components[name] = found
    return components


# The choice in a save folder


def choose(save_folder: SaveFolder, number: int | None = None, *, ema: bool = False) -> Iteration:
    """The iteration that is asked for; the one that `latest` names if none is. The folder is not listed again.

    Args:
        save_folder: what is in it.
        number: which iteration; None takes the latest.
        ema: take its EMA weights.

    Raises:
        CheckpointError: if it is not there, has no weights, or could be one of several.
    """
    if number is not None:
        return _numbered(save_folder, number, ema=ema)
    latest = read_latest(save_folder.folder)
    if latest is not None:
        return _named(save_folder, latest, ema=ema)
    numbers = {item.number for item in save_folder.iterations}
    if len(numbers) > 1:
        what = "there is no file `latest` to tell which iteration is meant"
        raise _several(save_folder.folder, what, save_folder.iterations, _CHOOSE)
    return _numbered(save_folder, numbers.pop(), ema=ema)


def _named(save_folder: SaveFolder, latest: str, *, ema: bool) -> Iteration:
    """The folder that `latest` names, as DeepSpeed takes it: by its name, not by the number in it."""
    folder, every = save_folder.folder, save_folder.iterations
    if not latest:
        raise _several(folder, "the file `latest` is empty", every, _CHOOSE)
    if latest.endswith(EMA_SUFFIX) and not ema:
        plain = iteration_of(folder / latest)
        hint = "take them with --ema" + (f", or the plain ones with --iteration {plain.number}" if plain else "")
        raise _several(folder, f"the file `latest` names EMA weights: {latest}", every, hint)
    plain_name = latest.removesuffix(EMA_SUFFIX)
    found = save_folder.named(plain_name + EMA_SUFFIX if ema else plain_name)
    if found in every:
        return found
    if found is not None:
        raise _without_weights(save_folder, found, f"the file `latest` names {found}, which has no weights in it")
    other = save_folder.named(plain_name if ema else plain_name + EMA_SUFFIX)
    if other in every:
        raise _only(save_folder, ema=ema, of=plain_name)
    what = f"the file `latest` names {latest!r}, which is not a folder here"
    raise _several(folder, what, every, _CHOOSE)


def _numbered(save_folder: SaveFolder, number: int | None, *, ema: bool) -> Iteration:
    of_number = [item for item in save_folder.iterations if item.number == number]
    found = [item for item in of_number if item.ema == ema]
    if len(found) > 1:
        what = f"there are several folders of iteration {number}"
        raise _several(save_folder.folder, what, found, _ONE_OF_THEM)
    if found:
        return found[0]
    empty = [item for item in save_folder.without_weights if item.number == number and item.ema == ema]
    if empty:
        raise _without_weights(save_folder, empty[0], f"the folder of iteration {number} has no weights in it")
    if of_number:
        raise _only(save_folder, ema=ema, of=str(of_number[0]).removesuffix(EMA_SUFFIX))
    what = f"there is no iteration {number} in this folder"
    raise _several(save_folder.folder, what, save_folder.iterations, _CHOOSE)


def _only(save_folder: SaveFolder, *, ema: bool, of: str) -> CheckpointError:
    weights, hint = ("plain", "leave --ema out") if ema else ("EMA", "take them with --ema")
    what = f"there are only {weights} weights of iteration {of} in this folder"
    return _several(save_folder.folder, what, save_folder.iterations, hint)


def _without_weights(save_folder: SaveFolder, item: Iteration, what: str) -> CheckpointError:
    """The error for an iteration without weights: why there are none, and the nearest that has some."""
    nearest = save_folder.nearest(item.number)
    hint = f"take the nearest one that has some, with --iteration {nearest.number}" if nearest else None
    try:
        find_weights(item.folder)
    except CheckpointError as error:  # they are spread over files
        return error
    return CheckpointError(what, file=item.folder, found=what_is_there(item.folder), hint=hint)


def _several(folder: AnyPath, what: str, choices: Iterable[AnyPath | Iteration], hint: str) -> CheckpointError:
    names = [str(choice) if isinstance(choice, Iteration) else choice.name for choice in choices]
    return CheckpointError(what, file=folder, found=listed(names), hint=hint)


# What else is in a folder


def _runs_in(folder: AnyPath) -> list[AnyPath]:
    """The save folders in a folder, but for those that may not be read, and for the folders of iterations."""
    runs = []
    for entry in list_folder(folder):
        if entry.is_folder and (iteration_of(entry.path) is None or is_trainers_name(entry.path.name)):
            with contextlib.suppress(CheckpointError):
                if read_save_folder(entry.path).iterations:
                    runs.append(entry.path)
    return runs


def _described(path: AnyPath) -> str:
    """The name of what is in a folder, and why it is not a checkpoint where that can be seen."""
    target = link_target(path)
    if target is not None and not (is_file(path) or is_folder(path)):
        return f"{path.name} (a link to {str(target)[:MAX_SHOWN_CHARS]}, which is not there)"
    with contextlib.suppress(CheckpointError):
        if is_folder(path) and iteration_of(path) is not None:
            return f"{path.name} ({what_is_there(path)})"
    return path.name


def has_pattern(path: AnyPath) -> bool:
    """Whether a path is that of a URL with a pattern, which no shell has expanded."""
    return isinstance(path, RemotePath) and any(map(_PATTERN.search, path.parts[1:]))


def matching(path: RemotePath) -> list[RemotePath]:
    """What there is in a store that a pattern fits, by name; within a name, as a shell has it.

    Raises:
        OptionError: if that is a server that lists nothing.
        CheckpointError: if nothing fits, or a folder cannot be read.
    """
    if not store_of(path).lists:
        raise OptionError(
            f"{path.scheme}:// lists nothing: a pattern needs a store that lists",
            found=str(path),
            hint="give the URLs one by one",
        )
    found = [path]
    while found[0] != found[0].parent:
        found[0] = found[0].parent
    for name in path.parts[1:]:
        if _PATTERN.search(name):
            entries = [entry.path for folder in found for entry in list_folder(folder)]
            found = [entry for entry in entries if fnmatchcase(entry.name, name) and isinstance(entry, RemotePath)]
        else:
            found = [folder / name for folder in found]
    found = [one for one in found if is_file(one) or is_folder(one)]
    if not found:
        raise CheckpointError("nothing in the store fits this pattern", file=path)
    return sorted(found)


_PATTERN = re.compile(r"[*?\[]")
