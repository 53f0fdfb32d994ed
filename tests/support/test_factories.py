"""The factories are held against the real trainer's files, and against what torch.load reads back."""

import io
import math
import pickletools
import struct
import sys
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from benchmarks import full_size
from tests.support import factories
from tests.support.factories import (
    COGVIDEOX_2B,
    COGVIDEOX_5B,
    MODELS,
    SAVERS,
    TOY_2B,
    TOY_5B,
    TOY_MODELS,
    TRANSFORMER,
    Checkpoint,
    SatModel,
    StateDict,
    is_lora,
    module_shapes,
    sat_checkpoint,
    sat_state_dict,
    save_run,
    zero3_checkpoint,
    zoo,
)

RANK = 4
RNG_STATES = ("random_rng_state", "np_rng_state", "torch_rng_state", "cuda_rng_state")


# What the real trainer wrote


@pytest.mark.parametrize(
    ("run", "model", "dtype"),
    [
        ("2b-fp16", TOY_2B, torch.float16),
        ("2b-fp32", TOY_2B, torch.float32),
        ("5b-bf16", TOY_5B, torch.bfloat16),
    ],
)
def test_a_checkpoint_differs_from_the_real_trainers_only_in_its_values(
    real: Path, run: str, model: SatModel, dtype: torch.dtype
) -> None:
    written = torch.load(real / run / "1" / "mp_rank_00_model_states.pt", weights_only=False)
    made = sat_checkpoint(sat_state_dict(model, RANK, dtype), iteration=1)

    assert [(key, type(value)) for key, value in made.items()] == [(key, type(value)) for key, value in written.items()]
    assert _pickle_globals(made) == _pickle_globals(written)
    assert _described(made) == _described(written)


def _described(checkpoint: Checkpoint) -> list[tuple[str, Any]]:
    """All that a checkpoint says, but for the tensors' values and the random states."""
    storages: dict[int, int] = {}

    def describe(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            number = storages.setdefault(storage.data_ptr(), len(storages))
            return value.dtype, value.shape, value.stride(), value.storage_offset(), number, storage.nbytes()
        if isinstance(value, dict):
            return type(value), [(key, describe(item)) for key, item in value.items()]
        if isinstance(value, list | tuple):
            return type(value), [describe(item) for item in value]
        return type(value), value

    def describe_random(value: Any) -> Any:
        if isinstance(value, tuple):
            return type(value), [describe_random(item) for item in value]
        if isinstance(value, np.ndarray):
            return value.dtype, value.shape
        return describe(value) if isinstance(value, torch.Tensor) else type(value)

    return [
        (key, describe_random(value) if key in RNG_STATES else describe(value)) for key, value in checkpoint.items()
    ]


def _pickle_globals(checkpoint: Checkpoint) -> set[str]:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with zipfile.ZipFile(buffer) as archive:
        operations = pickletools.genops(archive.read("archive/data.pkl"))
    return {str(argument) for operation, argument, _ in operations if operation.name == "GLOBAL"}


def test_the_metadata_of_a_state_dict_names_modules_as_the_real_one_does(real: Path) -> None:
    written = torch.load(real / "2b-fp16" / "1" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    made = sat_state_dict(TOY_2B, RANK)

    # The real one also names modules that hold no tensor (dropout, activations).
    with_tensors = [name for name in written._metadata if any(_is_in(key, name) for key in written)]
    assert list(made._metadata.items()) == [(name, written._metadata[name]) for name in with_tensors]  # type: ignore[attr-defined]


def _is_in(key: str, module: str) -> bool:
    return not module or key.startswith(f"{module}.")


def test_a_run_has_the_files_of_a_real_one_and_its_config_says_the_same_of_the_lora(real: Path, tmp_path: Path) -> None:
    checkpoint = sat_checkpoint(sat_state_dict(TOY_2B, RANK), iteration=1)
    path = save_run(tmp_path, checkpoint, iteration=1, ema=checkpoint, rank=RANK)

    assert path == tmp_path / "1" / "mp_rank_00_model_states.pt"
    assert _files(tmp_path) == _files(real / "2b-fp16")
    for name in ("latest", "model_config.json"):
        assert (tmp_path / name).read_bytes() == (real / "2b-fp16" / name).read_bytes()
    assert _lora_config(tmp_path) == _lora_config(real / "2b-fp16")


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def _lora_config(folder: Path) -> Any:
    config = yaml.safe_load((folder / "training_config.yaml").read_text())
    return config["model"]["network_config"]["params"]["modules"]["lora_config"]


def test_a_zero3_checkpoint_is_the_real_one_with_both_halves_of_every_tensor(real: Path) -> None:
    half = torch.load(real / "5b-bf16-z3-part" / "1" / "z3_rank_00_model_states.pt", weights_only=False)
    whole = zero3_checkpoint(sat_state_dict(TOY_5B, RANK, torch.bfloat16))

    def described(module: StateDict, ranks: int) -> dict[str, Any]:
        return {
            key: (tensor.dtype, vars(tensor), math.ceil(tensor.numel() / (ranks if vars(tensor) else 1)))
            for key, tensor in module.items()
        }

    assert list(whole) == list(half)
    assert described(whole["module"], ranks=2) == described(half["module"], ranks=1)


# Sizes


@pytest.mark.parametrize(
    ("model", "tensors", "transformer_parameters"),
    # Parameters of diffusers' CogVideoXTransformer3DModel in the published configurations, and what SAT keeps
    # beside them: positions and, in the 5B models, 64 position embeddings that nothing uses.
    [
        (MODELS[0], 1453, 1_693_783_872 + 17_776 * 1920),
        (MODELS[1], 1767, 5_570_283_072 + 17_550 * 64 * 2 + 64 * 3072),
        (MODELS[2], 1768, 5_570_479_680 + 17_776 * 3072 + 17_550 * 64 * 2 + 64 * 3072),
        (MODELS[3], 1765, 5_570_676_352 + 64 * 3072),
        (MODELS[4], 1769, 5_571_594_880 + 64 * 3072),
    ],
    ids=[model.name for model in MODELS],
)
def test_the_real_sizes_have_as_many_parameters_as_the_published_models(
    model: SatModel, tensors: int, transformer_parameters: int
) -> None:
    parameters = {key: math.prod(shape) for key, shape in module_shapes(model, None).items()}

    def counted(prefix: str) -> int:
        return sum(count for key, count in parameters.items() if key.startswith(prefix))

    assert counted(TRANSFORMER) == transformer_parameters
    assert counted(factories.TEXT_ENCODER) - parameters[factories.TIED_EMBEDDING] == 4_762_310_656
    assert counted(factories.VAE) == 215_583_907
    assert len(module_shapes(model, 128)) == tensors


@pytest.mark.parametrize(("model", "tensors"), [(COGVIDEOX_2B, 240), (COGVIDEOX_5B, 336)])
def test_every_layer_has_four_projections_with_two_matrices_each(model: SatModel, tensors: int) -> None:
    lora = {key: shape for key, shape in module_shapes(model, 128).items() if is_lora(key)}

    assert len(lora) == tensors
    assert set(lora.values()) == {(128, model.hidden), (model.hidden, 128)}


def test_only_the_given_layers_have_a_lora_and_the_others_keep_their_plain_names() -> None:
    layer = TRANSFORMER + "transformer.layers.{}.attention.dense."
    keys = [
        key for key in module_shapes(TOY_2B, RANK, layers=[1]) if key.startswith((layer.format(0), layer.format(1)))
    ]

    assert keys == [
        layer.format(0) + "weight",
        layer.format(0) + "bias",
        layer.format(1) + "original.weight",
        layer.format(1) + "original.bias",
        layer.format(1) + "matrix_A.0",
        layer.format(1) + "matrix_B.0",
    ]


# Values and storages


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_values_of_a_lora_are_finite_not_zero_and_another_in_every_tensor(dtype: torch.dtype) -> None:
    state = sat_state_dict(TOY_2B, RANK, dtype, base="none")

    assert all(tensor.isfinite().all() for tensor in state.values())
    assert all(tensor.count_nonzero() > tensor.numel() / 2 for tensor in state.values())
    assert len({tensor.float().sum().item() for tensor in state.values()}) == len(state) == 24


def test_the_lora_is_the_same_whatever_lies_beside_it_and_another_with_another_seed() -> None:
    full, telling, alone = (sat_state_dict(TOY_2B, RANK, base=base, seed=5) for base in ("full", "telling", "none"))
    other = sat_state_dict(TOY_2B, RANK, base="none", seed=6)

    assert list(alone) == [key for key in full if is_lora(key)] == [key for key in telling if is_lora(key)]
    for key, tensor in alone.items():
        assert torch.equal(full[key], tensor)
        assert torch.equal(telling[key], tensor)
        assert not torch.equal(other[key], tensor)


@pytest.mark.parametrize("model", [*TOY_MODELS, *MODELS], ids=lambda model: model.name)
def test_the_telling_base_weights_tell_the_models_apart(model: SatModel) -> None:
    def telling(candidate: SatModel) -> dict[str, torch.Size]:
        state = sat_state_dict(candidate, 1, base="telling", layers=[0])
        return {key: tensor.shape for key, tensor in state.items() if not is_lora(key)}

    others = [other for other in (TOY_MODELS if model in TOY_MODELS else MODELS) if other is not model]
    assert all(telling(other) != telling(model) for other in others)


def test_a_flat_lora_fills_one_storage_without_gaps() -> None:
    state = sat_state_dict(TOY_2B, RANK)
    lora = [tensor for key, tensor in state.items() if is_lora(key)]

    assert {tensor.untyped_storage().data_ptr() for tensor in lora} == {lora[0].untyped_storage().data_ptr()}
    assert lora[0].storage_offset() == 0
    assert all(after.storage_offset() == before.storage_offset() + before.numel() for before, after in pairwise(lora))
    assert lora[0].untyped_storage().nbytes() == sum(tensor.nbytes for tensor in lora)


def test_a_lora_that_is_not_flat_has_a_storage_per_tensor() -> None:
    state = sat_state_dict(TOY_2B, RANK, base="none", flat=False)

    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in state.values())
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == 24


def test_duplicated_frozen_weights_have_the_same_values_in_storages_of_their_own() -> None:
    checkpoint = sat_checkpoint(sat_state_dict(TOY_2B, RANK), duplicate_frozen=True)

    for key, fragment in checkpoint["frozen_param_fragments"].items():
        assert torch.equal(fragment, checkpoint["module"][key])
        assert fragment.data_ptr() != checkpoint["module"][key].data_ptr()


def test_a_run_names_alpha_and_layers_in_its_config_only_where_given(tmp_path: Path) -> None:
    checkpoint = sat_checkpoint(sat_state_dict(TOY_2B, RANK, base="none"))
    save_run(tmp_path / "plain", checkpoint, rank=RANK)
    save_run(tmp_path / "named", checkpoint, rank=RANK, alpha=2.0, layer_range=[0, 2])

    assert _lora_config(tmp_path / "plain")["params"] == {"r": RANK}
    assert _lora_config(tmp_path / "named")["params"] == {
        "r": RANK,
        "lora_alpha": 2.0,
        "layer_range": [0, 2],
    }
    assert _files(tmp_path / "plain") == {
        "latest",
        "model_config.json",
        "training_config.yaml",
        "1000/mp_rank_00_model_states.pt",
    }


# Ways to write


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return sat_checkpoint(sat_state_dict(TOY_5B, RANK, torch.bfloat16, base="telling"))


@pytest.mark.parametrize("saver", SAVERS)
def test_torch_load_reads_the_same_from_every_way_to_write(saver: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    SAVERS[saver](checkpoint, tmp_path / "x.pt")
    loaded = torch.load(tmp_path / "x.pt", map_location="cpu", weights_only=False)

    assert _described(loaded) == _described(checkpoint)
    assert all(torch.equal(loaded["module"][key], tensor) for key, tensor in checkpoint["module"].items())
    assert torch.equal(loaded["torch_rng_state"], checkpoint["torch_rng_state"])
    assert np.array_equal(loaded["np_rng_state"][1], checkpoint["np_rng_state"][1])


def test_every_way_to_write_leaves_its_own_traces(checkpoint: Checkpoint, tmp_path: Path) -> None:
    traces = {saver: _traces(save, checkpoint, tmp_path / f"{saver}.pt") for saver, save in SAVERS.items()}

    default = {
        "zip": True,
        "crc32": True,
        "compressed": False,
        "aligned": True,
        "numpy": "numpy._core.multiarray",
        "location": "cpu",
        "byteorder": sys.byteorder,
    }
    assert traces == {
        "zip": default,
        "legacy": {"zip": False},
        "without-crc32": default | {"crc32": False},
        "numpy1": default | {"numpy": "numpy.core.multiarray"},
        "cuda": default | {"location": "cuda:0"},
        "big-endian": default | {"byteorder": "big"},
        "deflated": default | {"compressed": True, "aligned": False},
    }


def _traces(save: Any, checkpoint: Checkpoint, path: Path) -> dict[str, Any]:
    save(checkpoint, path)
    if not zipfile.is_zipfile(path):
        return {"zip": False}
    reader = torch._C.PyTorchFileReader(str(path))
    operations = list(pickletools.genops(reader.get_record("data.pkl")))
    strings = [argument for operation, argument, _ in operations if operation.name == "BINUNICODE"]
    names = [str(argument) for operation, argument, _ in operations if operation.name == "GLOBAL"]
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    storages = [record for record in records if "/data/" in record.filename]
    return {
        "zip": True,
        "crc32": all(record.CRC for record in records),
        "compressed": any(record.compress_type != zipfile.ZIP_STORED for record in records),
        "aligned": all(_data_offset(path, record) % 64 == 0 for record in storages),
        "numpy": next(name.split()[0] for name in names if name.endswith("_reconstruct")),
        "location": next(string for string in strings if string in {"cpu", "cuda:0"}),
        "byteorder": reader.get_record("byteorder").decode(),
    }


def _data_offset(path: Path, record: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin: after 30 bytes of local header, which end in two lengths, and those."""
    with path.open("rb") as file:
        file.seek(record.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
    return record.header_offset + 30 + int(name_length) + int(extra_length)


def test_prefixes_and_wrappers_keep_the_tensors() -> None:
    module = sat_state_dict(TOY_2B, RANK, base="telling")

    assert list(factories.with_module_prefix(module)) == [f"module.{key}" for key in module]
    assert [TRANSFORMER + key for key in factories.without_prefix(module)] == list(module)
    assert {name: wrap(module) for name, wrap in factories.WRAPPERS.items()} == {
        "bare": module,
        "module": {"module": module},
        "model": {"model": module},
        "state_dict": {"state_dict": module},
        "state_dict.module": {"state_dict": {"module": module}},
    }


# Odd tensors


def test_torch_load_reads_every_odd_tensor_as_it_was(tmp_path: Path) -> None:
    torch.save(zoo(), tmp_path / "zoo.pt")
    loaded = torch.load(tmp_path / "zoo.pt", weights_only=False)

    def described(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {
            name: (
                type(tensor),
                tensor.dtype,
                tensor.shape,
                tensor.stride(),
                tensor.storage_offset(),
                tensor.requires_grad,
                vars(tensor),
                tensor.detach().to(torch.complex128).tolist(),
            )
            for name, tensor in tensors.items()
        }

    assert described(loaded) == described(zoo())
    assert loaded["tied"].data_ptr() == loaded["tied again"].data_ptr()
    assert not loaded["expanded"].is_contiguous()


# Full size


@pytest.mark.parametrize("scale", [1, 4])
def test_the_full_size_maker_writes_a_whole_file_with_that_lora_and_zeros(tmp_path: Path, scale: int) -> None:
    path = tmp_path / "x.pt"
    model = full_size.scaled(TOY_2B, RANK, scale)
    full_size.make(path, TOY_2B, RANK, torch.float16, scale, seed=3)
    loaded = torch.load(path, mmap=True, weights_only=False)
    expected = sat_state_dict(model, RANK, base="full", seed=3)
    for key, tensor in expected.items():
        if not is_lora(key):
            tensor.zero_()

    assert _described(loaded) == _described(sat_checkpoint(expected))
    assert all(torch.equal(loaded["module"][key], tensor) for key, tensor in expected.items())
    assert torch.equal(loaded["torch_rng_state"], torch.Generator().manual_seed(0).get_state())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert all(record.CRC for record in archive.infolist() if record.file_size)


def test_the_full_size_maker_scales_all_storages_together() -> None:
    def elements(scale: int) -> int:
        shapes = module_shapes(full_size.scaled(COGVIDEOX_2B, 128, scale), 128)
        return sum(math.prod(shape) for key, shape in shapes.items() if key != factories.TIED_EMBEDDING)

    assert elements(4) / elements(1) == pytest.approx(4, rel=1e-3)
    assert elements(1) * 2 == pytest.approx(3.58e9, rel=1e-3)
