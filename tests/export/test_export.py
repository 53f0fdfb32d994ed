"""An export has the checkpoint's LoRA, bit for bit, under diffusers' names, and says at what scale it was trained."""

import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cogtools
from cogtools.conversion import output as writer
from cogtools.conversion.options import Cast, Scale
from cogtools.errors import CheckpointError, ExportError, OptionError, OutputError
from cogtools.export.export import ExportReport, export_lora
from cogtools.layouts import diffusers
from cogtools.layouts.diffusers import FILE_NAME
from cogtools.layouts.family import IN_LAYERS, LoraKey
from cogtools.layouts.lora import LoraLayout
from cogtools.layouts.recognition import LAYOUTS
from tests.support.factories import (
    SAVERS,
    TOY_2B,
    TOY_5B,
    WRAPPERS,
    sat_checkpoint,
    sat_state_dict,
    zero3_checkpoint,
)
from tests.support.loras import factors, save_lora

LAYER = {
    "attention.query_key_value.matrix_A.0": "attn1.to_q.lora_A.weight",
    "attention.query_key_value.matrix_A.1": "attn1.to_k.lora_A.weight",
    "attention.query_key_value.matrix_A.2": "attn1.to_v.lora_A.weight",
    "attention.query_key_value.matrix_B.0": "attn1.to_q.lora_B.weight",
    "attention.query_key_value.matrix_B.1": "attn1.to_k.lora_B.weight",
    "attention.query_key_value.matrix_B.2": "attn1.to_v.lora_B.weight",
    "attention.dense.matrix_A.0": "attn1.to_out.0.lora_A.weight",
    "attention.dense.matrix_B.0": "attn1.to_out.0.lora_B.weight",
}


def expected(path: Path) -> dict[str, torch.Tensor]:
    """What the export should hold: torch.load's tensors of the toy LoRA under diffusers' names."""
    loaded = torch.load(path, weights_only=False, map_location="cpu")
    module = loaded.get("module", loaded)
    return {
        f"transformer.transformer_blocks.{layer}.{target}": module[
            f"model.diffusion_model.transformer.layers.{layer}.{source}"
        ]
        for layer in range(3)
        for source, target in LAYER.items()
    }


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key


def metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return {key: json.loads(value) if key != "format" else value for key, value in file.metadata().items()}


@pytest.fixture
def run(run_folder: Path) -> Path:
    """The checkpoint in a trainer's save folder, with a toy LoRA of rank 4."""
    return run_folder / "1000" / "mp_rank_00_model_states.pt"


# The tensors


def test_a_real_checkpoint_is_exported_bit_for_bit(real_run: Path, tmp_path: Path) -> None:
    path = next((real_run / "1").glob("*.pt"))
    report = export_lora(path, tmp_path)
    assert_same(load_file(tmp_path / FILE_NAME), expected(path))
    assert (report.tensors, report.rank, report.scaling) == (24, 4, 0.25)
    assert report.crc32 == ("not recorded" if real_run.name == "2b-bf16-legacy" else "checked")


def test_ema_weights_are_exported_when_asked_for(real: Path, tmp_path: Path) -> None:
    report = export_lora(real / "2b-fp16", tmp_path, ema=True)
    ema = real / "2b-fp16" / "1-ema" / "mp_rank_00_model_states.pt"
    assert_same(load_file(tmp_path / FILE_NAME), expected(ema))
    assert report.checkpoint == ema
    assert report.notices[0] == "Took the EMA weights of iteration 1. The plain ones are in 1 beside them."


@pytest.mark.parametrize("save", SAVERS)
def test_every_way_of_saving_gives_the_same_export(tmp_path: Path, save: str) -> None:
    state = sat_state_dict(TOY_5B, 4, torch.bfloat16)
    SAVERS[save](sat_checkpoint(state), tmp_path / "checkpoint.pt")
    export_lora(tmp_path / "checkpoint.pt", tmp_path)
    torch.save(state, tmp_path / "plain.pt")
    assert_same(load_file(tmp_path / FILE_NAME), expected(tmp_path / "plain.pt"))


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_every_wrapper_gives_the_same_export(tmp_path: Path, wrap: str) -> None:
    state = sat_state_dict(TOY_5B, 4, torch.bfloat16)
    torch.save(WRAPPERS[wrap](state), tmp_path / "checkpoint.pt")
    export_lora(tmp_path / "checkpoint.pt", tmp_path)
    torch.save(state, tmp_path / "plain.pt")
    assert_same(load_file(tmp_path / FILE_NAME), expected(tmp_path / "plain.pt"))


def test_tensors_that_are_not_contiguous_are_gathered(tmp_path: Path) -> None:
    state = dict(sat_state_dict(TOY_2B, 4))
    torch.save(state, tmp_path / "plain.pt")
    for number, (key, tensor) in enumerate(state.items()):
        if ".matrix_" in key:
            state[key] = tensor.T.contiguous().T if number % 2 else tensor.repeat(1, 2)[:, : tensor.shape[1]]
    assert not all(tensor.is_contiguous() for tensor in state.values())
    torch.save(state, tmp_path / "strided.pt")
    export_lora(tmp_path / "strided.pt", tmp_path)
    assert_same(load_file(tmp_path / FILE_NAME), expected(tmp_path / "plain.pt"))


def test_a_whole_zero3_file_is_exported_in_its_true_shapes(tmp_path: Path) -> None:
    state = sat_state_dict(TOY_5B, 4, torch.bfloat16)
    torch.save(state, tmp_path / "plain.pt")
    torch.save(zero3_checkpoint(state), tmp_path / "z3_rank_00_model_states.pt")
    export_lora(tmp_path / "z3_rank_00_model_states.pt", tmp_path)
    assert_same(load_file(tmp_path / FILE_NAME), expected(tmp_path / "plain.pt"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("scale", ["metadata", "fold"])
def test_a_lora_of_every_layout_becomes_diffusers(layout: LoraLayout, scale: Scale, tmp_path: Path) -> None:
    # SAT's trainer adapts the attention only.
    made = factors(tuple(name for name in IN_LAYERS if layout.key(LoraKey(0, name, "A")) is not None))
    source = save_lora(tmp_path, layout, made, 2.0)
    export_lora(source, tmp_path / "out", alpha=2.0, scale=scale)
    factor = {"A": 1.0, "B": 0.5 if scale == "fold" else 1.0}  # of rank 4
    wanted = {str(diffusers.LAYOUT.key(key)): tensor * factor[key.part] for key, tensor in made.items()}
    assert_same(load_file(tmp_path / "out" / FILE_NAME), wanted)


# The file


def test_the_header_states_the_scale_and_how_the_file_was_made(run: Path, tmp_path: Path) -> None:
    export_lora(run, tmp_path, alpha=2.5)
    modules = [
        f"transformer_blocks.{layer}.attn1.{name}"
        for layer in range(3)
        for name in ("to_k", "to_out.0", "to_q", "to_v")
    ]
    assert metadata(tmp_path / FILE_NAME) == {
        "format": "pt",
        "lora_adapter_metadata": {
            "transformer.r": 4,
            "transformer.lora_alpha": 2.5,
            "transformer.rank_pattern": {},
            "transformer.alpha_pattern": {},
            "transformer.target_modules": modules,
            "transformer.use_dora": False,
            "transformer.lora_bias": False,
        },
        "cogtools": {
            "version": cogtools.__version__,
            "source": "mp_rank_00_model_states.pt",
            "iteration": 1000,
            "ema": False,
            "format": "diffusers",
            "models": [],
            "transformer_layers": 3,
            "hidden_size": 128,
            "rank": 4,
            "alpha": 2.5,
            "scaling": 0.625,
            "alpha_source": "--alpha",
            "scale": "metadata",
            "source_dtype": "float16",
            "dtype": "float16",
        },
    }


def test_the_report_tells_all_of_it(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    report = export_lora(run, out, sha256=True)
    target = out / FILE_NAME
    assert report == ExportReport(
        checkpoint=run,
        output=target,
        folder=out,
        files=(target,),
        format="diffusers",
        written=True,
        model="CogVideoX of no published size: 3 layers, hidden size 128",
        pipeline=None,
        layers=(0, 1, 2),
        modules=12,
        rank=4,
        alpha=1,
        alpha_source="default",
        scaling=0.25,
        scale="metadata",
        weight=1.0,
        dtype="float16",
        source_dtype="float16",
        has_base=False,
        tensors=24,
        size_bytes=target.stat().st_size,
        crc32="checked",
        largest_relative_error=None,
        lost=None,
        sha256=hashlib.sha256(target.read_bytes()).hexdigest(),
        notices=(
            "training_config.yaml sets no lora_alpha, so alpha is 1, SAT's default.",
            "The scale is stated in the file's header, which diffusers reads from 0.34 on. For older ones, export with "
            "--scale fold; for other programs, with --format.",
        ),
    )


def test_the_same_input_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    export_lora(run, tmp_path / "a")
    export_lora(run, tmp_path / "b.safetensors")
    assert (tmp_path / "a" / FILE_NAME).read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_system_that_cannot_copy_in_the_kernel_writes_the_same_bytes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_lora(run, tmp_path / "a")
    monkeypatch.setattr(writer.AtomicFile, "_kernel_copy", lambda *_: 0)
    export_lora(run, tmp_path / "b")
    monkeypatch.undo()
    monkeypatch.delattr(os, "copy_file_range")
    monkeypatch.delattr(os, "posix_fallocate")
    export_lora(run, tmp_path / "c")
    contents = {(tmp_path / name / FILE_NAME).read_bytes() for name in "abc"}
    assert len(contents) == 1


def test_the_file_follows_the_umask(run: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        export_lora(run, tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / FILE_NAME).stat().st_mode) == 0o640


def test_a_dry_run_finds_out_everything_and_writes_nothing(run: Path, tmp_path: Path) -> None:
    dry = export_lora(run, tmp_path / "out", dry_run=True)
    assert not (tmp_path / "out").exists()
    written = export_lora(run, tmp_path / "out")
    assert (dry.written, written.written, dry.size_bytes) == (False, True, written.size_bytes)


def test_an_output_that_exists_is_kept_unless_it_may_be_replaced(run: Path, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text("mine")
    for dry_run in (False, True):
        with pytest.raises(OutputError, match="the output exists already"):
            export_lora(run, tmp_path, dry_run=dry_run)
    assert (tmp_path / FILE_NAME).read_text() == "mine"
    export_lora(run, tmp_path, overwrite=True)
    assert len(load_file(tmp_path / FILE_NAME)) == 24


def test_progress_is_told_up_to_the_end(run: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    size = export_lora(run, tmp_path, progress=lambda done, total: told.append((done, total))).size_bytes
    assert told == sorted(told)
    assert told[-1] == (size, size)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run, out: export_lora(run, out, scale="both"), "there is no such way to carry the scale"),  # type: ignore[arg-type]
        (lambda run, out: export_lora(run, out, dtype="int8"), "there is no such dtype"),  # type: ignore[arg-type]
    ],
)
def test_words_that_mean_nothing_are_refused(
    run: Path, tmp_path: Path, call: Callable[[Path, Path], ExportReport], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        call(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Damage


def flip_a_bit_of_the_lora(path: Path) -> None:
    with cogtools.open_checkpoint(path) as checkpoint:
        tensor = checkpoint.tensors["model.diffusion_model.transformer.layers.1.attention.dense.matrix_A.0"]
        place = tensor.range()
        assert place is not None
    content = bytearray(path.read_bytes())
    content[place.offset_bytes + 5] ^= 1
    path.write_bytes(content)


def test_weights_that_have_changed_are_found_by_their_crc32(run: Path, tmp_path: Path) -> None:
    flip_a_bit_of_the_lora(run)
    with pytest.raises(CheckpointError) as caught:
        export_lora(run, tmp_path / "out")
    assert caught.value.what == "the checkpoint is damaged: weights have changed since they were saved"
    assert not (tmp_path / "out").exists()


def test_damage_is_not_looked_for_where_no_crc32s_are_recorded(tmp_path: Path) -> None:
    SAVERS["without-crc32"](sat_state_dict(TOY_2B, 4), tmp_path / "a.pt")
    flip_a_bit_of_the_lora(tmp_path / "a.pt")
    assert export_lora(tmp_path / "a.pt", tmp_path).crc32 == "not recorded"


def test_an_error_while_writing_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer.AtomicFile, "sync", fail)
    with pytest.raises(KeyboardInterrupt):
        export_lora(run, tmp_path / "a" / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


# Folding the scale in, and casting


def update(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """lora_B @ lora_A of a module of layer 1, in double precision."""
    prefix = f"transformer.transformer_blocks.1.attn1.{module}"
    return tensors[f"{prefix}.lora_B.weight"].double() @ tensors[f"{prefix}.lora_A.weight"].double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1, 16])
def test_folding_a_power_of_two_is_exact(tmp_path: Path, dtype: torch.dtype, alpha: float) -> None:
    torch.save(sat_state_dict(TOY_2B, 8, dtype), tmp_path / "a.pt")
    plain, folded = tmp_path / "plain", tmp_path / "folded"
    export_lora(tmp_path / "a.pt", plain, alpha=alpha)
    report = export_lora(tmp_path / "a.pt", folded, alpha=alpha, scale="fold")
    before, after = load_file(plain / FILE_NAME), load_file(folded / FILE_NAME)
    for module in ("to_q", "to_k", "to_v", "to_out.0"):
        assert torch.equal(update(after, module), update(before, module) * alpha / 8)
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    assert report.largest_relative_error == 0.0
    assert metadata(folded / FILE_NAME)["lora_adapter_metadata"]["transformer.lora_alpha"] == 8


def test_folding_in_float16_divides_the_scale_so_that_small_weights_survive(tmp_path: Path) -> None:
    state = dict(sat_state_dict(TOY_2B, 128))
    torch.save(state, tmp_path / "a.pt")
    export_lora(tmp_path / "a.pt", tmp_path / "plain")
    report = export_lora(tmp_path / "a.pt", tmp_path / "folded", scale="fold")
    before, after = load_file(tmp_path / "plain" / FILE_NAME), load_file(tmp_path / "folded" / FILE_NAME)
    into_b_alone = 0.0
    for module in ("to_q", "to_k", "to_v", "to_out.0"):
        exact = update(before, module) / 128
        assert (update(after, module) - exact).norm() < 1e-3 * exact.norm()
        b = before[f"transformer.transformer_blocks.1.attn1.{module}.lora_B.weight"]
        into_b_alone = max(into_b_alone, ((b / 128).double() * 128 - b.double()).norm().item() / b.norm().item())
    assert report.largest_relative_error is not None
    assert 0 < report.largest_relative_error < into_b_alone / 4


def test_a_scale_that_is_no_power_of_two_is_folded_within_rounding(tmp_path: Path) -> None:
    torch.save(sat_state_dict(TOY_2B, 4, torch.float32), tmp_path / "a.pt")
    export_lora(tmp_path / "a.pt", tmp_path / "plain")
    report = export_lora(tmp_path / "a.pt", tmp_path / "folded", alpha=3, scale="fold")
    before, after = load_file(tmp_path / "plain" / FILE_NAME), load_file(tmp_path / "folded" / FILE_NAME)
    exact = update(before, "to_v") * 0.75
    assert (update(after, "to_v") - exact).norm() < 2**-23 * exact.norm()
    assert report.largest_relative_error is not None
    assert 0 < report.largest_relative_error < 2**-24


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
)
def test_casting_rounds_as_torch_does(tmp_path: Path, name: Cast, dtype: torch.dtype) -> None:
    torch.save(sat_state_dict(TOY_2B, 4, torch.float32), tmp_path / "a.pt")
    report = export_lora(tmp_path / "a.pt", tmp_path, dtype=name)
    assert_same(
        load_file(tmp_path / FILE_NAME), {key: tensor.to(dtype) for key, tensor in expected(tmp_path / "a.pt").items()}
    )
    assert (report.dtype, report.source_dtype) == (str(dtype).removeprefix("torch."), "float32")
    assert metadata(tmp_path / FILE_NAME)["cogtools"]["dtype"] == report.dtype


def test_a_value_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    state = dict(sat_state_dict(TOY_2B, 4, torch.float32))
    key = "model.diffusion_model.transformer.layers.0.attention.dense.matrix_A.0"
    state[key] = state[key] + 1e6
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ExportError, match="does not fit into float16"):
        export_lora(tmp_path / "a.pt", tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()


def test_without_its_scale_the_file_says_only_how_it_was_made(run: Path, tmp_path: Path) -> None:
    export_lora(run, tmp_path, scale="none")
    found = metadata(tmp_path / FILE_NAME)
    assert found.keys() == {"format", "cogtools"}
    assert found["cogtools"]["scale"] == "none"


# Places that cannot be


def test_the_checkpoint_is_never_replaced_by_its_own_export(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(dict(sat_state_dict(TOY_2B, 4, base="none")), path)
    before = path.read_bytes()
    with pytest.raises(OutputError, match="the output would replace the checkpoint that it is made of"):
        export_lora(path, path, overwrite=True)
    assert path.read_bytes() == before


def test_a_dry_run_finds_a_place_that_cannot_be_and_checks_no_weights(tmp_path: Path) -> None:
    torch.save(sat_state_dict(TOY_2B, 4), tmp_path / "a.pt")
    assert export_lora(tmp_path / "a.pt", tmp_path / "out", dry_run=True).crc32 == "not checked"
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Not a directory"):
        export_lora(tmp_path / "a.pt", tmp_path / "file" / "out", dry_run=True)


def test_rounding_is_measured_on_finite_values(tmp_path: Path) -> None:
    state = sat_state_dict(TOY_2B, 4, torch.float32)
    key = next(key for key in state if "matrix_B" in key)
    state[key][0, 0] = float("nan")
    torch.save(state, tmp_path / "a.pt")
    error = export_lora(tmp_path / "a.pt", tmp_path, dtype="bf16").largest_relative_error
    assert error is not None
    assert 0 < error < 2**-8


def test_a_checkpoint_that_is_written_to_while_it_is_read_is_refused(tmp_path: Path) -> None:
    torch.save(sat_state_dict(TOY_2B, 4), tmp_path / "a.pt")

    def meddle(_done: int, _all: int) -> None:
        with (tmp_path / "a.pt").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\0")

    with pytest.raises(CheckpointError, match="the file was changed while it was read"):
        export_lora(tmp_path / "a.pt", tmp_path / "out", progress=meddle)
    assert not (tmp_path / "out").exists()


def test_a_missing_checkpoint_is_told_first_where_the_output_exists_too(tmp_path: Path) -> None:
    (tmp_path / "out.safetensors").touch()
    with pytest.raises(CheckpointError, match="there is no such file"):
        export_lora(tmp_path / "nowhere.pt", tmp_path / "out.safetensors")
