"""Opening: what a file is, told from its content whatever its name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogtools.checkpoint.opening import open_checkpoint
from cogtools.errors import CheckpointError
from cogtools.export.export import export_lora
from tests.support.factories import SAVERS, TOY_2B, Checkpoint, StateDict, is_lora, sat_checkpoint, sat_state_dict
from tests.support.oracles import described_by_cogtools, described_by_torch, torch_load

WEB_PAGE = "download the file itself, not the page that shows it"
NO_CHECKPOINT = "a file of torch.save (.pt, .pth, .bin, .ckpt) or safetensors"


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x"])
def test_the_format_is_told_from_the_content_not_from_the_name(name: str, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3)}
    save_file(tensors, tmp_path / name)
    with open_checkpoint(tmp_path / name) as checkpoint:
        assert checkpoint.format == "safetensors"
    for saver, file_format in (("zip", "torch.save (zip)"), ("legacy", "torch.save (legacy)")):
        SAVERS[saver](tensors, tmp_path / name)
        with open_checkpoint(str(tmp_path / name)) as checkpoint:
            assert checkpoint.format == file_format


@pytest.mark.parametrize(
    ("content", "found", "hint"),
    [
        (b"", "nothing: the file is empty", "copy or download it again"),
        (bytes(1000), "zeros: its content is missing", "copy or download it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            "a Git LFS pointer, not the file itself",
            "fetch the file: git lfs pull",
        ),
        (b"<!DOCTYPE html><html></html>", "a web page", WEB_PAGE),
        (b"GGUF\3\0\0\0", "a GGUF file", "give the checkpoint that it was made from"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "give a checkpoint of PyTorch or safetensors"),
        (b"\x1f\x8b\x08\0", "a gzip archive", "unpack it first: gunzip or tar xzf"),
        (b"PK\x05\x06" + bytes(18), "an empty zip archive", "copy or download it again"),
        (b"two\nlines", "a text file that begins with 'two'", None),
        (b"\n", "a text file that begins with ''", None),
        ("\u4e2d\u6587".encode() * 500, "a text file that begins with " + repr("\u4e2d\u6587" * 30), None),
        (b"\xff" * 600, "a file that begins with ff ff ff ff ff ff ff ff", None),
    ],
    ids=["empty", "zeros", "lfs", "html", "gguf", "hdf5", "gzip", "zip", "text", "blank", "chinese", "bytes"],
)
def test_a_file_that_is_no_checkpoint_is_told_what_it_is(
    content: bytes, found: str, hint: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    tail = f"\n  try:       {hint}" if hint else ""
    assert str(caught.value) == (
        f"this is not a checkpoint\n  file:      {path}\n  found:     {found}\n  expected:  {NO_CHECKPOINT}{tail}"
    )


# What DeepSpeed writes in other releases, and at other stages


def deepspeed_0_15(state: StateDict) -> Checkpoint:
    """With a set of names, which 0.19 no longer writes, and without what came later."""
    made = sat_checkpoint(state)
    del made["checkpoint_parallel_dimensions"]
    return made | {"ds_version": "0.15.4", "sparse_tensor_module_names": {"embedding", "other"}}


def zero_0(state: StateDict) -> Checkpoint:
    """With the optimizer's state, and without a second mention of the frozen weights."""
    lora = [tensor for key, tensor in state.items() if is_lora(key)]
    moments = {number: {"step": 3, "exp_avg": torch.zeros_like(tensor)} for number, tensor in enumerate(lora)}
    optimizer = {"state": moments, "param_groups": [{"lr": 1e-3, "params": list(moments)}]}
    return sat_checkpoint(state) | {
        "optimizer": optimizer,
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
    }


@pytest.mark.parametrize(("make", "flat"), [(deepspeed_0_15, True), (zero_0, False)], ids=["deepspeed-0.15", "zero-0"])
def test_other_releases_and_stages_of_deepspeed_give_the_same_export(
    make: Callable[[StateDict], Checkpoint], flat: bool, tmp_path: Path
) -> None:
    torch.save(sat_checkpoint(sat_state_dict(TOY_2B, 4)), tmp_path / "usual.pt")
    torch.save(make(sat_state_dict(TOY_2B, 4, flat=flat)), tmp_path / "other.pt")
    loaded = torch_load(tmp_path / "other.pt")

    with open_checkpoint(tmp_path / "other.pt") as checkpoint:
        assert described_by_cogtools(checkpoint.tensors) == described_by_torch(loaded["module"])
        assert checkpoint.not_tensors == {}
    for name in ("usual", "other"):
        export_lora(tmp_path / f"{name}.pt", tmp_path / name)
    written = [load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("usual", "other")]
    assert len(written[0]) == 24
    assert described_by_torch(written[0]) == described_by_torch(written[1])


# The real trainer's files


REAL = [
    "2b-fp16/1",
    "2b-fp16/1-ema",
    "2b-fp32/1",
    "5b-bf16/1",
    "5b-bf16/1-ema",
    "2b-bf16-legacy/1",
    "2b-bf16-numpy1/1",
    "2b-bf16-plain/1",
    "2b-fp32-mp2/1",
]


@pytest.mark.parametrize("folder", REAL)
def test_a_real_checkpoint_is_read_as_torch_load_reads_it(real: Path, folder: str) -> None:
    path = real / folder / "mp_rank_00_model_states.pt"
    loaded = torch_load(path)
    module = loaded.get("module", loaded)

    with open_checkpoint(path) as checkpoint:
        assert described_by_cogtools(checkpoint.tensors) == described_by_torch(module)
        assert sum(map(is_lora, checkpoint.tensors)) == 24
        assert checkpoint.not_tensors == {}


def test_a_real_zero_3_file_has_its_attributes(real: Path) -> None:
    path = real / "5b-bf16-z3-part" / "1" / "z3_rank_00_model_states.pt"
    module = torch_load(path)["module"]
    shapes = {key: tuple(tensor.ds_shape) for key, tensor in module.items() if hasattr(tensor, "ds_shape")}

    with open_checkpoint(path) as checkpoint:
        assert described_by_cogtools(checkpoint.tensors) == described_by_torch(module)
        read = {key: entry.attributes["ds_shape"] for key, entry in checkpoint.tensors.items() if entry.attributes}
    assert read == shapes
    assert len(shapes) > 24


def test_the_real_legacy_file_holds_the_same_as_the_zip_file(real: Path) -> None:
    described = []
    for run in ("2b-bf16-legacy", "2b-bf16-plain"):
        with open_checkpoint(real / run) as checkpoint:
            described.append(described_by_cogtools(checkpoint.tensors, views=False))
    assert described[0] == described[1]
