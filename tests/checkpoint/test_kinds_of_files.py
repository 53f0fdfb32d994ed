"""Files of other kinds that people have: each is read, or is called what it is, with the step that helps.

Distributed checkpoints, shards without an index, ranks, modules that were pickled as a whole, tensors of other kinds.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import nn

from cogtools.checkpoint.opening import open_checkpoint
from cogtools.checkpoint.tensors import OtherTensor
from cogtools.errors import CheckpointError
from cogtools.inspection.inspect import inspect_checkpoint
from tests.support.oracles import described_by_cogtools, described_by_torch

NAME = "mp_rank_00_model_states.pt"


def refused(path: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return caught.value


def saved(value: object, folder: Path, *, legacy: bool = False) -> Path:
    path = folder / "x.pt"
    with warnings.catch_warnings(action="ignore"):  # of kinds that PyTorch does not make any more, or not yet for good
        torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


# Distributed checkpoints

DCP = "this is a distributed checkpoint (torch.distributed.checkpoint): its tensors are spread over all of its files"
WHOLE = "a checkpoint whose weights lie in one file, or in shards with an index"
SAVE_DCP = """
import os, sys, torch
import torch.distributed as dist, torch.distributed.checkpoint as dcp
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dcp.save({"model": {f"layer.{n}.weight": torch.full((4, 4), float(n)) for n in range(5)}}, checkpoint_id=sys.argv[1])
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that torch.distributed.checkpoint wrote, in a folder of its own."""
    folder = tmp_path_factory.mktemp("run") / "step-500"
    subprocess.run([sys.executable, "-W", "ignore", "-c", SAVE_DCP, str(folder)], check=True, capture_output=True)
    return folder


@pytest.mark.slow
def test_a_distributed_checkpoint_is_called_so_and_its_conversion_is_read(distributed: Path, tmp_path: Path) -> None:
    files = sorted(path.name for path in distributed.iterdir())
    assert files == [".metadata", "__0_0.distcp"]
    convert = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {distributed} whole.pt"

    for given in (distributed, distributed.parent, *distributed.iterdir()):
        error = refused(given)
        assert (error.what, error.found, error.expected) == (DCP, "__0_0.distcp", WHOLE)
        assert error.file == str(distributed if given == distributed.parent else given)
        assert str(error.hint) == f"put it together first: {convert}"
    *command, folder, _ = convert.split()
    whole = tmp_path / "whole.pt"
    subprocess.run([sys.executable, *command[1:], folder, str(whole)], check=True, capture_output=True)
    with open_checkpoint(whole) as checkpoint:
        assert checkpoint.wrapper == ("model",)
        assert described_by_cogtools(checkpoint.tensors) == described_by_torch(
            {f"layer.{number}.weight": torch.full((4, 4), float(number)) for number in range(5)}
        )


def test_the_distributed_checkpoint_of_accelerate_s_fsdp_is_named_in_its_folder(
    distributed: Path, tmp_path: Path
) -> None:
    for name in ("optimizer_0", "pytorch_model_fsdp_0"):
        shutil.copytree(distributed, tmp_path / "checkpoint-500" / name)
    torch.save({}, tmp_path / "checkpoint-500" / "scheduler.bin")

    error = refused(tmp_path / "checkpoint-500")
    assert (error.what, error.file) == (DCP, str(tmp_path / "checkpoint-500" / "pytorch_model_fsdp_0"))


def test_a_part_of_a_distributed_checkpoint_under_another_name_is_not_read_as_a_checkpoint(
    distributed: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.pt").write_bytes((distributed / "__0_0.distcp").read_bytes())

    error = refused(tmp_path / "x.pt")
    assert error.what == "this file is more than one zip archive"
    assert "dcp_to_torch" in str(error.hint)


def test_a_pickle_that_is_called_like_the_list_of_a_distributed_checkpoint_is_only_that_beside_one(
    tmp_path: Path,
) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": 1}))

    assert refused(tmp_path / ".metadata").found == "a pickle that torch.save did not write"


def test_a_checkpoint_of_zero_3_is_called_so(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "global_step500"
    folder.mkdir(parents=True)
    (tmp_path / "run" / "latest").write_text("global_step500")
    for rank in range(2):
        module = {"a.weight": torch.empty(0), "a.bias": torch.ones(3)}
        torch.save({"module": module}, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        torch.save({}, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")

    for given in (tmp_path / "run", folder, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        error = refused(given)
        assert (
            error.what == "this is a ZeRO-3 checkpoint of DeepSpeed: its tensors are spread over the files of all ranks"
        )
        assert str(error.hint) == (
            "put it together first, with the script that DeepSpeed saves beside it: "
            f"python zero_to_fp32.py {tmp_path / 'run'} whole"
        )


def test_a_checkpoint_of_deepspeed_s_pipeline_is_called_so(tmp_path: Path) -> None:
    for layer in range(3):
        torch.save({"weight": torch.ones(3)}, tmp_path / f"layer_{layer:02}-model_00-model_states.pt")
    torch.save({"module": None, "mp_world_size": 1}, tmp_path / NAME)

    error = refused(tmp_path)
    assert (error.what, error.found) == (
        "this is a checkpoint of DeepSpeed's pipeline parallelism: each layer is in a file of its own",
        ", ".join(f"layer_{layer:02}-model_00-model_states.pt" for layer in range(3)),
    )
    assert "save the model's state_dict() as one file" in str(error.hint)
    with open_checkpoint(tmp_path / "layer_01-model_00-model_states.pt") as checkpoint:
        assert checkpoint.format == "torch.save (zip), one layer of a training with pipeline parallelism"


# Ranks


def test_ranks_of_one_training_are_not_a_choice(tmp_path: Path) -> None:
    names = [f"mp_rank_{rank:02}_model_states.pt" for rank in range(1, 4)]
    (tmp_path / "run" / "20").mkdir(parents=True)
    (tmp_path / "run" / "latest").write_text("20")
    for name in names:
        torch.save({"module": {"a": torch.ones(2)}, "mp_world_size": 4}, tmp_path / "run" / "20" / name)

    for given in (tmp_path / "run", tmp_path / "run" / "20"):
        error = refused(given)
        assert (error.what, error.found, error.expected) == (
            "this folder holds parts of one tensor-parallel training, and the part of rank 0 is missing",
            ", ".join(names),
            f"{NAME} beside them",
        )
        assert str(error.hint) == "no part can be exported on its own: train with model_parallel_size 1"
    with open_checkpoint(tmp_path / "run" / "20" / names[1]) as checkpoint:
        assert checkpoint.format == "torch.save (zip), rank 2 of a tensor-parallel training"


# Shards


TENSORS = {f"layer.{number}.weight": torch.arange(64) + number for number in range(5)}


def shards(folder: Path, pattern: str = "model{suffix}.safetensors") -> list[Path]:
    """Weights in three shards, without their index."""
    folder.mkdir(exist_ok=True)
    split = split_torch_state_dict_into_shards(TENSORS, filename_pattern=pattern, max_shard_size=1100)
    for name, keys in split.filename_to_tensors.items():
        part = {key: TENSORS[key] for key in keys}
        save_file(part, folder / name) if name.endswith(".safetensors") else torch.save(part, folder / name)
    return [folder / name for name in sorted(split.filename_to_tensors)]


@pytest.mark.parametrize("pattern", ["model{suffix}.safetensors", "pytorch_model{suffix}.bin"])
def test_shards_without_their_index_are_read_by_their_names(pattern: str, tmp_path: Path) -> None:
    files = shards(tmp_path / "model", pattern)
    (tmp_path / "model" / "config.json").write_text("{}")

    with open_checkpoint(tmp_path / "model") as checkpoint:
        assert checkpoint.path == tmp_path / "model"
        assert checkpoint.format.endswith("sharded, without an index")
        assert described_by_cogtools(checkpoint.tensors) == described_by_torch(TENSORS)
        assert checkpoint.has_beside("config.json")
        assert list(checkpoint.parts) == [file.name for file in files]


def test_one_shard_is_called_a_part(tmp_path: Path) -> None:
    files = shards(tmp_path / "model")

    with open_checkpoint(files[1]) as checkpoint:
        assert checkpoint.format == "safetensors, part 2 of 3"


@pytest.mark.parametrize("left", [[0], [1], [0, 2]])
def test_shards_of_which_some_are_missing_are_not_read_as_if_they_were_whole(left: list[int], tmp_path: Path) -> None:
    files = shards(tmp_path / "model")
    for number, file in enumerate(files):
        if number not in left:
            file.unlink()

    error = refused(tmp_path / "model")
    assert (error.what, error.found, error.expected, str(error.hint)) == (
        "parts of this checkpoint are missing",
        f"{len(left)} of 3 parts: {', '.join(files[number].name for number in left)}",
        f"{', '.join(file.name for number, file in enumerate(files) if number not in left)} as well",
        "copy or download the missing parts",
    )


def test_shards_of_several_checkpoints_are_not_mixed(tmp_path: Path) -> None:
    files = [*shards(tmp_path / "model"), *shards(tmp_path / "model", "model.fp16{suffix}.safetensors")]

    error = refused(tmp_path / "model")
    assert (error.what, error.found) == (
        "this folder holds shards of several checkpoints, without an index",
        ", ".join(sorted(file.name for file in files)),
    )


def test_shards_that_have_a_key_in_common_are_not_parts_of_one_checkpoint(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({"a": torch.arange(3)}, tmp_path / f"model-{number:05}-of-00002.safetensors")

    error = refused(tmp_path)
    assert (error.what, error.found) == (
        "these shards are not parts of one checkpoint",
        "'a' in model-00002-of-00002.safetensors and in another of them",
    )


def test_an_index_whose_shards_were_renamed_says_both_names(tmp_path: Path) -> None:
    files = shards(tmp_path / "model", "pytorch_model{suffix}.bin")
    weight_map = {key: file.name for file in files for key in torch.load(file)}
    index = tmp_path / "model" / "diffusion_pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for file in files:
        file.rename(file.with_name(f"diffusion_{file.name}"))

    for given in (index, index.parent):
        error = refused(given)
        assert (error.what, error.file, error.found, str(error.hint)) == (
            "the index names files that are not here; they were renamed",
            str(index),
            "diffusion_pytorch_model-00001-of-00003.bin, which is called pytorch_model-00001-of-00003.bin in the index"
            ", and 2 more of 3",
            "correct the names in the weight_map of the index, or give the files the names that it has",
        )
    index.write_text(json.dumps({"weight_map": {key: f"diffusion_{name}" for key, name in weight_map.items()}}))
    with open_checkpoint(index) as checkpoint:
        assert described_by_cogtools(checkpoint.tensors) == described_by_torch(TENSORS)


# Pickles


def test_a_plain_pickle_is_called_so_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "lora.pkl").write_bytes(pickle.dumps({"module": {"a": torch.arange(3)}}, 4))

    error = refused(tmp_path / "lora.pkl")
    assert (error.what, error.found, str(error.hint)) == (
        "this is not a checkpoint",
        "a pickle that torch.save did not write",
        "where it was made, load it with pickle (that runs what is in it) and save the weights with torch.save",
    )


def test_random_states_are_called_what_a_training_saves_beside_its_weights(tmp_path: Path) -> None:
    (tmp_path / "random_states_0.pkl").write_bytes(pickle.dumps({"step": 500}))

    error = refused(tmp_path / "random_states_0.pkl")
    assert (error.found, str(error.hint)) == (
        "a pickle that torch.save did not write",
        "a training saves this beside its weights: give the weights",
    )


# Modules that were pickled as a whole


class Projection(nn.Module):
    """As SAT's LoRA keeps its factors."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix_A = nn.ParameterList([torch.ones(4, 8), torch.ones(4, 8)])
        self.register_buffer("saved", torch.arange(3))
        self.register_buffer("unsaved", torch.arange(4), persistent=False)
        self.register_parameter("bias", None)
        self.values = torch.arange(5)


class Whole(nn.Module):
    """A module of modules, one of which it holds twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"attention": Projection()}) for _ in range(2)])
        self.tied = self.layers[0]
        self.norm = nn.LayerNorm(4)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapper", [(), ("model",)])
def test_a_whole_module_has_the_keys_of_its_state_dict(wrapper: tuple[str, ...], legacy: bool, tmp_path: Path) -> None:
    module = Whole()
    value: object = {"model": module, "epoch": 3} if wrapper else module
    with open_checkpoint(saved(value, tmp_path, legacy=legacy)) as checkpoint:
        assert dict(described_by_cogtools(checkpoint.tensors)) == dict(described_by_torch(module.state_dict()))
    kind = "legacy" if legacy else "zip"
    assert checkpoint.format == f"torch.save ({kind}), a whole module (tests.checkpoint.test_kinds_of_files.Whole)"
    assert str(checkpoint.module) == "tests.checkpoint.test_kinds_of_files.Whole"
    assert (checkpoint.wrapper, checkpoint.values.get("epoch")) == (wrapper, 3 if wrapper else None)
    # What is not in the state dict is beside it.
    assert sorted(entry.shape for entry in checkpoint.beside.values()) == [(4,), (4,), (5,), (5,)]


def test_a_whole_module_that_holds_itself_is_read(tmp_path: Path) -> None:
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(torch.ones(2)))
    module._modules["again"] = module

    with open_checkpoint(saved(module, tmp_path)) as checkpoint:
        assert list(checkpoint.tensors) == ["weight"]


def test_modules_that_double_at_every_level_have_an_end(tmp_path: Path) -> None:
    module: nn.Module = nn.Linear(1, 1)
    for _ in range(28):
        outer = nn.Module()
        outer.a = outer.b = module
        module = outer

    with open_checkpoint(saved(module, tmp_path)) as checkpoint:
        assert len(checkpoint.tensors) <= 100_000


# Tensors of other kinds

KINDS: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse": (lambda: torch.eye(4).to_sparse(), "a sparse tensor"),
    "csr": (lambda: torch.eye(4).to_sparse_csr(), "a sparse tensor"),
    "qint8": (lambda: torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.qint8), "a quantized tensor"),
    "quint8-per-channel": (
        lambda: torch.quantize_per_channel(torch.ones(4, 4), torch.ones(4), torch.zeros(4), 0, torch.quint8),
        "a quantized tensor",
    ),
    "quint4x2": (
        lambda: torch.quantize_per_channel(torch.ones(4, 4), torch.ones(4), torch.zeros(4), 0, torch.quint4x2),
        "a quantized tensor",
    ),
    "qint32": (lambda: torch.quantize_per_tensor(torch.ones(4, 4), 0.1, 0, torch.qint32), "a quantized tensor"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "a nested tensor",
    ),
    "conjugated": (lambda: torch.ones(2, dtype=torch.complex64).conj(), "a conjugated or negated view of a tensor"),
    "negated": (lambda: torch._neg_view(torch.ones(3)), "a conjugated or negated view of a tensor"),
    "meta": (lambda: torch.empty(3, device="meta"), "a tensor of the meta device, without values"),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_of_another_kind_is_called_so_beside_those_that_are_described(
    kind: str, legacy: bool, tmp_path: Path
) -> None:
    with warnings.catch_warnings(action="ignore"):
        tensor = KINDS[kind][0]()
    plain = {"a": torch.arange(3), "b": torch.ones(2, 2)}
    value = {"odd": tensor, **plain, "parameter": nn.Parameter(tensor, requires_grad=False)}
    with open_checkpoint(saved(value, tmp_path, legacy=legacy)) as checkpoint:
        assert described_by_cogtools(checkpoint.tensors, views=False) == described_by_torch(plain, views=False)
    assert {key: getattr(value, "kind", value) for key, value in checkpoint.not_tensors.items()} == dict.fromkeys(
        ("odd", "parameter"), KINDS[kind][1]
    )
    report = inspect_checkpoint(tmp_path / "x.pt")
    assert {entry.name: entry.kind for entry in report.not_tensors} == dict.fromkeys(
        ("odd", "parameter"), f"{KINDS[kind][1]}, which is not described further"
    )
    assert [name.name for name in report.globals if name.danger == "dangerous"] == []


class Sub(torch.Tensor):
    """A subclass that views a storage like any tensor."""


@pytest.mark.parametrize(
    ("tensor", "dtype"),
    [
        (lambda: torch.ones(3).as_subclass(Sub), "float32"),
        (lambda: nn.Buffer(torch.ones(3)), "float32"),
        (lambda: torch.zeros(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "float4_e2m1fn_x2"),
        (lambda: torch.zeros(3, dtype=torch.uint8).view(torch.bits8), "bits8"),
        (lambda: torch.zeros(3, dtype=torch.int16).view(torch.bits16), "bits16"),
    ],
    ids=["subclass", "buffer", "float4", "bits8", "bits16"],
)
def test_a_tensor_that_is_a_view_of_one_storage_is_described_whatever_its_class(
    tensor: Callable[[], torch.Tensor], dtype: str, tmp_path: Path
) -> None:
    with open_checkpoint(saved({"a": tensor()}, tmp_path)) as checkpoint:
        entry = checkpoint.tensors["a"]
    assert (entry.dtype.name, entry.shape, entry.size_bytes) == (dtype, (3,), 3 * entry.dtype.itemsize)


# Names of weights without the weights

SAVE_DTENSOR = """
import os, sys, torch
import torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
a = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])
torch.save({"a": a, "b": torch.nn.Parameter(a)}, sys.argv[1])
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_tensors_that_are_spread_over_processes_are_called_so(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SAVE_DTENSOR, str(tmp_path / "x.pt")]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": ""})

    error = refused(tmp_path / "x.pt")
    assert (error.what, error.found) == (
        "the weights are not in this file, or not all of them",
        "a part of a tensor that is spread over processes (DTensor): 'a', and 1 more of 2 tensors",
    )
    assert "full_state_dict=True" in str(error.hint)


def test_tensors_of_the_meta_device_are_called_so(tmp_path: Path) -> None:
    torch.save({"module": {"a": torch.empty(3, device="meta"), "b": torch.empty(2, device="meta")}}, tmp_path / "x.pt")

    error = refused(tmp_path / "x.pt")
    assert error.found == "a tensor of the meta device, without values: 'a', and 1 more of 2 tensors"
    assert "once its weights are loaded" in str(error.hint)
    torch.save({"a": torch.empty(3, device="meta"), "b": torch.ones(2), "c": torch.ones(2)}, tmp_path / "x.pt")
    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        assert checkpoint.format == "torch.save (zip), 1 tensor without values"
        assert isinstance(checkpoint.not_tensors["a"], OtherTensor)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_the_placeholders_of_zero_3_are_called_so(name: str, tmp_path: Path) -> None:
    state = {f"base_model.model.layers.{number}.lora_A.weight": torch.empty(0) for number in range(3)}
    state["base_model.model.norm"] = torch.ones(2)
    save_file(state, tmp_path / name) if name.endswith("safetensors") else torch.save(state, tmp_path / name)

    error = refused(tmp_path)
    assert error.found == (
        "an empty placeholder, as ZeRO-3 leaves it where a tensor is spread over processes: "
        "'base_model.model.layers.0.lora_A.weight', and 2 more of 4 tensors"
    )
    assert "zero_to_fp32.py" in str(error.hint)


def test_an_empty_tensor_among_others_is_only_that(tmp_path: Path) -> None:
    with open_checkpoint(saved({"a": torch.empty(0), "b": torch.ones(2)}, tmp_path)) as checkpoint:
        assert (checkpoint.format, list(checkpoint.tensors)) == ("torch.save (zip)", ["a", "b"])
