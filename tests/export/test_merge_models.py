"""LoRAs are added to base weights as SAT adds its own: in single precision, rounded once, all else byte for byte."""

import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

import cogtools
from cogtools.conversion.output import GrowingFile
from cogtools.errors import CheckpointError, CogtoolsError, ExportError, OptionError, OutputError
from cogtools.export.merge import MergeReport, _other_models, merge
from cogtools.layouts import diffusers, family
from cogtools.layouts.family import Module, recognise
from tests.support.command_line import CommandLine, imported_by
from tests.support.factories import (
    TOY_1_5_5B,
    TOY_1_5_5B_I2V,
    TOY_2B,
    TOY_5B,
    TOY_5B_I2V,
    SatModel,
    sat_checkpoint,
    sat_state_dict,
    save_run,
)
from tests.support.models import load_folder, save_model_run, save_tokenizer, without_a_word
from tests.support.toy_loras import ToyLora, attention, every_module

MODELS = (TOY_2B, TOY_5B, TOY_5B_I2V, TOY_1_5_5B, TOY_1_5_5B_I2V)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
PREFIX = "model.diffusion_model."

Tensors = dict[str, torch.Tensor]


def toy_lora(model: SatModel, rank: int, seed: int, dtype: torch.dtype = torch.float32, size: float = 0.02) -> ToyLora:
    """A LoRA of every module of a toy."""
    channels = model.patch[0] if len(model.patch) == 3 else None
    flat = model.patch[0] * 4 if channels else model.patch[0]
    ranks = every_module(rank, ofs=model.ofs_embed_dim is not None)
    sizes = {"patch_in": flat, "patch_out": model.output_rows}
    return ToyLora(ranks, dict.fromkeys(ranks, rank / 4), dtype, seed, size, sizes, channels)


def as_sat_adds(base: Mapping[str, torch.Tensor], *loras: tuple[ToyLora, float]) -> Tensors:
    """diffusers' tensors with LoRAs added: SAT's formula for one, and for several their sum in single precision."""
    found = dict(base)
    deltas: dict[Module, torch.Tensor] = {}
    for lora, weight in loras:
        factors = lora.factors()
        for module in lora.ranks:
            a, b = (factors[key].float().flatten(1) for key in sorted(k for k in factors if k.module == module))
            delta = b @ a * (lora.scaling(module) * weight)
            deltas[module] = deltas[module] + delta if module in deltas else delta
    for module, delta in deltas.items():
        key = f"{diffusers.module_path(module)}.weight"
        found[key] = (base[key] + delta.view_as(base[key])).to(base[key].dtype)
    return found


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def transformer(out: Path) -> Tensors:
    return load_folder(out / "transformer")


def sat_weights(out: Path) -> Tensors:
    loaded: Tensors = torch.load(out / "1/mp_rank_00_model_states.pt", weights_only=True)["module"]
    return loaded


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training's folder with a toy of 2B in fp16, without a LoRA."""
    return save_model_run(tmp_path_factory.mktemp("base") / "run", TOY_2B)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a LoRA of rank 4."""
    return save_model_run(tmp_path_factory.mktemp("trained") / "run", TOY_2B, rank=4)


# The sums


@pytest.mark.parametrize("form", ["diffusers", "sat"])
@pytest.mark.parametrize("name", ["2b-fp16", "2b-fp32", "5b-bf16", "2b-bf16-plain"])
def test_a_checkpoint_with_its_own_lora_gives_what_sat_merges_bit_for_bit(
    name: str, form: Any, real: Path, truth: Path, tmp_path: Path
) -> None:
    merge(real / name, out=tmp_path, format=form)
    for key, expected in load_file(truth / f"real-{name}" / "merged_by_sat.safetensors").items():
        if form == "sat":
            found = sat_weights(tmp_path)[PREFIX + key]
        else:
            layer, _, projection, _ = key.removeprefix("transformer.layers.").split(".")
            names = ("to_q", "to_k", "to_v") if projection == "query_key_value" else ("to_out.0",)
            weights = transformer(tmp_path)
            found = torch.cat([weights[f"transformer_blocks.{layer}.attn1.{part}.weight"] for part in names])
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected), key


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_loras_of_every_module_are_added_as_sat_adds_them(model: SatModel, dtype: str, tmp_path: Path) -> None:
    run = save_model_run(tmp_path / "run", model, dtype=DTYPES[dtype])
    cogtools.export_model(run, tmp_path / "base")
    first, second = toy_lora(model, 4, 1), toy_lora(model, 3, 2, DTYPES[dtype])
    paths = first.save(tmp_path / "first.safetensors"), second.save(tmp_path / "second.safetensors")
    report = merge(run, *paths, out=tmp_path / "out", weights=(0.5, -2))
    assert_same(transformer(tmp_path / "out"), as_sat_adds(transformer(tmp_path / "base"), (first, 0.5), (second, -2)))
    assert (report.modules, report.dtype) == (len(first.ranks), str(DTYPES[dtype]).removeprefix("torch."))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_to_merge_and_to_convert_give_the_same_in_any_order(model: SatModel, tmp_path: Path) -> None:
    """From SAT to diffusers and merged there, merged on the way, merged in SAT and converted then."""
    run = save_model_run(tmp_path / "run", model, dtype=torch.bfloat16)
    lora = toy_lora(model, 4, 1).save(tmp_path / "lora.safetensors")
    cogtools.export_model(run, tmp_path / "base")
    merge(run, lora, out=tmp_path / "at once")
    merge(tmp_path / "base/transformer", lora, out=tmp_path / "after")
    merge(run, lora, out=tmp_path / "in sat", format="sat")
    (tmp_path / "in sat/training_config.yaml").write_bytes((run / "training_config.yaml").read_bytes())
    cogtools.export_model(tmp_path / "in sat", tmp_path / "converted")
    merge(tmp_path / "base/transformer", lora, out=tmp_path / "to sat", format="sat")
    at_once = transformer(tmp_path / "at once")
    assert_same(transformer(tmp_path / "after"), at_once)
    assert_same(transformer(tmp_path / "converted"), at_once)
    in_sat, to_sat = sat_weights(tmp_path / "in sat"), sat_weights(tmp_path / "to sat")
    made_up = {key for key in in_sat.keys() | to_sat.keys() if "position_embeddings" in key or "freqs_" in key}
    made_up |= {key for key in in_sat.keys() ^ to_sat.keys() if "pos_embedding" in key}
    assert in_sat.keys() - made_up == to_sat.keys() - made_up
    assert all(torch.equal(in_sat[key], to_sat[key]) for key in in_sat.keys() - made_up)
    configs = [(tmp_path / name / "transformer/config.json").read_text() for name in ("base", "at once", "after")]
    assert len(set(configs)) == 1


def test_a_lora_of_some_modules_leaves_the_rest_as_it_is(base: Path, tmp_path: Path) -> None:
    lora = ToyLora({Module(layer, name): 2 for layer in range(3) for name in ("k", "norm2")})
    path = lora.save(tmp_path / "lora.safetensors")
    cogtools.export_model(base, tmp_path / "base")
    merge(base, path, out=tmp_path / "out")
    assert_same(transformer(tmp_path / "out"), as_sat_adds(transformer(tmp_path / "base"), (lora, 1)))
    merge(base, path, out=tmp_path / "sat", format="sat")
    key = f"{PREFIX}transformer.layers.1.attention.query_key_value.weight"
    before, after = (torch.load(base / "1000/mp_rank_00_model_states.pt", weights_only=False)["module"][key],
                     sat_weights(tmp_path / "sat")[key])  # fmt: skip
    assert [torch.equal(old, new) for old, new in zip(before.chunk(3), after.chunk(3), strict=True)] == [
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("block", [1, 7, 100])
def test_blocks_of_any_size_give_the_same_bits(
    block: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = toy_lora(TOY_2B, 5, 3).save(tmp_path / "lora.safetensors")
    merge(base, lora, out=tmp_path / "whole")
    monkeypatch.setattr("cogtools.conversion.arithmetic.BLOCK_ROWS", block)
    merge(base, lora, out=tmp_path / "blocks")
    whole, blocks = transformer(tmp_path / "whole"), transformer(tmp_path / "blocks")
    if block > 1:  # a single row is another operation, which may add up in another order
        assert_same(blocks, whole)
    assert max(float((blocks[key].float() - whole[key].float()).abs().max()) for key in whole) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_peft_merges_the_same_but_for_its_rounding(dtype: str, tmp_path: Path) -> None:
    run = save_model_run(tmp_path / "run", TOY_2B, dtype=DTYPES[dtype])
    lora = ToyLora(attention(4), dtype=DTYPES[dtype], seed=1).save(tmp_path / "lora" / diffusers.FILE_NAME)
    cogtools.export_model(run, tmp_path / "base")
    merge(run, lora, out=tmp_path / "out")
    model = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "base/transformer").to(DTYPES[dtype])
    pipeline = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=model, scheduler=None)
    pipeline.load_lora_weights(str(lora.parent))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    ours, theirs, before = transformer(tmp_path / "out"), model.state_dict(), transformer(tmp_path / "base")
    unit = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7}[dtype]
    for key, tensor in theirs.items():
        found, expected = ours[key].double(), tensor.double()
        delta = (found - before[key].double()).abs()
        # It rounds the update before it adds it: by half a unit of it, and half a unit of the sum more.
        assert bool(((found - expected).abs() <= unit * (found.abs() + delta) + 1e-7).all()), key


# What is lost in the rounding


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_lost_of_the_lora_is_stated_by_module_and_in_all(dtype: str, tmp_path: Path) -> None:
    run = save_model_run(tmp_path / "run", TOY_2B, dtype=DTYPES[dtype])
    lora = toy_lora(TOY_2B, 4, 1, size=0.002)
    cogtools.export_model(run, tmp_path / "base")
    report = merge(run, lora.save(tmp_path / "lora.safetensors"), out=tmp_path / "out")
    before, after = transformer(tmp_path / "base"), transformer(tmp_path / "out")
    errors, norms = {}, {}
    for module, update in lora.updates().items():
        key = f"{diffusers.module_path(module)}.weight"
        change = (after[key].double() - before[key].double()).flatten(1)
        errors[module], norms[module] = float((change - update).norm()), float(update.norm())
    assert report.lost is not None
    stated = {loss.module: loss.lost for loss in report.lost.modules}
    assert stated == pytest.approx({module: errors[module] / norms[module] for module in errors}, rel=1e-3, abs=1e-6)
    total = sum(error**2 for error in errors.values()) ** 0.5 / sum(norm**2 for norm in norms.values()) ** 0.5
    assert report.lost.lost == pytest.approx(total, rel=1e-3, abs=1e-6)
    warned = [text for text in report.notices if "of the LoRA is lost" in text]
    assert len(warned) == (report.lost.lost > 0.1)
    assert (dtype == "bf16") == bool(warned)


def test_a_weak_lora_is_lost_in_bf16_and_kept_in_fp32(tmp_path: Path, cogtools_cli: CommandLine) -> None:
    run = save_model_run(tmp_path / "run", TOY_5B, dtype=torch.bfloat16)
    lora = toy_lora(TOY_5B, 4, 1, size=1e-4).save(tmp_path / "lora.safetensors")
    words = ["merge", run, lora, tmp_path / "out", "--overwrite"]
    result = cogtools_cli(*words)
    assert result.code == 0
    assert "of the LoRA is lost where the weights are rounded to bfloat16" in result.err
    assert "--dtype fp32" in result.err
    kept = cogtools_cli(*words, "--dtype", "fp32")
    assert "is lost" not in kept.err
    assert "% of the LoRA, in the rounding" in kept.out


# Other dtypes


def test_a_cast_rounds_every_tensor_once(base: Path, tmp_path: Path) -> None:
    lora = toy_lora(TOY_2B, 4, 1)
    path = lora.save(tmp_path / "lora.safetensors")
    cogtools.export_model(base, tmp_path / "base")
    before = transformer(tmp_path / "base")
    wide = as_sat_adds({key: tensor.float() for key, tensor in before.items()}, (lora, 1))
    for dtype in ("fp32", "bf16"):
        report = merge(base, path, out=tmp_path / dtype, dtype=dtype)
        found = transformer(tmp_path / dtype)
        assert_same(found, {key: tensor.to(DTYPES[dtype]) for key, tensor in wide.items()})
        assert report.dtype == str(DTYPES[dtype]).removeprefix("torch.")
    assert_same(load_folder(tmp_path / "bf16/vae"), load_folder(tmp_path / "base/vae"))


def test_what_does_not_fit_into_fp16_is_an_error(tmp_path: Path) -> None:
    state = sat_state_dict(TOY_2B, None, torch.float32)
    state[f"{PREFIX}transformer.layers.1.attention.dense.weight"][3] = 65500
    run = save_model_run(tmp_path / "run", TOY_2B, state=state)
    lora = ToyLora(attention(4), dict.fromkeys(attention(4), 4e5)).save(tmp_path / "lora.safetensors")
    error = failure(run, lora, dtype="fp16")
    assert isinstance(error, ExportError)
    assert "does not fit into float16" in error.what
    assert error.expected == "at most 6.55e+04"
    assert error.hint is not None
    assert "--dtype fp32 or bf16" in str(error.hint)


# The rest of the model


def test_every_other_part_is_what_export_model_writes(trained: Path, tmp_path: Path) -> None:
    cogtools.export_model(trained, tmp_path / "base")
    report = merge(trained, out=tmp_path / "out")
    for part in ("vae", "text_encoder", "scheduler"):
        names = sorted(path.name for path in (tmp_path / "base" / part).iterdir())
        assert names == sorted(path.name for path in (tmp_path / "out" / part).iterdir())
        for name in names:
            assert (tmp_path / "out" / part / name).read_bytes() == (tmp_path / "base" / part / name).read_bytes()
    assert report.exported is not None
    assert [part.name for part in report.exported.parts] == ["transformer", "vae", "text_encoder", "scheduler"]
    assert report.exported.lora_tensors == 0


def test_a_lora_of_another_model_of_the_same_sizes_is_warned_of(tmp_path: Path) -> None:
    of_5b, of_5b_i2v = next(model for model in family.MODELS if model.slug == "5b"), (3072, 32, 2, 2)
    lora = SimpleNamespace(
        plan=SimpleNamespace(
            transformer=recognise(3072, 42, of_5b_i2v),
            lora=SimpleNamespace(checkpoint=SimpleNamespace(path=tmp_path / "a.pt")),
        )
    )
    warned = _other_models([cast("Any", lora)], of_5b)
    assert warned == [f"{tmp_path / 'a.pt'} was trained on CogVideoX-5B-I2V, and the base is CogVideoX-5B."]
    lora.plan.transformer = recognise(3072, 42, None)  # any of its size
    assert _other_models([cast("Any", lora)], of_5b) == []


def test_what_it_says_names_its_own_options_only(tmp_path: Path, cogtools_cli: CommandLine) -> None:
    run = save_model_run(tmp_path / "run", TOY_2B, rank=4, dtype=torch.float16)
    result = cogtools_cli("merge", run, tmp_path / "out")
    assert "The VAE is the trainer's copy, in float16." in result.err
    own = set(re.findall(r"--[a-z-]+", cogtools_cli("merge", "--help").out))
    said = {option for line in (result.out + result.err).splitlines() if "cogtools verify" not in line
            for option in re.findall(r"--[a-z-]+", line)}  # fmt: skip
    assert said <= own


def test_a_pipeline_is_merged_as_a_whole_and_runs(trained: Path, tmp_path: Path) -> None:
    """The other parts are copies, the scheduler and the index too; diffusers loads it without a warning."""
    save_tokenizer(tmp_path / "parts/tokenizer")
    (tmp_path / "parts/model_index.json").write_text("{}")
    cogtools.export_model(trained, tmp_path / "pipeline", base=tmp_path / "parts")
    scheduler = tmp_path / "pipeline/scheduler/scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"snr_shift_scale": 3.0', '"snr_shift_scale": 2.5'))
    lora = toy_lora(TOY_2B, 4, 1)
    report = merge(tmp_path / "pipeline", lora.save(tmp_path / "lora.safetensors"), out=tmp_path / "out")
    assert report.exported is not None
    assert report.exported.pipeline
    for path in (tmp_path / "pipeline").rglob("*"):
        inside = path.relative_to(tmp_path / "pipeline")
        if path.is_file() and path.name != "cogtools.json" and inside.parts[0] != "transformer":
            assert (tmp_path / "out" / inside).read_bytes() == path.read_bytes(), inside
    assert_same(transformer(tmp_path / "out"), as_sat_adds(transformer(tmp_path / "pipeline"), (lora, 1)))
    with without_a_word():
        pipeline = CogVideoXPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline(
        "a cat", num_inference_steps=2, num_frames=9, height=64, width=64, max_sequence_length=16, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    assert bool(torch.isfinite(torch.as_tensor(video)).all())


def test_the_record_names_base_loras_scalings_and_weights(base: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    lora = ToyLora(attention(4), dict.fromkeys(attention(4), 2.0)).save(tmp_path / "style.safetensors")
    merge(base, lora, out=tmp_path / "out", weights=(0.5,), dtype="fp32")
    with safe_open(tmp_path / "out/transformer/diffusion_pytorch_model.safetensors", "pt") as file:
        record = __import__("json").loads(file.metadata()["cogtools"])
    assert record == {
        "version": cogtools.__version__,
        "source": "mp_rank_00_model_states.pt",
        "part": "transformer",
        "model": "2b",
        "iteration": 1000,
        "ema": False,
        "dtype": "float32",
        "merged": [
            {"source": "style.safetensors", "weight": 0.5, "scaling": 0.5, "alpha": 2, "ema": None, "iteration": None,
             "alpha_source": "lora_adapter_metadata"}
        ],
    }  # fmt: skip


# Which argument is what


def test_the_models_own_lora_is_left_out_where_others_are_given(trained: Path, tmp_path: Path) -> None:
    lora = ToyLora(attention(2))
    path = lora.save(tmp_path / "lora.safetensors")
    cogtools.export_model(trained, tmp_path / "base")
    for number, paths in enumerate([(trained, path), (path, trained)]):
        report = merge(*paths, out=tmp_path / str(number))
        assert_same(transformer(tmp_path / str(number)), as_sat_adds(transformer(tmp_path / "base"), (lora, 1)))
        left_out = [text for text in report.notices if "holds a LoRA of its own, which is left out" in text]
        assert len(left_out) == 1


def test_of_two_checkpoints_with_loras_the_second_gives_its_lora(base: Path, trained: Path, tmp_path: Path) -> None:
    other = save_model_run(tmp_path / "other", TOY_2B, rank=4, seed=1)
    first, swapped = merge(trained, other, out=tmp_path / "a"), merge(trained, base, out=tmp_path / "b")
    assert (first.base, [lora.file for lora in first.loras]) == (
        trained / "1000/mp_rank_00_model_states.pt", [other / "1000/mp_rank_00_model_states.pt"],
    )  # fmt: skip
    assert (swapped.base, [lora.file for lora in swapped.loras]) == (
        base / "1000/mp_rank_00_model_states.pt", [trained / "1000/mp_rank_00_model_states.pt"],
    )  # fmt: skip


def test_an_alpha_by_hand_and_ema_weights_count_for_the_only_lora(tmp_path: Path) -> None:
    run = save_model_run(tmp_path / "run", TOY_2B, rank=4)
    plain, strong = merge(run, out=tmp_path / "plain"), merge(run, out=tmp_path / "strong", alpha=8)
    assert (plain.loras[0].scaling, strong.loras[0].scaling) == (0.25, 2)
    ema = sat_state_dict(TOY_2B, 4, seed=5)
    (run / "1000-ema").mkdir()
    torch.save(sat_checkpoint(ema), run / "1000-ema/mp_rank_00_model_states.pt")
    report = merge(run, out=tmp_path / "ema", ema=True)
    assert report.base == run / "1000-ema/mp_rank_00_model_states.pt"
    assert any("Took the EMA weights" in text for text in report.notices)


# What cannot be merged


def failure(*paths: Path, **options: Any) -> CogtoolsError:
    out = paths[0].parent / "refused"
    with pytest.raises(CogtoolsError) as raised:
        merge(*paths, out=out, **options)
    assert not out.exists()
    return raised.value


def test_base_weights_alone_are_for_export_model(base: Path, tmp_path: Path, cogtools_cli: CommandLine) -> None:
    for number, path in enumerate((base, save_model_run(tmp_path / "run", TOY_2B))):
        error = failure(path)
        assert isinstance(error, OptionError)
        assert error.hint is not None
        words = shlex.split(str(error.hint.command).replace(" OUT", f" {tmp_path}/out-{number}"))
        assert words[:2] == ["cogtools", "export-model"]
        assert cogtools_cli(*words[1:], "--model", "2b").code == 0


def test_two_models_are_refused(base: Path, tmp_path: Path) -> None:
    other = save_model_run(tmp_path / "other", TOY_5B)
    lora = ToyLora(attention(2)).save(tmp_path / "lora.safetensors")
    assert failure(base, other, lora).what == "there are several models among these, and LoRAs are merged into one"


def test_a_lora_of_another_size_or_module_is_refused_with_all_that_is_wrong(base: Path, tmp_path: Path) -> None:
    sizes = {"time": 512}
    lora = ToyLora({Module(None, "time_1"): 2, Module(None, "ofs_1"): 2}, sizes=sizes).save(tmp_path / "a.safetensors")
    error = failure(base, lora)
    assert error.what == "the LoRA does not fit the base weights"
    assert [(problem.kind, problem.subject, problem.found, problem.expected) for problem in error.problems] == [
        ("shape", "time_1", "512 x 128", "32 x 128, as the base has it"),
        ("unexpected", "ofs_1", "32 x 32", "a module of the base"),
    ]
    deep = ToyLora(attention(2, layers=4)).save(tmp_path / "deep.safetensors")
    assert {problem.kind for problem in failure(base, deep).problems} == {"unexpected"}


def test_parts_of_a_model_are_refused(tmp_path: Path) -> None:
    state = sat_state_dict(TOY_2B, None)
    for key in [key for key in state if ".layers.1.mlp." in key]:
        del state[key]
    run = save_model_run(tmp_path / "run", TOY_2B, state=state)
    error = failure(run, ToyLora(attention(2)).save(tmp_path / "lora.safetensors"))
    assert error.what == "this is not a whole CogVideoX transformer"


@pytest.mark.parametrize("where", ["base", "lora"])
def test_values_that_are_not_finite_are_refused(where: str, tmp_path: Path) -> None:
    state = sat_state_dict(TOY_2B, None)
    lora = ToyLora(attention(2)).save(tmp_path / "lora.safetensors")
    if where == "base":
        state[f"{PREFIX}transformer.layers.2.attention.dense.weight"][1, 2] = float("nan")
    else:
        tensors = load_file(lora)
        tensors["transformer.transformer_blocks.2.attn1.to_out.0.lora_B.weight"][1, 0] = float("inf")
        save_file(tensors, lora, metadata={"lora_adapter_metadata": "{}"})
    run = save_model_run(tmp_path / "run", TOY_2B, state=state)
    error = failure(run, lora, alpha=2)
    assert error.what.startswith("the base has values" if where == "base" else "the LoRA adds values")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"rank": 2}, "--rank is that of a LoRA"),
        ({"format": "comfyui"}, "--format comfyui is for LoRAs"),
        ({"weights": (1, 2)}, "there has to be a --weight for each LoRA"),
        ({"dtype": "fp8"}, "there is no such dtype"),
        ({"iteration": 5}, "there is no iteration 5"),
        ({"model": "6b"}, "there is no such model"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_errors(options: dict[str, Any], what: str, trained: Path) -> None:
    assert what in failure(trained, **options).what


def test_what_is_there_is_not_replaced_unless_cogtools_wrote_it(trained: Path, tmp_path: Path) -> None:
    merge(trained, out=tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        merge(trained, out=tmp_path / "out")
    (tmp_path / "out/transformer/mine").touch()
    with pytest.raises(OutputError):
        merge(trained, out=tmp_path / "out", overwrite=True)
    (tmp_path / "out/transformer/mine").unlink()
    merge(trained, out=tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("damaged", ["base", "lora"])
def test_damage_is_found_in_what_is_added_and_in_what_is_copied(damaged: str, tmp_path: Path) -> None:
    state = sat_state_dict(TOY_2B, 4)
    run = save_model_run(tmp_path / "run", TOY_2B, state=state)
    file = run / "1000/mp_rank_00_model_states.pt"
    key = "transformer.layers.1.mlp.dense_h_to_4h.weight" if damaged == "base" else (
        "transformer.layers.1.attention.dense.matrix_B.0"
    )  # fmt: skip
    content = bytearray(file.read_bytes())
    place = content.index(state[PREFIX + key].numpy().tobytes()[:64])
    content[place] ^= 1
    file.write_bytes(content)
    error = failure(run)
    assert isinstance(error, CheckpointError)
    assert "damaged" in error.what


def test_an_interrupted_merge_leaves_nothing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_files: Callable[[], int]
) -> None:
    written = GrowingFile.write
    calls = []

    def interrupted(self: GrowingFile, data: bytes | memoryview) -> None:
        calls.append(len(data))
        if len(calls) == 12:
            raise KeyboardInterrupt
        written(self, data)

    monkeypatch.setattr(GrowingFile, "write", interrupted)
    before = open_files()
    with pytest.raises(KeyboardInterrupt):
        merge(trained, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert open_files() == before


# The command


def test_the_command_shows_and_reports_the_same(trained: Path, tmp_path: Path, cogtools_cli: CommandLine) -> None:
    result = cogtools_cli("merge", trained, tmp_path / "out", "--json")
    report = result.json["report"]
    assert (result.code, report["result"], report["modules"]) == (0, "model", 12)
    assert len(report["lost"]["modules"]) == 12
    shown = cogtools_cli("merge", trained, tmp_path / "out", "--overwrite")
    for text in ("merged    into 12 modules of the base", "lost      ", "q    ", "CogVideoXPipeline"):
        assert text in shown.out
    error = cogtools_cli("merge", trained, tmp_path / "out", "--json").json["error"]
    assert "exists already" in error["what"]


def test_a_dry_run_shows_the_rows_and_imports_no_torch(
    trained: Path, tmp_path: Path, cogtools_cli: CommandLine
) -> None:
    shown = cogtools_cli("merge", trained, tmp_path / "out", "--dry-run").out
    assert "attention.query_key_value.original.weight[128:256]" in shown
    assert "torch" not in imported_by("merge", trained, tmp_path / "out", "--dry-run", "--quiet")
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_byte(trained: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report: MergeReport = merge(trained, out=tmp_path / "out", progress=lambda *done: seen.append(done))
    assert seen[-1] == (report.size_bytes, report.size_bytes)
    assert report.size_bytes == sum(path.stat().st_size for path in report.files)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_lora_alone_beside_its_run_is_not_a_model(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", sat_checkpoint(sat_state_dict(TOY_2B, 4, base="none")), rank=4)
    assert "a LoRA alone cannot be merged" in failure(run).what
