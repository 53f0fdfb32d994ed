"""The index: where the state dict is, what lies beside it, and names that take no room."""

import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from cogtools.checkpoint.index import MAX_NAME, Checkpoint
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.checkpoint.pickle.machine import Global
from cogtools.checkpoint.state_dict import MAX_CONTAINER, MAX_DEPTH
from cogtools.errors import CheckpointError
from tests.support.factories import TOY_2B, sat_checkpoint, sat_state_dict, zero3_checkpoint
from tests.support.oracles import tied, torch_load


def opened(value: object, folder: Path) -> Checkpoint:
    """The index of what torch.save writes; closed, as nothing of its weights is read."""
    torch.save(value, folder / "x.pt")
    with open_checkpoint(folder / "x.pt") as checkpoint:
        return checkpoint


def opened_pickle(data: bytes, folder: Path) -> Checkpoint:
    with zipfile.ZipFile(folder / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", data)
    with open_checkpoint(folder / "x.pt") as checkpoint:
        return checkpoint


def test_a_checkpoint_of_the_trainer_has_its_weights_its_values_and_the_tensors_beside_them(tmp_path: Path) -> None:
    made = sat_checkpoint(sat_state_dict(TOY_2B, 4, base="telling"), iteration=500)
    checkpoint = opened(made, tmp_path)

    assert (checkpoint.path, checkpoint.format) == (tmp_path / "x.pt", "torch.save (zip)")
    assert checkpoint.wrapper == ("module",)
    assert list(checkpoint.tensors) == list(made["module"])
    assert checkpoint.not_tensors == {}
    assert list(checkpoint.values) == [key for key in made if key != "module"]
    assert checkpoint.values["iteration"] == 500
    assert checkpoint.values["ds_config"] == made["ds_config"]
    assert checkpoint.values["random_rng_state"] == made["random_rng_state"]
    assert checkpoint.values["param_shapes"] == [{key: tuple(size) for key, size in made["param_shapes"][0].items()}]
    assert list(checkpoint.beside) == [
        *(f"frozen_param_fragments.{key}" for key in made["frozen_param_fragments"]),
        "torch_rng_state",
        "cuda_rng_state",
    ]
    assert {str(name).rpartition(".")[2] for name in checkpoint.foreign} == {"_reconstruct", "ndarray", "dtype"}


def test_what_shares_a_storage_in_a_checkpoint_shares_it_in_the_index(tmp_path: Path) -> None:
    made = sat_checkpoint(sat_state_dict(TOY_2B, 4, base="full"))
    checkpoint = opened(made, tmp_path)
    module = torch_load(tmp_path / "x.pt")["module"]
    in_torch = tied((key, tensor.untyped_storage().data_ptr()) for key, tensor in module.items())

    assert tied((key, id(entry.storage)) for key, entry in checkpoint.tensors.items()) == in_torch
    assert len(in_torch) == 2  # the LoRA's flat storage, and T5's embedding


def test_entries_that_are_no_tensors_are_kept_apart(tmp_path: Path) -> None:
    checkpoint = opened({"a": torch.arange(2), "_extra_state": {"x": 1}, "dtype": torch.float16}, tmp_path)

    assert list(checkpoint.tensors) == ["a"]
    assert checkpoint.not_tensors == {"_extra_state": {"x": 1}, "dtype": Global("torch", "float16")}
    assert checkpoint.values == {}


@pytest.mark.parametrize("value", [[torch.arange(2)], torch.arange(2), 5, None, "text"])
def test_what_is_no_dict_has_no_state_dict(value: object, tmp_path: Path) -> None:
    checkpoint = opened(value, tmp_path)

    assert (checkpoint.tensors, checkpoint.wrapper, checkpoint.values) == ({}, (), {})


@pytest.mark.parametrize(
    ("value", "wrapper", "keys"),
    [
        ({"module": {}, "a": 1}, (), []),
        ({"module": None, "model": {"a": torch.arange(2)}}, ("model",), ["a"]),
        ({"model": {"module": {"state_dict": {"a": torch.arange(2)}}}}, ("model", "module", "state_dict"), ["a"]),
        ({"module": torch.arange(2), "b": torch.arange(2)}, (), ["module", "b"]),
        ({"model": {"arch": "x"}, "state_dict": {"a": torch.arange(2)}}, ("state_dict",), ["a"]),
        ({"model": {"arch": "x"}, "a": torch.arange(2)}, (), ["a"]),
        ({"model": {"model": {"arch": "x"}, "module": {"a": torch.arange(2)}}}, ("model", "module"), ["a"]),
        ({"module": {"a": torch.arange(2)}, "rng": torch.arange(2)}, ("module",), ["a"]),
    ],
)
def test_wrappers_are_dicts_with_something_in_them(
    value: object, wrapper: tuple[str, ...], keys: list[str], tmp_path: Path
) -> None:
    checkpoint = opened(value, tmp_path)

    assert (checkpoint.wrapper, list(checkpoint.tensors)) == (wrapper, keys)


def test_a_wrapper_that_holds_itself_has_no_state_dict(tmp_path: Path) -> None:
    cycle: dict[str, object] = {}
    cycle["module"] = cycle
    checkpoint = opened(cycle, tmp_path)

    assert (checkpoint.wrapper, checkpoint.tensors, checkpoint.beside) == ((), {}, {})


@pytest.mark.parametrize(
    ("value", "keys", "beside"),
    [
        ({"params": {"a.b": torch.arange(2)}}, [], {"params.a.b": ("params", "a.b")}),
        ({"net": {"module": {"a": torch.arange(2)}}}, [], {"net.module.a": ("net.module", "a")}),
        ({"optimizer": {"state": {0: {"step": torch.arange(2)}}}, "epoch": 3}, [],
         {"optimizer.state.0.step": ("optimizer.state.0", "step")}),
        ({"a": torch.arange(2), "optimizer": [torch.arange(2)]}, ["a"], {"optimizer.0": ("optimizer", "0")}),
        ({"module": {"a": torch.arange(2), "ema": {"a": torch.arange(2)}}, "b": torch.arange(2)}, ["a"],
         {"module.ema.a": ("module.ema", "a"), "b": ("", "b")}),
        ([torch.arange(2)], [], {"0": ("", "0")}),
        (torch.arange(2), [], {"<tensor>": ("", "<tensor>")}),
    ],
)  # fmt: skip
def test_every_tensor_is_listed_once_wherever_it_lies(
    value: object, keys: list[str], beside: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    checkpoint = opened(value, tmp_path)

    assert list(checkpoint.tensors) == keys
    assert list(checkpoint.beside) == list(beside)
    assert checkpoint.places == beside


def test_values_beside_every_wrapper_are_kept_the_innermost_of_equal_names(tmp_path: Path) -> None:
    inner = {"module": {"a": torch.arange(2)}, "mp_world_size": 2, "iteration": 5}
    checkpoint = opened({"state_dict": inner, "iteration": 7, "args": {"x": 1}}, tmp_path)

    assert checkpoint.wrapper == ("state_dict", "module")
    assert checkpoint.values == {"iteration": 5, "args": {"x": 1}, "mp_world_size": 2}


def test_tensors_whose_names_are_spelled_alike_are_all_listed(tmp_path: Path) -> None:
    state = {"1": torch.arange(2), 1: torch.arange(3), ("a",): torch.arange(4), ("b",): torch.arange(5)}
    checkpoint = opened({"module": state, "x.y": {"z": torch.arange(6)}, "x": {"y.z": torch.arange(7)}}, tmp_path)

    assert {key: entry.shape for key, entry in checkpoint.tensors.items()} == {
        "1": (2,), "1 (2)": (3,), "<tuple>": (4,), "<tuple> (2)": (5,),
    }  # fmt: skip
    assert {key: entry.shape for key, entry in checkpoint.beside.items()} == {"x.y.z": (6,), "x.y.z (2)": (7,)}


# How tensors are written


def test_attributes_come_with_their_tensor(tmp_path: Path) -> None:
    checkpoint = opened(zero3_checkpoint(sat_state_dict(TOY_2B, 4, base="none")), tmp_path)
    loaded = torch_load(tmp_path / "x.pt")["module"]

    assert {key: entry.attributes for key, entry in checkpoint.tensors.items()} == {
        key: {"ds_shape": tuple(tensor.ds_shape)} for key, tensor in loaded.items()
    }


def test_attributes_come_with_their_parameter_and_not_with_what_shares_its_tensor(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(6))
    parameter.ds_shape = torch.Size((2, 3))  # type: ignore[attr-defined]
    checkpoint = opened({"a": parameter, "b": torch.nn.Parameter(parameter.data)}, tmp_path)

    assert {key: entry.attributes for key, entry in checkpoint.tensors.items()} == {"a": {"ds_shape": (2, 3)}, "b": {}}
    assert torch_load(tmp_path / "x.pt")["a"].ds_shape == (2, 3)


def described(
    storage: bytes = b"X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\4", **parts: bytes
) -> bytes:
    """A pickle {"a": tensor} of a call with these arguments; good unless a part says otherwise."""
    good = {"offset": b"K\0", "shape": b"K\2K\2\x86", "stride": b"K\2K\1\x86"}
    call = b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage + b"tQ" + b"".join((good | parts).values()) + b"\x89}tR"
    return b"\x80\x02}X\1\0\0\0a" + call + b"s."


NOT_AS_PYTORCH = "it describes a tensor in a way that PyTorch does not"
NO_STORAGE = "it names a storage in a way that PyTorch does not"


@pytest.mark.parametrize(
    ("data", "found"),
    [
        pytest.param(described(offset=b"J\xff\xff\xff\xff"), NOT_AS_PYTORCH, id="negative-offset"),
        pytest.param(described(shape=b"J\xff\xff\xff\xffK\2\x86"), NOT_AS_PYTORCH, id="negative-size"),
        pytest.param(described(stride=b"J\xff\xff\xff\xffK\1\x86"), NOT_AS_PYTORCH, id="negative-stride"),
        pytest.param(described(shape=b"\x88K\2\x86"), NOT_AS_PYTORCH, id="size-True"),
        pytest.param(described(stride=b"K\1\x85"), NOT_AS_PYTORCH, id="fewer-strides"),
        pytest.param(described(shape=b"]"), NOT_AS_PYTORCH, id="list-as-shape"),
        pytest.param(
            described(shape=b"(" + b"K\1" * 65 + b"t", stride=b"(" + b"K\1" * 65 + b"t"), NOT_AS_PYTORCH, id="65-d"
        ),
        pytest.param(described(shape=b"\x8a\x09" + bytes(8) + b"\1K\1\x86"), NOT_AS_PYTORCH, id="size-2-to-64"),
        pytest.param(
            described(offset=b"K\1"),
            "it has a tensor of shape (2, 2) that needs 20 bytes of storage '0', which has 16",
            id="beyond-the-storage",
        ),
        pytest.param(described(stride=b"\x8a\x08" + b"\xff" * 7 + b"\x7fK\1\x86"), NOT_AS_PYTORCH, id="huge-stride"),
        pytest.param(
            described(b"X\7\0\0\0storagecos\nsystem\nX\1\0\0\x000X\3\0\0\0cpuK\4"),
            NO_STORAGE + "; it names os.system",
            id="class",
        ),
        pytest.param(
            described(b"X\7\0\0\0storagectorch\nnone\nX\1\0\0\x000X\3\0\0\0cpuK\4"),
            NO_STORAGE + "; it names torch.none",
            id="no-class",
        ),
        pytest.param(
            described(b"X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuJ\xff\xff\xff\xff"),
            NO_STORAGE,
            id="negative-count",
        ),
        pytest.param(described(b"N"), NO_STORAGE, id="no-storage"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(data: bytes, found: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        _opened_with_storage(data, tmp_path)
    assert (caught.value.what, caught.value.found) == ("the checkpoint's pickle cannot be read", found)


def test_a_tensor_described_as_pytorch_does_is_read(tmp_path: Path) -> None:
    entry = _opened_with_storage(described(), tmp_path).tensors["a"]

    assert (entry.dtype.name, entry.shape, entry.stride, entry.storage_offset) == ("float32", (2, 2), (2, 1), 0)


def _opened_with_storage(data: bytes, folder: Path) -> Checkpoint:
    with zipfile.ZipFile(folder / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", data)
        archive.writestr("x/data/0", bytes(16))
    with open_checkpoint(folder / "x.pt") as checkpoint:
        return checkpoint


# Names


def test_keys_that_are_no_text_are_told_by_their_value_or_kind(tmp_path: Path) -> None:
    state: OrderedDict[object, int] = OrderedDict({1: 0, 2.5: 0, None: 0, ("a", 1): 0, b"x": 0})
    checkpoint = opened(state, tmp_path)

    assert list(checkpoint.not_tensors) == ["1", "2.5", "<NoneType>", "<tuple>", "<bytes>"]


@pytest.mark.parametrize("inside", [b"2\x86" * 60, b"\x85" * 100_000], ids=["doubling", "deep"])
def test_a_key_that_would_print_without_end_is_not_printed(inside: bytes, tmp_path: Path) -> None:
    checkpoint = opened_pickle(b"\x80\x02}cmodule\nname\nN" + inside + b"RK\1s.", tmp_path)

    assert checkpoint.not_tensors == {"<Record>": 1}


def test_tensors_beside_the_state_dict_are_found_to_a_bounded_depth(tmp_path: Path) -> None:
    deep: object = torch.arange(2)
    for _ in range(MAX_DEPTH - 1):
        deep = [deep]
    name = ".".join(["0"] * (MAX_DEPTH - 1))

    assert list(opened({"module": {"a": 1}, "x": deep}, tmp_path).beside) == ["x." + name]
    assert list(opened({"module": {"a": 1}, "x": [deep]}, tmp_path).beside) == []


def test_a_long_name_on_the_way_to_a_tensor_is_cut(tmp_path: Path) -> None:
    beside = opened({"module": {"a": torch.ones(1)}, "x" * 5000: torch.arange(2)}, tmp_path).beside
    assert list(beside) == ["x" * MAX_NAME]
    checkpoint = opened({"module": {"a": 1}, "x" * 5000: [torch.arange(2)]}, tmp_path)

    assert list(checkpoint.beside) == ["…" + "x" * MAX_CONTAINER + ".0"]


def test_lists_four_hundred_thousand_deep_are_no_matter(tmp_path: Path) -> None:
    depth = 400_000
    checkpoint = opened_pickle(b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".", tmp_path)

    assert (checkpoint.tensors, checkpoint.beside) == ({}, {})


def test_what_a_list_repeats_is_listed_once_and_long_ways_are_cut(tmp_path: Path) -> None:
    tensor = torch.arange(2)
    nested: Any = [tensor] * 3 + [torch.arange(3)]
    for _ in range(4):
        nested = {"k" * 150: nested}

    checkpoint = opened({"module": {"a": torch.ones(1)}, "x": nested}, tmp_path)
    way = "…" + f"x.{'.'.join(['k' * 150] * 4)}"[-MAX_CONTAINER:]
    assert list(checkpoint.beside) == [f"{way}.0", f"{way}.3"]


def test_a_tensor_mentioned_in_two_places_is_listed_at_each(tmp_path: Path) -> None:
    tensor = torch.arange(2)
    shared = [tensor]

    checkpoint = opened(
        {"module": {"a": torch.ones(1)}, "x": tensor, "y": tensor, "z": shared, "again": shared}, tmp_path
    )
    assert list(checkpoint.beside) == ["x", "y", "z.0"]
