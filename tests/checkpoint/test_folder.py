"""Trainers' folders, sharded weights, models and pipelines: which files are meant, and what is said if none is."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file

from cogtools.checkpoint.index import Checkpoint
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.errors import CheckpointError
from tests.support.factories import SAVERS
from tests.support.oracles import described_by_cogtools, described_by_torch

NAME = "mp_rank_00_model_states.pt"


def run_of(folder: Path, *iterations: str, latest: str | bytes | None = None) -> Path:
    """A save folder; the tensor in the folder of an iteration is named as the folder."""
    for iteration in iterations:
        (folder / iteration).mkdir(parents=True)
        torch.save({"module": {iteration: torch.arange(2)}}, folder / iteration / NAME)
    if latest is not None:
        (folder / "latest").write_bytes(latest if isinstance(latest, bytes) else latest.encode())
    return folder


def taken(path: Path, *, iteration: int | None = None, ema: bool = False) -> str:
    """The folder of the iteration that is opened."""
    with open_checkpoint(path, iteration=iteration, ema=ema) as checkpoint:
        (key,) = checkpoint.tensors
    return key


def error_of(path: Path, *, iteration: int | None = None, ema: bool = False) -> str:
    """The whole message, without the path of the test's folder."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, iteration=iteration, ema=ema)
    return str(caught.value).replace(str(path), "GIVEN")


# The trainer's save folder


@pytest.mark.parametrize(
    ("iterations", "latest", "iteration", "ema", "expected"),
    [
        pytest.param(["500", "1000"], "1000", None, False, "1000", id="latest"),
        pytest.param(["500", "1000"], "500", None, False, "500", id="latest-is-not-the-highest"),
        pytest.param(["500", "1000"], " 1000\n", None, False, "1000", id="latest-with-a-line-end"),
        pytest.param(["500", "1000"], "1000", 500, False, "500", id="iteration"),
        pytest.param(["500", "1000"], None, 500, False, "500", id="iteration-without-latest"),
        pytest.param(["500", "1000"], b"\xff", 500, False, "500", id="iteration-and-a-broken-latest"),
        pytest.param(["1000", "1000-ema"], "1000", None, False, "1000", id="plain-of-two"),
        pytest.param(["1000", "1000-ema"], "1000", None, True, "1000-ema", id="ema-of-two"),
        pytest.param(["1000-ema"], "1000", None, True, "1000-ema", id="ema-alone"),
        pytest.param(["1000", "1000-ema"], "1000-ema", None, True, "1000-ema", id="ema-in-latest"),
        pytest.param(["1000"], None, None, False, "1000", id="one-iteration-without-latest"),
        pytest.param(["1000", "1000-ema"], None, None, True, "1000-ema", id="one-iteration-twice-without-latest"),
        pytest.param(["500", "500-ema", "1000"], "1000", 500, True, "500-ema", id="iteration-and-ema"),
    ],
)
def test_the_save_folder_stands_for_the_iteration_that_is_meant(
    iterations: list[str], latest: str | bytes | None, iteration: int | None, ema: bool, expected: str, tmp_path: Path
) -> None:
    folder = run_of(tmp_path / "run", *iterations, latest=latest)

    assert taken(folder, iteration=iteration, ema=ema) == expected
    assert taken(tmp_path, iteration=iteration, ema=ema) == expected  # the only training in its folder


CHOOSE = "\n  try:       choose one with --iteration, and --ema for those named -ema"


@pytest.mark.parametrize(
    ("iterations", "latest", "iteration", "ema", "expected"),
    [
        pytest.param(
            ["500", "1000"],
            "1500",
            None,
            False,
            "the file `latest` names '1500', which is not a folder here"
            "\n  file:      GIVEN\n  found:     500, 1000" + CHOOSE,
            id="stale-latest",
        ),
        pytest.param(
            ["500", "1000"],
            "../../etc",
            None,
            False,
            "the file `latest` names '../../etc', which is not a folder here"
            "\n  file:      GIVEN\n  found:     500, 1000" + CHOOSE,
            id="hostile-latest",
        ),
        pytest.param(
            ["500", "1000"],
            b"\xff\xfe" + b"1" * 10_000_000,
            None,
            False,
            "the file `latest` is too long to name a folder"
            "\n  file:      GIVEN/latest\n  found:     10,000,002 bytes\n  expected:  at most 1,024",
            id="endless-latest",
        ),
        pytest.param(
            ["1000"],
            " \n",
            None,
            False,
            "the file `latest` is empty\n  file:      GIVEN\n  found:     1000" + CHOOSE,
            id="empty-latest",
        ),
        pytest.param(
            ["1000", "1000-ema"],
            "1000-ema",
            None,
            False,
            "the file `latest` names EMA weights: 1000-ema\n  file:      GIVEN\n  found:     1000, 1000-ema"
            "\n  try:       take them with --ema, or the plain ones with --iteration 1000",
            id="ema-in-latest",
        ),
        pytest.param(
            ["500", "1000", "1000-ema"],
            None,
            None,
            False,
            "there is no file `latest` to tell which iteration is meant"
            "\n  file:      GIVEN\n  found:     500, 1000, 1000-ema"
            "\n  try:       choose one with --iteration, and --ema for those named -ema",
            id="no-latest",
        ),
        pytest.param(
            ["500", "1000"],
            "1000",
            750,
            False,
            "there is no iteration 750 in this folder\n  file:      GIVEN\n  found:     500, 1000" + CHOOSE,
            id="no-such-iteration",
        ),
        pytest.param(
            ["1000"],
            "1000",
            None,
            True,
            "there are only plain weights of iteration 1000 in this folder"
            "\n  file:      GIVEN\n  found:     1000\n  try:       leave --ema out",
            id="no-ema",
        ),
        pytest.param(
            ["1000-ema"],
            "1000",
            None,
            False,
            "there are only EMA weights of iteration 1000 in this folder"
            "\n  file:      GIVEN\n  found:     1000-ema\n  try:       take them with --ema",
            id="only-ema",
        ),
    ],
)
def test_a_save_folder_in_which_nothing_is_meant_says_what_there_is(
    iterations: list[str], latest: str | bytes | None, iteration: int | None, ema: bool, expected: str, tmp_path: Path
) -> None:
    folder = run_of(tmp_path / "run", *iterations, latest=latest)

    assert error_of(folder, iteration=iteration, ema=ema) == expected


def test_a_checkpoint_knows_the_run_it_lies_in_and_its_twin(tmp_path: Path) -> None:
    run_of(tmp_path, "500", "1000", "1000-ema", latest="1000")

    with open_checkpoint(tmp_path / "1000" / NAME) as checkpoint:
        run = checkpoint.run
    assert run is not None
    assert (run.folder, run.latest, str(run.chosen), str(run.twin)) == (tmp_path, "1000", "1000", "1000-ema")
    assert [str(item) for item in run.iterations] == ["500", "1000", "1000-ema"]
    with open_checkpoint(tmp_path, iteration=500) as checkpoint:
        assert checkpoint.run is not None
        assert checkpoint.run.twin is None


def test_a_file_outside_of_a_run_has_none(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(2)}, tmp_path / "x.pt")

    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        assert checkpoint.run is None


@pytest.mark.parametrize("given", ["1000", f"1000/{NAME}", f"1000/../1000/{NAME}"])
def test_a_path_into_an_iteration_needs_no_choice_and_takes_the_same(given: str, tmp_path: Path) -> None:
    run_of(tmp_path, "500", "1000", latest="500")

    assert taken(tmp_path / given) == "1000"
    assert taken(tmp_path / given, iteration=1000) == "1000"


@pytest.mark.parametrize(("iteration", "ema", "option"), [(500, False, "--iteration 500"), (None, True, "--ema")])
@pytest.mark.parametrize("given", ["1000", f"1000/{NAME}"])
def test_a_choice_beside_a_path_that_says_otherwise_is_refused(
    given: str, iteration: int | None, ema: bool, option: str, tmp_path: Path
) -> None:
    run_of(tmp_path, "500", "1000", "1000-ema", latest="500")

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / given, iteration=iteration, ema=ema)
    assert str(caught.value) == (
        f"{option} does not go with this path, which already says which checkpoint is meant\n"
        f"  file:      {tmp_path / '1000' / NAME}\n"
        "  expected:  the trainer's save folder, in which it chooses"
    )


def test_several_trainings_in_a_folder_are_listed(tmp_path: Path) -> None:
    run_of(tmp_path / "disney", "1000", latest="1000")
    run_of(tmp_path / "anime", "1000", latest="1000")

    assert error_of(tmp_path) == (
        "this folder holds several trainings\n  file:      GIVEN\n  found:     anime, disney\n"
        "  try:       give one of them; export-lora and export-model take all of them: GIVEN/*/"
    )


def test_a_folder_that_may_not_be_read_is_not_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of(tmp_path / "disney", "1000", latest="1000")
    (tmp_path / "lost+found").mkdir()
    whole = os.scandir

    def scandir(path: Path) -> object:
        if path.name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return whole(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert taken(tmp_path) == "1000"


def test_a_checkpoint_beside_trainings_is_not_taken_silently(tmp_path: Path) -> None:
    for name in ("anime", "disney"):
        run_of(tmp_path / name, "1000", latest="1000")
    torch.save({"a": torch.arange(2)}, tmp_path / "final.pt")

    assert error_of(tmp_path) == (
        "this folder holds a checkpoint and trainings\n  file:      GIVEN\n  found:     final.pt, anime, disney\n"
        "  try:       give one of them"
    )


def test_links_to_a_run_an_iteration_and_a_file_are_followed(tmp_path: Path) -> None:
    run_of(tmp_path / "run", "1000", "1000-ema", latest="1000")
    (tmp_path / "elsewhere").mkdir()
    for name, target in (("run", "run"), ("best", "run/1000"), ("best.pt", f"run/1000/{NAME}")):
        (tmp_path / "elsewhere" / name).symlink_to(tmp_path / target)
        with open_checkpoint(tmp_path / "elsewhere" / name) as checkpoint:
            assert list(checkpoint.tensors) == ["1000"]
            assert checkpoint.run is not None
            assert str(checkpoint.run.twin) == "1000-ema"


# Folders with something else in them

FOLDERS = "a checkpoint file, or folders of iterations as the trainer makes them (1000/, latest)"


def test_a_folder_without_a_checkpoint_says_what_it_holds(tmp_path: Path) -> None:
    expected = f"\n  expected:  {FOLDERS}"

    what = "there is no checkpoint in this folder\n  file:      GIVEN\n  found:     "
    assert error_of(tmp_path) == what + "nothing: the folder is empty" + expected
    for number in range(12):
        (tmp_path / f"{number:02}.txt").touch()
    names = ", ".join(f"{number:02}.txt" for number in range(10))
    assert error_of(tmp_path) == what + names + " … and 2 more" + expected


def test_several_checkpoints_in_a_folder_are_listed(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.pt", "readme.txt"):
        (tmp_path / name).touch()

    assert error_of(tmp_path) == (
        "this folder holds several checkpoints\n  file:      GIVEN\n  found:     a.pt, b.safetensors\n"
        "  try:       give one of them"
    )


def test_the_only_checkpoint_in_a_folder_is_taken_whatever_its_name(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(2)}, tmp_path / "my lora.ckpt")
    (tmp_path / "notes.txt").touch()

    assert taken(tmp_path) == "a"


SHARDS = [f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)]


@pytest.mark.parametrize(
    "names", [SHARDS, ["zero_pp_rank_0_mp_rank_00_optim_states.pt"], ["mp_rank_00_optim_states.pt"]]
)
def test_optimizer_shards_beside_the_weights_are_left_out(names: list[str], tmp_path: Path) -> None:
    torch.save({"a": torch.arange(2)}, tmp_path / "mine.pt")
    for name in names:
        torch.save({"optimizer_state_dict": {}}, tmp_path / name)

    assert taken(tmp_path) == "a"


def test_an_iteration_with_optimizer_shards_only_has_no_weights(tmp_path: Path) -> None:
    run_of(tmp_path / "run", "500", latest="1000")
    (tmp_path / "run" / "1000").mkdir()
    for name in SHARDS:
        torch.save({"optimizer_state_dict": {}}, tmp_path / "run" / "1000" / name)

    only = f"only what a training saves beside its weights: {', '.join(SHARDS)}"
    what = f"the file `latest` names 1000, which has no weights in it\n  file:      GIVEN/1000\n  found:     {only}"
    assert (
        error_of(tmp_path / "run") == what + "\n  try:       take the nearest one that has some, with --iteration 500"
    )
    assert error_of(tmp_path / "run" / "1000") == (
        f"there is no checkpoint in this folder\n  file:      GIVEN\n  found:     {only}\n  expected:  {FOLDERS}\n"
        f"  try:       the nearest iteration that has weights is {tmp_path / 'run' / '500'}"
    )
    (tmp_path / "run" / "500" / NAME).unlink()
    assert error_of(tmp_path / "run") == what
    (tmp_path / "run" / "latest").unlink()
    assert f"\n  found:     1000 ({only}), 500 (nothing: the folder is empty)\n" in error_of(tmp_path / "run")


@pytest.mark.parametrize("save", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("name", ["weights.sft", "weights"])
def test_the_only_checkpoint_is_known_by_its_content(name: str, save: str, tmp_path: Path) -> None:
    for folder in (tmp_path / "loose", tmp_path / "run" / "1000"):
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("epoch 1")
        (folder / "code.zip").write_bytes(b"PK\3\4" + bytes(20))
        tensors = {"a": torch.arange(2.0)}
        if save == "safetensors":
            save_file(tensors, folder / name)
        else:
            SAVERS[save](tensors, folder / name)

        assert taken(folder) == "a"
    assert taken(tmp_path / "run") == "a"


def test_several_checkpoints_without_usual_names_are_listed(tmp_path: Path) -> None:
    for name in ("b", "a"):
        save_file({"a": torch.arange(2)}, tmp_path / name)

    assert error_of(tmp_path).splitlines()[2] == "  found:     a, b"


def test_of_a_large_folder_only_the_largest_files_are_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(100):
        (tmp_path / f"{number}.png").write_bytes(bytes(number))
    opened = []
    monkeypatch.setattr("cogtools.checkpoint.weights.looks_like_checkpoint", lambda path: opened.append(path.name))

    error_of(tmp_path)
    assert opened[-16:] == [f"{number}.png" for number in range(99, 83, -1)]
    assert set(opened[:-16]) <= set(opened[-16:])


@pytest.mark.parametrize("target", ["gone.pt", "b" * 300, "x.pt"], ids=["gone", "too-long", "itself"])
def test_a_broken_link_is_no_checkpoint(target: str, tmp_path: Path) -> None:
    (tmp_path / "x.pt").symlink_to(target)

    assert error_of(tmp_path).startswith(
        "there is no checkpoint in this folder\n"
        f"  file:      GIVEN\n  found:     x.pt (a link to {target[:100]}, which is not there)\n"
    )
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("target", ["gone.pt", "gone"], ids=["file", "folder"])
def test_a_link_to_nothing_says_where_it_leads(target: str, tmp_path: Path) -> None:
    (tmp_path / "best").symlink_to(target)

    assert error_of(tmp_path / "best") == (
        f"there is no such file\n  file:      GIVEN\n  found:     a link to {target}, which is not there"
    )


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("gone.pt", "there is no such file"),
        ("a" * 300, "the file cannot be opened: File name too long"),
        ("a\0b", "the file cannot be opened: embedded null byte"),
    ],
    ids=["gone", "too-long", "nul"],
)
def test_a_path_at_which_nothing_can_be_is_an_error(name: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / name)
    assert caught.value.what == what


# Sharded weights


TENSORS = {f"layer.{number}.weight": torch.arange(64) + number for number in range(5)}


def sharded(folder: Path, pattern: str, save: Callable[[dict[str, torch.Tensor], Path], None]) -> Path:
    """Weights in shards of two tensors, as huggingface_hub splits them."""
    folder.mkdir(parents=True)
    split = split_torch_state_dict_into_shards(TENSORS, filename_pattern=pattern, max_shard_size=1100)
    for name, keys in split.filename_to_tensors.items():
        save({key: TENSORS[key] for key in keys}, folder / name)
    index = folder / (pattern.format(suffix="") + ".index.json")
    index.write_text(json.dumps({"metadata": split.metadata, "weight_map": split.tensor_to_filename}))
    return index


def save_safetensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path)


def save_bin(tensors: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(tensors, path)


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return sharded(tmp_path / "model", "model{suffix}.safetensors", save_safetensors)


@pytest.mark.parametrize(
    ("pattern", "save", "file_format"),
    [
        ("model{suffix}.safetensors", save_safetensors, "safetensors, sharded"),
        ("diffusion_pytorch_model{suffix}.safetensors", save_safetensors, "safetensors, sharded"),
        ("pytorch_model{suffix}.bin", save_bin, "torch.save (zip), sharded"),
    ],
)
def test_shards_are_one_checkpoint(
    pattern: str, save: Callable[[dict[str, torch.Tensor], Path], None], file_format: str, tmp_path: Path
) -> None:
    index = sharded(tmp_path / "model", pattern, save)

    for given in (index, index.parent):
        with open_checkpoint(given) as checkpoint:
            assert (checkpoint.path, checkpoint.format) == (index, file_format)
            assert described_by_cogtools(checkpoint.tensors) == described_by_torch(TENSORS)
            assert len(checkpoint.files) == len(checkpoint.parts) == 3
            assert checkpoint.size_bytes == sum(part.stat().st_size for part in index.parent.glob("*of*"))


def test_an_index_of_shards_is_known_by_its_content(index: Path) -> None:
    other = index.rename(index.with_name("weights.json"))
    (index.parent / "config.json").write_text('{"_class_name": "CogVideoXTransformer3DModel"}')

    for given in (other, other.parent):
        with open_checkpoint(given) as checkpoint:
            assert (checkpoint.path, checkpoint.format) == (other, "safetensors, sharded")
            assert described_by_cogtools(checkpoint.tensors) == described_by_torch(TENSORS)


def test_a_folder_that_is_called_blobs_is_none_of_the_cache(index: Path, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    shard = next(file for file in index.parent.iterdir() if file.suffix == ".safetensors")
    shard.rename(tmp_path / "blobs" / "0")
    shard.symlink_to(tmp_path / "blobs" / "0")
    assert "a link to another folder" in error_of(index)


def test_shards_of_a_hugging_face_cache_are_links_to_blobs(index: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(index.parent.iterdir()):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")

    with open_checkpoint(snapshot) as checkpoint:
        assert described_by_cogtools(checkpoint.tensors) == described_by_torch(TENSORS)


def test_a_shard_that_is_not_there_is_named(index: Path) -> None:
    (index.parent / "model-00002-of-00003.safetensors").unlink()

    assert error_of(index) == (
        "the index names files that are not here\n  file:      GIVEN\n"
        "  found:     no model-00002-of-00003.safetensors\n"
        "  try:       copy or download the missing files into the folder of the index"
    )


def test_a_tensor_that_is_not_in_its_shard_is_named(index: Path) -> None:
    content = json.loads(index.read_text())
    content["weight_map"]["more"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(content))

    assert error_of(index) == (
        "the files lack tensors that the index names\n"
        "  file:      GIVEN\n"
        "  found:     no more in model-00001-of-00003.safetensors\n"
        "  try:       copy or download the files again, all of one version"
    )


@pytest.mark.parametrize(
    ("content", "found"),
    [
        pytest.param("", "not JSON: Expecting value: line 1 column 1 (char 0)", id="empty"),
        pytest.param("[]", "JSON, but not an object", id="list"),
        pytest.param("{}", "no weight_map of names and files", id="no-map"),
        pytest.param('{"weight_map": {"a": 1}}', "no weight_map of names and files", id="numbers"),
        pytest.param('{"weight_map": {"a": ""}}', "the file '', which is not beside it", id="no-name"),
        *(
            pytest.param(json.dumps({"weight_map": {"a": name}}), f"the file {name!r}, which is not beside it", id=name)
            for name in ("../secret.safetensors", "/etc/passwd", "a/b", "a\\b", ".", "a\0b")
        ),
        pytest.param('{"weight_map": {"a": ".."}}', "the file '..', a link to another folder", id=".."),
        pytest.param(
            '{"weight_map": {"a": "\\ud800"}}',
            "the file '\\ud800', which is not a name that a file can have",
            id="half",
        ),
        pytest.param('{"weight_map": {"a": "link"}}', "the file 'link', a link to another folder", id="link"),
    ],
)
def test_an_index_that_names_what_is_not_beside_it_is_refused(content: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "secret.safetensors").touch()
    (tmp_path / "model" / "link").symlink_to("../secret.safetensors")
    index = tmp_path / "model" / "model.safetensors.index.json"
    index.write_text(content)

    assert error_of(index) == (
        "this is not an index of a checkpoint's files\n"
        f"  file:      GIVEN\n  found:     {found}\n"
        "  expected:  a JSON object that names the files beside it"
    )


def test_an_index_that_is_too_deep_or_too_long_is_refused(index: Path) -> None:
    index.write_text("[" * 100_000)
    assert error_of(index).startswith("this is not an index of a checkpoint's files\n")
    with index.open("wb") as file:
        file.truncate((8 << 20) + 1)
    assert error_of(index) == (
        "this is too long for an index of a checkpoint's files\n"
        "  file:      GIVEN\n  found:     8,388,609 bytes\n  expected:  at most 8,388,608"
    )


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model_index.json"])
def test_an_index_is_no_shard_of_an_index(name: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"transformer": []}')
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(index)
    assert (caught.value.what, caught.value.file) == ("this is not a checkpoint", str(tmp_path / name))


# Diffusers and PEFT


def test_a_pipeline_has_the_tensors_of_its_components(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "CogVideoXPipeline", "scheduler": [], "vae": [], "transformer": [], "gone": []})
    )
    sharded(tmp_path / "transformer", "diffusion_pytorch_model{suffix}.safetensors", save_safetensors)
    (tmp_path / "vae").mkdir()
    save_file({"conv": torch.arange(3)}, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "scheduler").mkdir()

    expected = {"vae.conv": torch.arange(3)} | {f"transformer.{key}": tensor for key, tensor in TENSORS.items()}
    for given in (tmp_path, tmp_path / "model_index.json"):
        with open_checkpoint(given) as checkpoint:
            assert checkpoint.format == "safetensors and safetensors, sharded, diffusers pipeline"
            assert described_by_cogtools(checkpoint.tensors) == described_by_torch(expected)
    with open_checkpoint(tmp_path / "transformer") as checkpoint:
        assert described_by_cogtools(checkpoint.tensors) == described_by_torch(TENSORS)


def test_a_pipeline_is_known_by_the_content_of_its_index(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    save_file({"a": torch.arange(3)}, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    other = tmp_path / "pipeline.json"
    other.write_text('{"_class_name": "CogVideoXPipeline", "transformer": ["diffusers", "X"]}')

    for given in (other, tmp_path):
        with open_checkpoint(given) as checkpoint:
            assert list(checkpoint.tensors) == ["transformer.a"]


@pytest.mark.parametrize("components", [{}, {"a" * 300: []}, {"..": []}, {"a": [], "b": []}])
def test_a_pipeline_without_weights_is_an_error(components: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(components))
    for name in ("a", "b"):  # a pipeline that holds itself, twice
        (tmp_path / name).symlink_to(".")

    assert error_of(tmp_path) == "there are no weights in this pipeline\n  file:      GIVEN"


def test_a_model_that_diffusers_saves_is_read_as_diffusers_loads_it(tmp_path: Path) -> None:
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, time_embed_dim=8, text_embed_dim=8, num_layers=2, in_channels=4,
        out_channels=4, sample_width=4, sample_height=4, sample_frames=5, max_text_seq_length=4,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    expected = dict(sorted(model.state_dict().items()))

    assert load_file(tmp_path / "whole" / "diffusion_pytorch_model.safetensors").keys() == expected.keys()
    for folder in ("whole", "sharded"):
        with open_checkpoint(tmp_path / folder) as checkpoint:
            assert described_by_cogtools(_sorted(checkpoint).tensors) == described_by_torch(expected)


def _sorted(checkpoint: Checkpoint) -> Checkpoint:
    checkpoint.tensors = dict(sorted(checkpoint.tensors.items()))
    return checkpoint


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "pytorch_lora_weights.safetensors"])
def test_a_lora_is_taken_whatever_lies_beside_it(name: str, tmp_path: Path) -> None:
    save_file({"a": torch.arange(2)}, tmp_path / name)
    torch.save({}, tmp_path / "training_args.bin")
    (tmp_path / "adapter_config.json").write_text("{}")

    assert taken(tmp_path) == "a"


def test_what_nearly_has_the_name_is_proposed(tmp_path: Path) -> None:
    (tmp_path / "ckpts" / "lora-disney").mkdir(parents=True)
    for given, proposed in (("ckpts/lora-disny", "ckpts/lora-disney"), ("ckpt/lora-disney/latest", "ckpts")):
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(tmp_path / given)
        assert str(error.value.hint) == f"did you mean {tmp_path / proposed}?"
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path / "else")
    assert error.value.hint is None


def test_parts_of_a_pipeline_without_its_index_stand_for_the_transformer(tmp_path: Path) -> None:
    for part in ("transformer", "vae"):
        (tmp_path / part).mkdir()
        save_file({part: torch.zeros(1)}, tmp_path / part / "diffusion_pytorch_model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["transformer"]
    with pytest.raises(CheckpointError, match="--iteration 5 does not go with this path"):
        open_checkpoint(tmp_path, iteration=5)
