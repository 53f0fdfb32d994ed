"""Save folders of all who write them: `latest` decides, folders are compared by name, and each is listed once."""

import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cogtools.checkpoint.folder import choose, find_file, iterations_in
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.checkpoint.run import find_run, read_save_folder
from cogtools.errors import CheckpointError

NAME = "mp_rank_00_model_states.pt"
FOLDERS = "a checkpoint file, or folders of iterations as the trainer makes them (1000/, latest)"


def weights(path: Path) -> Path:
    """A checkpoint whose one tensor is named after its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({path.parent.name: torch.arange(2)}, path)
    else:
        torch.save({"module": {path.parent.name: torch.arange(2)}}, path)
    return path


def taken(path: Path, *, iteration: int | None = None, ema: bool = False) -> str:
    with open_checkpoint(path, iteration=iteration, ema=ema) as checkpoint:
        (key,) = checkpoint.tensors
    return key


def error_of(path: Path, *, iteration: int | None = None, ema: bool = False) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, iteration=iteration, ema=ema)
    return str(caught.value).replace(str(path), "GIVEN")


# `latest` names a folder


@pytest.mark.parametrize("latest", ["1", "01"])
def test_latest_is_a_name_and_not_a_number(latest: str, tmp_path: Path) -> None:
    for name in ("1", "01"):
        weights(tmp_path / name / NAME)
    (tmp_path / "latest").write_text(latest)

    assert taken(tmp_path) == latest


@pytest.mark.parametrize("latest", [None, "1"])
def test_two_folders_of_one_number_are_no_answer_to_a_number(latest: str | None, tmp_path: Path) -> None:
    for name in ("1", "01"):
        weights(tmp_path / name / NAME)
    if latest is not None:
        (tmp_path / "latest").write_text(latest)

    what = "there are several folders of iteration 1"
    several = f"{what}\n  file:      GIVEN\n  found:     01, 1\n  try:       give one of them"
    assert error_of(tmp_path, iteration=1) == several
    if latest is None:
        assert error_of(tmp_path) == several


def test_a_name_that_only_has_the_number_of_a_folder_is_not_that_folder(tmp_path: Path) -> None:
    weights(tmp_path / "0500" / NAME)
    (tmp_path / "latest").write_text("500")

    assert error_of(tmp_path).startswith("the file `latest` names '500', which is not a folder here\n")


@pytest.mark.parametrize("latest", ["global_step500", "checkpoint-500", "pytorch_model", "checkpoint", "last run"])
def test_latest_may_name_any_folder(latest: str, tmp_path: Path) -> None:
    weights(tmp_path / latest / NAME)
    torch.save({"optimizer_state_dict": {}}, tmp_path / latest / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    weights(tmp_path / "global_step400" / NAME)
    (tmp_path / "latest").write_text(latest)
    (tmp_path / "zero_to_fp32.py").touch()

    assert taken(tmp_path) == latest
    assert taken(tmp_path.parent if tmp_path.parent == tmp_path else tmp_path / latest) == latest
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.run is not None
        assert (checkpoint.run.folder, str(checkpoint.run.chosen)) == (tmp_path, latest)
        assert latest in map(str, checkpoint.run.iterations)


@pytest.mark.parametrize("latest", ["..", ".", "x/../x", "/", "x/y"])
def test_latest_does_not_lead_elsewhere(latest: str, tmp_path: Path) -> None:
    weights(tmp_path / "run" / "x" / "y" / NAME)
    weights(tmp_path / "run" / "1" / NAME)
    weights(tmp_path / "final.pt")
    (tmp_path / "run" / "latest").write_text(latest)

    assert error_of(tmp_path / "run").startswith(f"the file `latest` names {latest!r}, which is not a folder here\n")


def test_iterations_of_other_writers_are_chosen_by_their_number(tmp_path: Path) -> None:
    for name in ("checkpoint-500", "checkpoint-1000"):
        weights(tmp_path / name / "pytorch_lora_weights.safetensors")
        torch.save({"state": {}}, tmp_path / name / "optimizer.bin")

    assert taken(tmp_path, iteration=500) == "checkpoint-500"
    assert error_of(tmp_path) == (
        "there is no file `latest` to tell which iteration is meant\n  file:      GIVEN\n"
        "  found:     checkpoint-500, checkpoint-1000\n"
        "  try:       choose one with --iteration, and --ema for those named -ema"
    )
    weights(tmp_path / "pytorch_lora_weights.safetensors")  # what the training leaves at its end
    assert taken(tmp_path) == tmp_path.name


def test_a_library_s_file_beside_the_folder_that_deepspeed_resumes_from_is_the_checkpoint(tmp_path: Path) -> None:
    weights(tmp_path / "checkpoint-500" / "adapter_model.safetensors")
    weights(tmp_path / "checkpoint-500" / "global_step500" / NAME)
    (tmp_path / "checkpoint-500" / "latest").write_text("global_step500")

    assert taken(tmp_path / "checkpoint-500") == "checkpoint-500"


# What a training saves beside its weights


def accelerate_folder(folder: Path) -> Path:
    """As accelerate with DeepSpeed saves a checkpoint."""
    weights(folder / "pytorch_model" / NAME)
    torch.save({}, folder / "pytorch_model" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    torch.save({"base_lrs": [1e-4], "last_epoch": 500, "_step_count": 501}, folder / "scheduler.bin")
    (folder / "random_states_0.pkl").write_bytes(pickle.dumps({"step": 500, "random_state": random.getstate()}))
    (folder / "latest").write_text("pytorch_model")
    (folder / "zero_to_fp32.py").touch()
    return folder


def test_a_checkpoint_of_accelerate_with_deepspeed_is_what_its_latest_names(tmp_path: Path) -> None:
    folder = accelerate_folder(tmp_path / "checkpoint-500")

    assert taken(folder) == "pytorch_model"
    assert taken(tmp_path) == "pytorch_model"
    accelerate_folder(tmp_path / "checkpoint-1000")
    assert taken(tmp_path, iteration=1000) == "pytorch_model"


COMPANIONS = [
    *("scheduler.bin", "scheduler_1.bin", "optimizer.bin", "optimizer_1.bin", "sampler.bin", "random_states_0.pkl"),
    *("optimizer.pt", "scheduler.pt", "lr_scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth"),
    *("training_args.bin", "dl_state_dict.bin", "custom_checkpoint_0.pkl", "optim_state.pt"),
    *("mp_rank_00_optim_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
]


@pytest.mark.parametrize("name", COMPANIONS)
def test_what_a_training_saves_beside_its_weights_is_never_the_checkpoint(name: str, tmp_path: Path) -> None:
    torch.save({"state": torch.arange(3)}, tmp_path / name)

    assert error_of(tmp_path) == (
        "there is no checkpoint in this folder\n  file:      GIVEN\n"
        f"  found:     only what a training saves beside its weights: {name}\n  expected:  {FOLDERS}"
    )
    weights(tmp_path / "mine.pt")
    assert taken(tmp_path) == tmp_path.name


# Iterations without weights


@pytest.mark.parametrize(("iteration", "nearest"), [(None, 800), (600, 500), (650, 500), (651, 800)])
def test_an_empty_iteration_is_called_empty_and_the_nearest_whole_one_is_offered(
    iteration: int | None, nearest: int, tmp_path: Path
) -> None:
    for name in ("500", "800", "1000-ema"):
        weights(tmp_path / name / NAME)
    for name in ("600", "650", "651", "1000"):
        (tmp_path / name).mkdir()
    (tmp_path / "latest").write_text("1000")
    number = iteration or 1000
    what = "the file `latest` names 1000, which" if iteration is None else f"the folder of iteration {number}"

    assert error_of(tmp_path, iteration=iteration) == (
        f"{what} has no weights in it\n  file:      GIVEN/{number}\n  found:     nothing: the folder is empty\n"
        f"  try:       take the nearest one that has some, with --iteration {nearest}"
    )
    assert taken(tmp_path, iteration=nearest) == str(nearest)
    assert error_of(tmp_path / str(number)) == (
        "there is no checkpoint in this folder\n  file:      GIVEN\n  found:     nothing: the folder is empty\n"
        f"  expected:  {FOLDERS}\n  try:       the nearest iteration that has weights is {tmp_path / str(nearest)}"
    )


def test_the_only_iteration_being_empty_is_said_as_well(tmp_path: Path) -> None:
    (tmp_path / "1000").mkdir()
    (tmp_path / "latest").write_text("1000")

    assert error_of(tmp_path) == (
        "the file `latest` names 1000, which has no weights in it\n"
        "  file:      GIVEN/1000\n  found:     nothing: the folder is empty"
    )


# Each is listed once


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The names of the folders that were listed since the last call."""
    names: list[str] = []
    scandir = os.scandir

    def listing(path: Path) -> object:
        names.append(Path(path).name)
        return scandir(path)

    def since() -> list[str]:
        found = names.copy()
        names.clear()
        return found

    monkeypatch.setattr(os, "scandir", listing)
    return since


def test_a_save_folder_that_was_read_is_not_listed_again(tmp_path: Path, listed: Callable[[], list[str]]) -> None:
    for number in range(1, 21):
        weights(tmp_path / str(number) / NAME)
    (tmp_path / "latest").write_text("20")

    save_folder = read_save_folder(tmp_path)
    assert listed() == [tmp_path.name, *map(str, range(1, 21))]
    assert [item.number for item in save_folder.iterations] == list(range(1, 21))
    assert iterations_in(tmp_path) == list(save_folder.iterations)
    listed()
    assert [choose(save_folder).number, choose(save_folder, 7).number] == [20, 7]
    assert listed() == []


def test_to_know_the_run_of_a_file_no_folder_is_listed(tmp_path: Path, listed: Callable[[], list[str]]) -> None:
    for number in range(1, 21):
        weights(tmp_path / str(number) / NAME)
        (tmp_path / f"{number}-ema").mkdir()
    weights(tmp_path / "7-ema" / NAME)

    run = find_run(tmp_path / "7" / NAME)
    assert listed() == []
    assert run is not None
    assert (run.folder, str(run.chosen), str(run.twin)) == (tmp_path, "7", "7-ema")
    assert listed() == ["7-ema"]
    with open_checkpoint(tmp_path / "3" / NAME) as checkpoint:
        assert str(checkpoint.run.chosen if checkpoint.run else None) == "3"
    assert listed() == []
    assert len(run.iterations) == 21


def test_exporting_every_iteration_takes_a_number_of_listings_that_grows_with_them(
    tmp_path: Path, listed: Callable[[], list[str]]
) -> None:
    def listings(count: int) -> int:
        folder = tmp_path / f"run{count}"
        for number in range(1, count + 1):
            weights(folder / str(number) / NAME)
        listed()
        for item in read_save_folder(folder).iterations:
            with open_checkpoint(find_file(item.folder)) as checkpoint:
                assert checkpoint.run is not None
                assert checkpoint.run.twin is None
        return len(listed())

    assert listings(20) <= 2 * listings(10)


def test_no_file_with_a_usual_name_is_opened_to_list_iterations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 6):
        weights(tmp_path / str(number) / NAME)
    monkeypatch.setattr("cogtools.checkpoint.weights.looks_like_checkpoint", pytest.fail)

    assert len(read_save_folder(tmp_path).iterations) == 5


def test_folders_that_lead_into_themselves_have_an_end(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "x").symlink_to(".")
    (tmp_path / "run" / "latest").write_text("x")
    weights(tmp_path / "run" / "1" / "y" / NAME)

    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "run")
