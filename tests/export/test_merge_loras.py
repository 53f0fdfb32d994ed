"""Several LoRAs become one that adds what they add together: stacked exactly, or as near as a lower rank can come."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cogtools
from cogtools.errors import CogtoolsError, ExportError, OptionError, OutputError
from cogtools.export.export import export_lora
from cogtools.export.merge import MergedLora, MergeReport, merge
from cogtools.layouts.diffusers import FILE_NAME
from cogtools.layouts.family import Module
from cogtools.verification.verify import verify_lora
from tests.support.command_line import CommandLine, imported_by
from tests.support.factories import TOY_2B, sat_checkpoint, sat_state_dict, save_run
from tests.support.toy_loras import ToyLora, attention, relative_error, updates_in

COMFYUI = {"out": "attn_out"}
"""What ComfyUI calls modules of the attention, where that is another name than cogtools'."""

UNITS = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
"""How far rounding moves a value, relative to it."""


def summed(*loras: tuple[ToyLora, float]) -> dict[Module, torch.Tensor]:
    """What LoRAs with weights add to each module's weight."""
    found: dict[Module, torch.Tensor] = {}
    for lora, weight in loras:
        for module, update in lora.updates().items():
            found[module] = found.get(module, torch.zeros_like(update)) + weight * update
    return found


def assert_adds(path: Path, expected: Mapping[Module, torch.Tensor], error: float) -> None:
    found = updates_in(path)
    assert found.keys() == expected.keys()
    for module, update in expected.items():
        assert relative_error(found[module], update) <= error, module


def record(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        content: dict[str, Any] = json.loads(file.metadata()["cogtools"])
        return content


@pytest.fixture
def two(tmp_path: Path) -> tuple[ToyLora, ToyLora, Path, Path]:
    """Two LoRAs of different ranks, scalings and modules, and their files."""
    a = ToyLora(attention(4), dict.fromkeys(attention(4), 2.0), seed=1)
    feed_forward = {Module(layer, "ff_out"): 3 + layer for layer in range(3)}
    b = ToyLora({**attention(6), **feed_forward, Module(None, "proj_out"): 2}, seed=2)
    return a, b, a.save(tmp_path / "a.safetensors"), b.save(tmp_path / "b.safetensors")


# Stacking


def test_the_stacked_lora_adds_what_all_of_them_add(two: tuple[ToyLora, ToyLora, Path, Path], tmp_path: Path) -> None:
    a, b, *paths = two
    report = merge(*paths, out=tmp_path / "out", weights=(0.5, -2))
    path = tmp_path / "out" / FILE_NAME
    assert_adds(path, summed((a, 0.5), (b, -2)), 1e-7)
    tensors = load_file(path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert tensors["transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"].shape == (10, 128)
    assert tensors["transformer.proj_out.lora_B.weight"].shape == (64, 2)
    model = "CogVideoX of no published size: 3 layers, hidden size 128"
    assert report == MergeReport(
        result="lora",
        base=None,
        loras=(
            MergedLora(paths[0], "diffusers", 12, 4, 2, "lora_adapter_metadata", 0.5, 0.5),
            MergedLora(paths[1], "diffusers", 16, None, None, "lora_adapter_metadata", 1, -2),
        ),
        output=path,
        folder=path.parent,
        files=(path,),
        written=True,
        model=model,
        pipeline=None,
        format="diffusers",
        modules=16,
        rank=None,
        dtype="float32",
        tensors=32,
        size_bytes=path.stat().st_size,
        crc32="not recorded",
        largest_relative_error=report.largest_relative_error,
        lost=None,
        exported=None,
        notices=report.notices,
    )
    assert report.largest_relative_error is not None
    assert report.largest_relative_error < 1e-7
    assert verify_lora(path).verdict == "pass"


def test_the_stacked_factors_are_those_of_the_sources_one_after_the_other(tmp_path: Path) -> None:
    a, b = ToyLora(attention(2), seed=1), ToyLora(attention(3), seed=2)
    merge(a.save(tmp_path / "a.safetensors"), b.save(tmp_path / "b.safetensors"), out=tmp_path / "ab.safetensors",
          weights=(1, 4))  # fmt: skip
    first, second, both = (load_file(tmp_path / f"{name}.safetensors") for name in ("a", "b", "ab"))
    for key in first:
        if ".lora_A." in key:
            assert torch.equal(both[key], torch.cat([first[key], second[key]]))
        else:
            assert torch.equal(both[key], torch.cat([first[key], 4 * second[key]], dim=1))


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_stacking_keeps_every_update_in_every_dtype(tmp_path: Path, data: st.DataObject) -> None:
    kinds = [{Module(layer, name): 1 for layer in range(3)} for name in ("ff_in", "norm1")] + [
        {Module(None, "norm_out"): 1}
    ]
    loras, weights = [], []
    for number in range(data.draw(st.integers(2, 3))):
        ranks = attention(1)
        for kind in data.draw(st.lists(st.sampled_from(kinds), max_size=2)):
            ranks |= kind
        ranks = {module: data.draw(st.integers(1, 9)) for module in ranks}
        alphas = data.draw(st.dictionaries(st.sampled_from(list(ranks)), st.floats(0.01, 100), max_size=3))
        dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
        loras.append(ToyLora(ranks, alphas, dtype, number))
        weights.append(data.draw(st.floats(0.01, 10)))
    paths = [lora.save(tmp_path / f"{number}.safetensors") for number, lora in enumerate(loras)]
    dtype_name = data.draw(st.sampled_from(["fp32", "fp16", "bf16"]))
    out = tmp_path / "out.safetensors"
    merge(*paths, out=out, weights=weights, dtype=dtype_name, overwrite=True)  # type: ignore[arg-type]
    expected = summed(*zip(loras, weights, strict=True))
    found = updates_in(out)
    assert found.keys() == expected.keys()
    updates = [lora.updates() for lora in loras]
    for module in expected:
        # Both factors are rounded; what cancels between LoRAs does not make the rounding smaller.
        sizes = sum(
            weight * update[module].norm() for update, weight in zip(updates, weights, strict=True) if module in update
        )
        assert (found[module] - expected[module]).norm() <= 3 * UNITS[dtype_name] * sizes


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_rounding_of_a_cast_is_stated(two: tuple[ToyLora, ToyLora, Path, Path], tmp_path: Path, dtype: Any) -> None:
    a, b, *paths = two
    report = merge(*paths, out=tmp_path / "out.safetensors", dtype=dtype)
    assert report.largest_relative_error is not None
    assert UNITS[dtype] / 10 < report.largest_relative_error < UNITS[dtype]
    assert_adds(tmp_path / "out.safetensors", summed((a, 1), (b, 1)), 2 * UNITS[dtype])


def test_any_layouts_can_be_merged(tmp_path: Path) -> None:
    """A SAT checkpoint with alpha 2 in its configuration, ComfyUI's alpha tensors, and diffusers' header."""
    state = sat_state_dict(TOY_2B, 4, torch.float32, base="none")
    run = save_run(tmp_path / "run", sat_checkpoint(state), rank=4, alpha=2).parents[1]
    lora = ToyLora(attention(4), seed=3)
    paths_in_comfy = {m: f"diffusion_model.blocks.{m.layer}.{COMFYUI.get(m.name, m.name)}" for m in lora.ranks}
    comfy = {f"{paths_in_comfy[name.module]}.lora_{name.part}.weight": t for name, t in lora.factors().items()}
    comfy |= {f"{path}.alpha": torch.tensor(8.0) for path in paths_in_comfy.values()}
    save_file(comfy, tmp_path / "comfy.safetensors")
    own = lora.save(tmp_path / "own.safetensors")
    report = merge(run, tmp_path / "comfy.safetensors", own, out=tmp_path / "out")
    assert [(found.layout, found.alpha, found.scaling) for found in report.loras] == [
        ("sat", 2, 0.5),
        ("comfyui", 8, 2),
        ("diffusers", 4, 1),
    ]
    expected = {module: 3 * update for module, update in lora.updates().items()}
    for layer in range(3):
        attn = f"model.diffusion_model.transformer.layers.{layer}.attention"
        places = {name: f"query_key_value.{{}}.{part}" for part, name in enumerate("qkv")} | {"out": "dense.{}.0"}
        for name, place in places.items():
            a, b = (state[f"{attn}.{place.format(f'matrix_{part}')}"].double() for part in "AB")
            expected[Module(layer, name)] = expected[Module(layer, name)] + 0.5 * b @ a
    assert_adds(tmp_path / "out" / FILE_NAME, expected, 1e-7)


def test_the_record_names_the_loras_their_scalings_and_weights(
    two: tuple[ToyLora, ToyLora, Path, Path], tmp_path: Path
) -> None:
    *_, first, second = two
    merge(first, second, out=tmp_path / "out.safetensors", weights=(0.5, 2))
    assert record(tmp_path / "out.safetensors") == {
        "version": cogtools.__version__,
        "models": [],
        "transformer_layers": 3,
        "hidden_size": 128,
        "format": "diffusers",
        "scale": "fold",
        "dtype": "float32",
        "merged": [
            {"source": "a.safetensors", "weight": 0.5, "scaling": 0.5, "alpha": 2,
             "alpha_source": "lora_adapter_metadata", "ema": None, "iteration": None},
            {"source": "b.safetensors", "weight": 2, "scaling": 1, "alpha": None,
             "alpha_source": "lora_adapter_metadata", "ema": None, "iteration": None},
        ],
    }  # fmt: skip


def test_a_merged_lora_can_be_merged_again(two: tuple[ToyLora, ToyLora, Path, Path], tmp_path: Path) -> None:
    a, b, first, second = two
    both = tmp_path / "both.safetensors"
    merge(first, second, out=both)
    merge(both, first, out=tmp_path / "out.safetensors", weights=(1, -1))
    found, expected = updates_in(tmp_path / "out.safetensors"), summed((a, 0), (b, 1))
    assert max(float((found[module] - expected[module]).norm()) for module in expected) < 1e-6


# A lower rank


@pytest.mark.slow
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ranks=st.tuples(st.integers(1, 20), st.integers(1, 20)), weight=st.floats(0.1, 5), data=st.data())
def test_a_lower_rank_is_as_near_as_that_rank_can_come(
    tmp_path: Path, ranks: tuple[int, int], weight: float, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, sum(ranks) - 1))
    a, b = (ToyLora(attention(r), seed=seed) for seed, r in enumerate(ranks))
    out = tmp_path / "out.safetensors"
    paths = a.save(tmp_path / "a.safetensors"), b.save(tmp_path / "b.safetensors")
    report = merge(*paths, out=out, weights=(1, weight), rank=rank, overwrite=True)
    assert report.rank == rank
    assert report.lost is not None
    stated = {Module(loss.layer, loss.name): loss.lost for loss in report.lost.modules}
    found, squares = updates_in(out), torch.zeros(2, dtype=torch.float64)
    for module, update in summed((a, 1), (b, weight)).items():
        singular = torch.linalg.svdvals(update)
        least = float(singular[rank:].norm() / singular.norm())  # Eckart and Young
        assert relative_error(found[module], update) == pytest.approx(least, abs=1e-6)
        assert stated[module] == pytest.approx(least, abs=1e-9)
        squares += torch.stack([singular[rank:].square().sum(), singular.square().sum()])
    assert report.lost.lost == pytest.approx(float((squares[0] / squares[1]).sqrt()), abs=1e-9)


def test_both_factors_of_a_lower_rank_are_of_one_size_and_alpha_is_the_rank(tmp_path: Path) -> None:
    paths = [ToyLora(attention(8), seed=seed).save(tmp_path / f"{seed}.safetensors") for seed in (1, 2)]
    merge(*paths, out=tmp_path / "out.safetensors", rank=5)
    tensors = load_file(tmp_path / "out.safetensors")
    for key, tensor in tensors.items():
        if ".lora_A." in key:
            assert tensor.shape == (5, 128)
            assert tensor.norm() == pytest.approx(float(tensors[key.replace("lora_A", "lora_B")].norm()), rel=1e-5)
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        stated = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (stated["transformer.r"], stated["transformer.lora_alpha"]) == (5, 5)
    assert record(tmp_path / "out.safetensors")["cut_to"] == 5
    assert verify_lora(tmp_path / "out.safetensors").verdict == "pass"


def test_modules_of_a_lower_rank_stay_as_they_are(tmp_path: Path) -> None:
    lora = ToyLora({**attention(2), Module(None, "time_1"): 9})
    report = export_lora(lora.save(tmp_path / "a.safetensors"), tmp_path / "out.safetensors", rank=3)
    assert (report.rank, [loss.lost > 0.1 for loss in report.lost.modules if loss.name == "time_1"]) == (None, [True])  # type: ignore[union-attr]
    found, expected = updates_in(tmp_path / "out.safetensors"), lora.updates()
    for module in attention(2):
        assert relative_error(found[module], expected[module]) < 1e-7


def test_a_rank_above_what_a_module_can_have_is_that(tmp_path: Path) -> None:
    """proj_out has 64 rows: its update has no higher rank."""
    wide = {**attention(100), Module(None, "proj_out"): 100}
    lora = ToyLora(wide)
    report = export_lora(lora.save(tmp_path / "a.safetensors"), tmp_path / "out.safetensors", rank=80)
    tensors = load_file(tmp_path / "out.safetensors")
    assert tensors["transformer.proj_out.lora_A.weight"].shape == (64, 128)
    assert_adds_module(tmp_path / "out.safetensors", lora, Module(None, "proj_out"))
    assert report.rank is None


def assert_adds_module(path: Path, lora: ToyLora, module: Module) -> None:
    assert relative_error(updates_in(path)[module], lora.updates()[module]) < 1e-6


def test_export_lora_cuts_one_lora_to_a_lower_rank(run_folder: Path, tmp_path: Path) -> None:
    report = export_lora(run_folder, tmp_path / "whole", scale="fold", dtype="fp32")
    whole = updates_in(tmp_path / "whole" / FILE_NAME)
    report = export_lora(run_folder, tmp_path / "cut", rank=2)
    assert (report.rank, report.scaling, report.scale, report.dtype) == (2, 0.25, "fold", "float16")
    for module, update in updates_in(tmp_path / "cut" / FILE_NAME).items():
        singular = torch.linalg.svdvals(whole[module])
        least = float(singular[2:].norm() / singular.norm())
        assert relative_error(update, whole[module]) == pytest.approx(least, abs=1e-3)
    assert verify_lora(tmp_path / "cut").verdict == "pass"


# What cannot be merged


def failure(*paths: Path, **options: Any) -> CogtoolsError:
    out = paths[0].parent / "refused"
    with pytest.raises(CogtoolsError) as raised:
        merge(*paths, out=out, **options)
    assert not out.exists()
    return raised.value


def test_one_lora_alone_is_for_export_lora(two: tuple[ToyLora, ToyLora, Path, Path]) -> None:
    error = failure(two[2])
    assert isinstance(error, OptionError)
    assert error.hint is not None
    assert error.hint.command == f"cogtools export-lora {two[2]} OUT_DIR"


def test_a_weight_for_each_lora(two: tuple[ToyLora, ToyLora, Path, Path]) -> None:
    *_, first, second = two
    error = failure(first, second, weights=(1.0,))
    assert (error.found, error.expected) == ("1 weight", f"2, for {first}, {second}")
    assert failure(first, second, weights=(1.0, 0.0)).found == "0.0"
    assert failure(first, second, weights=(1.0, float("nan"))).found == "nan"


def test_several_loras_state_their_own_scales(two: tuple[ToyLora, ToyLora, Path, Path], tmp_path: Path) -> None:
    *_, first, second = two
    assert "--alpha is that of one LoRA" in failure(first, second, alpha=2).what
    silent = tmp_path / "silent.safetensors"
    save_file(load_file(first), silent)
    error = failure(second, silent)
    assert (error.what, error.file) == (
        "nothing states the scale of this LoRA, and each of several has to state its own",
        str(silent),
    )


def test_loras_of_different_models_are_not_merged(tmp_path: Path) -> None:
    first = ToyLora(attention(2)).save(tmp_path / "a.safetensors")
    state = {
        f"transformer.transformer_blocks.{layer}.attn1.to_{name}.lora_{part}.weight": torch.ones(
            (2, 1920) if part == "A" else (1920, 2)
        )
        for layer in range(30)
        for name in ("q", "k", "v", "out.0")
        for part in "AB"
    }
    save_file(state, tmp_path / "2b.safetensors", metadata={"cogtools": json.dumps({"scale": "none", "alpha": 1})})
    error = failure(first, tmp_path / "2b.safetensors")
    assert (error.what, error.found) == ("these LoRAs are of different models", "CogVideoX-2B")


def test_biases_and_magnitude_vectors_are_refused_by_name(
    two: tuple[ToyLora, ToyLora, Path, Path], tmp_path: Path
) -> None:
    *_, first, second = two
    for end, size in (("lora_B.bias", 128), ("lora_magnitude_vector", 128)):
        tensors = load_file(first)
        keys = tuple(f"transformer.transformer_blocks.{layer}.attn1.to_k.{end}" for layer in range(3))
        with safe_open(first, "pt") as file:
            metadata = file.metadata()
        save_file(
            {**tensors, **{key: torch.ones(size) for key in keys}}, tmp_path / "more.safetensors", metadata=metadata
        )
        error = failure(tmp_path / "more.safetensors", second)
        assert "biases, or with magnitude vectors (DoRA), cannot be merged" in error.what
        assert [problem.keys for problem in error.problems] == [keys]
        with pytest.raises(CogtoolsError, match=r"cannot be (merged|cut)"):
            export_lora(tmp_path / "more.safetensors", tmp_path / "cut.safetensors", rank=1)


def test_what_is_neither_a_lora_nor_base_weights_is_named(
    two: tuple[ToyLora, ToyLora, Path, Path], tmp_path: Path
) -> None:
    save_file({"encoder.conv_in.conv.weight": torch.ones(2)}, tmp_path / "vae.safetensors")
    error = failure(two[2], tmp_path / "vae.safetensors")
    assert isinstance(error, ExportError)
    assert error.found == "a VAE (1 tensor)"


@pytest.mark.parametrize("rank", [0, -1, 4, 100])
def test_a_rank_that_cuts_nothing_is_an_error(run_folder: Path, tmp_path: Path, rank: int) -> None:
    with pytest.raises(OptionError, match=f"cannot be cut down to rank {rank}"):
        export_lora(run_folder, tmp_path / "out", rank=rank)
    assert not (tmp_path / "out").exists()


def test_a_cut_lora_has_its_scale_multiplied_in(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--scale none does not go with --rank"):
        export_lora(run_folder, tmp_path / "out", rank=2, scale="none")


def test_values_that_are_not_finite_cannot_be_cut(tmp_path: Path) -> None:
    lora = ToyLora(attention(4)).save(tmp_path / "a.safetensors")
    tensors = load_file(lora)
    tensors["transformer.transformer_blocks.1.attn1.to_k.lora_A.weight"][2, 3] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(ExportError, match="not finite cannot be cut"):
        export_lora(tmp_path / "nan.safetensors", tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_values_that_do_not_fit_are_an_error(two: tuple[ToyLora, ToyLora, Path, Path]) -> None:
    *_, first, second = two
    error = failure(first, second, weights=(1e16, 1), dtype="fp16")
    assert "does not fit into float16" in error.what


def test_an_output_that_is_there_is_not_replaced_unasked(
    two: tuple[ToyLora, ToyLora, Path, Path], tmp_path: Path
) -> None:
    *_, first, second = two
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        merge(first, second, out=out)
    assert out.read_bytes() == b"mine"
    merge(first, second, out=out, overwrite=True)
    with pytest.raises(OutputError, match="would replace the checkpoint"):
        merge(first, second, out=first, overwrite=True)


# The command


def test_the_command_merges(
    two: tuple[ToyLora, ToyLora, Path, Path], tmp_path: Path, cogtools_cli: CommandLine
) -> None:
    *_, first, second = two
    out = tmp_path / "out.safetensors"
    words = ["merge", first, second, out, "--weight", "0.5", "--weight", "2", "--rank", "7", "--json"]
    result = cogtools_cli(*words)
    report = merge(first, second, out=tmp_path / "again.safetensors", weights=(0.5, 2), rank=7)
    assert result.code == 0
    assert result.json["report"]["lost"]["lost"] == report.lost.lost  # type: ignore[union-attr]
    assert out.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    assert cogtools_cli(*words).json["error"]["what"] == "the output exists already"
    shown = cogtools_cli("merge", first, second, out, "--overwrite").out
    assert "merged    a LoRA, 16 modules, rank different by module, scaling 1" in shown
    assert cogtools_cli("merge", first, second, out, "--overwrite", "--quiet").out == ""


def test_a_dry_run_writes_nothing_and_does_not_import_torch(
    two: tuple[ToyLora, ToyLora, Path, Path], tmp_path: Path
) -> None:
    *_, first, second = two
    assert "torch" not in imported_by("merge", first, second, tmp_path / "out", "--dry-run", "--quiet")
    assert not (tmp_path / "out").exists()


def test_an_empty_argument_is_not_taken_for_the_current_folder(cogtools_cli: CommandLine, tmp_path: Path) -> None:
    result = cogtools_cli("merge", "", tmp_path / "out")
    assert (result.code, result.err.partition("\n")[0]) == (2, "error: an argument of merge is empty")


def test_without_arguments_the_usage_is_named(cogtools_cli: CommandLine, tmp_path: Path) -> None:
    assert cogtools_cli("merge").code == 2
    assert "takes at least one checkpoint" in cogtools_cli("merge", tmp_path).err
