"""Verifying whole models: what is right passes, and every kind of damage is found by the check that is for it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

import cogtools
from cogtools.verification.positions import grid_of, position_blocks
from tests.support.command_line import CommandLine, imported_by
from tests.support.factories import TOY_2B, TOY_5B, TOY_5B_I2V, TOY_MODELS, SatModel, sat_state_dict
from tests.support.models import save_model_run, save_tokenizer, slug_of, transformer_of, vae_of

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
OF_A_PART = ("files", "config", "keys", "shapes", "dtype", "finite")


def failed(report: cogtools.ModelVerifyReport) -> dict[str, str]:
    return {check.name: check.status for check in report.checks if check.status != "pass"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`, a checkpoint of a toy 5B, and `out`, a whole pipeline of it."""
    folder = tmp_path_factory.mktemp("exported")
    save_model_run(folder / "base-run", TOY_5B, seed=3)
    cogtools.export_model(folder / "base-run", folder / "base")
    save_tokenizer(folder / "base/tokenizer")
    (folder / "base/model_index.json").write_text("{}")
    save_model_run(folder / "run", TOY_5B, rank=4)
    cogtools.export_model(folder / "run", folder / "out", base=folder / "base")
    return folder


@pytest.fixture
def out(exported: Path, tmp_path: Path) -> Path:
    shutil.copytree(exported / "out", tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("model", TOY_MODELS, ids=[slug_of(model) for model in TOY_MODELS])
@pytest.mark.parametrize("size", ["5GB", "300KB"], ids=["one file", "shards"])
def test_what_export_model_wrote_verifies(model: SatModel, size: str, tmp_path: Path) -> None:
    run = save_model_run(tmp_path / "run", model, rank=4)
    cogtools.export_model(run, tmp_path / "out", max_shard_size=size)
    report = cogtools.verify_model(tmp_path / "out", against=run)
    assert failed(report) == {}
    parts = ("transformer", "vae", "text_encoder")
    names = [f"{part} {check}" for part in parts for check in OF_A_PART]
    against = ["transformer against", "transformer against-config", "vae against", "text_encoder against"]
    if model is TOY_2B:
        against.insert(2, "transformer positions")
    assert [check.name for check in report.checks] == [*names, "scheduler", *against]
    assert (report.kind, report.model) == ("parts", model.name.removeprefix("toy "))
    assert report.parts == (*parts, "scheduler")
    for part in parts:
        alone = cogtools.verify_model(tmp_path / "out" / part, against=run)
        assert (alone.kind, failed(alone), alone.parts) == ("part", {}, (part,))


def test_a_whole_pipeline_verifies_and_loads(exported: Path, cogtools_cli: CommandLine) -> None:
    result = cogtools_cli("verify", exported / "out", "--against", exported / "run", "--load")
    assert result.code == 0
    assert result.out.splitlines()[-1] == "verified: all 26 checks passed"
    report = cogtools_cli("verify", exported / "out", "--json").json["report"]
    assert (report["kind"], report["verdict"]) == ("pipeline", "pass")
    assert [check["name"] for check in report["checks"]][-3:] == ["pipeline", "tokenizer", "scheduler"]


def test_a_folder_for_sat_verifies_against_the_pipeline_and_the_first_checkpoint(
    exported: Path, tmp_path: Path
) -> None:
    cogtools.export_model(exported / "out", tmp_path / "sat", format="sat")
    for source in (exported / "out/transformer", exported / "out"):
        report = cogtools.verify_model(tmp_path / "sat", against=source, load=True)
        assert (report.kind, failed(report)) == ("sat", {})
        assert [check.name for check in report.checks] == [
            "transformer files", "transformer keys", "transformer dtype", "transformer finite", "transformer against",
            "load",
        ]  # fmt: skip


def test_a_file_alone_verifies(exported: Path, cogtools_cli: CommandLine, tmp_path: Path) -> None:
    shutil.copy(exported / "out/transformer" / WEIGHTS, tmp_path / "alone.safetensors")
    result = cogtools_cli("verify", tmp_path / "alone.safetensors", "--against", exported / "run")
    assert result.code == 2
    assert "state it with --model" in result.err
    result = cogtools_cli("verify", tmp_path / "alone.safetensors", "--against", exported / "run", "--model", "5b")
    assert result.code == 0
    torch.save({"state_dict": vae_of(sat_state_dict(TOY_2B, None))}, tmp_path / "3d-vae.pt")
    assert cogtools_cli("verify", tmp_path / "3d-vae.pt").out.splitlines()[-1] == "verified: all 5 checks passed"


def test_a_vae_of_its_own_is_held_against_its_own_file(tmp_path: Path) -> None:
    run = save_model_run(tmp_path / "run", TOY_5B)
    torch.save({"state_dict": vae_of(sat_state_dict(TOY_5B, None, torch.float32, seed=9))}, tmp_path / "3d-vae.pt")
    cogtools.export_model(run, tmp_path / "out", vae=tmp_path / "3d-vae.pt")
    report = cogtools.verify_model(tmp_path / "out", against=run)
    assert failed(report) == {"vae against": "skipped"}
    assert next(check.seen for check in report.checks if check.name == "vae against") == (
        "made of 3d-vae.pt, as its record says"
    )
    assert failed(cogtools.verify_model(tmp_path / "out/vae", against=tmp_path / "3d-vae.pt")) == {}
    # Alone it may have been made of a file that has got another name since.
    assert failed(cogtools.verify_model(tmp_path / "out/vae", against=run)) == {"vae against": "fail"}


# Damage


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            content.pop(key)
        else:
            content[key] = value
    path.write_text(json.dumps(content))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


def q_and_k_exchanged(tensors: dict[str, torch.Tensor]) -> None:
    q, k = (f"transformer_blocks.1.attn1.to_{name}.weight" for name in "qk")
    tensors[q], tensors[k] = tensors[k], tensors[q]


def one_bit_flipped(tensors: dict[str, torch.Tensor]) -> None:
    tensors["proj_out.weight"].view(torch.uint8)[3, 5] ^= 1


def runs_exchanged(tensors: dict[str, torch.Tensor]) -> None:
    weight = tensors["transformer_blocks.0.norm1.linear.weight"]
    tensors["transformer_blocks.0.norm1.linear.weight"] = torch.cat(weight.chunk(2)[::-1])


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm_final.bias"][7] = float("nan")


def one_less(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["transformer_blocks.2.ff.net.2.bias"]


def one_more(tensors: dict[str, torch.Tensor]) -> None:
    tensors["patch_embed.pos_embedding"] = torch.zeros(1, 64, 128, dtype=torch.float16)


def transposed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["proj_out.weight"] = tensors["proj_out.weight"].T.contiguous()


def in_single(tensors: dict[str, torch.Tensor]) -> None:
    for key in tensors:
        tensors[key] = tensors[key].float()


def in_whole_numbers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["norm_final.bias"] = torch.zeros(128, dtype=torch.int8)


TENSOR_DAMAGE: list[tuple[Callable[[dict[str, torch.Tensor]], None], set[str]]] = [
    (q_and_k_exchanged, {"transformer against"}),
    (one_bit_flipped, {"transformer against"}),
    (runs_exchanged, {"transformer against"}),
    (not_a_number, {"transformer finite", "transformer against"}),
    (one_less, {"transformer keys", "transformer against"}),
    (one_more, {"transformer keys"}),
    (transposed, {"transformer shapes", "transformer against"}),
    (in_single, {"transformer against"}),
    (in_whole_numbers, {"transformer dtype", "transformer against"}),
]


@pytest.mark.parametrize(("change", "found"), TENSOR_DAMAGE, ids=[change.__name__ for change, _ in TENSOR_DAMAGE])
def test_damage_of_tensors_is_found(
    change: Callable[[dict[str, torch.Tensor]], None], found: set[str], exported: Path, out: Path
) -> None:
    edit_tensors(out / "transformer" / WEIGHTS, change)
    report = cogtools.verify_model(out, against=exported / "run")
    assert failed(report) == dict.fromkeys(found, "fail")
    assert report.verdict == "fail"


def test_a_difference_is_named_by_key_place_and_both_values(exported: Path, out: Path) -> None:
    values: list[float] = []

    def change(tensors: dict[str, torch.Tensor]) -> None:
        values.append(float(tensors["proj_out.weight"][63, 127]))
        tensors["proj_out.weight"][63, 127] = 0.5

    edit_tensors(out / "transformer" / WEIGHTS, change)
    report = cogtools.verify_model(out / "transformer", against=exported / "run")
    (problem,) = next(check.problems for check in report.checks if check.name == "transformer against")
    assert (problem.subject, problem.found, problem.expected) == (
        "proj_out.weight", "0.5 at [63, 127]", f"{values[0]:.6g}, as the checkpoint has it"
    )  # fmt: skip


FILE_DAMAGE: dict[str, tuple[Callable[[Path], Any], dict[str, str]]] = {
    "no config": (
        lambda out: (out / "transformer/config.json").unlink(),
        {"transformer config": "fail", "transformer keys": "skipped"},
    ),
    "config of another class": (
        lambda out: edit_json(out / "vae/config.json", _class_name="AutoencoderKL"),
        {"vae config": "fail"},
    ),
    "more layers in the config": (
        lambda out: edit_json(out / "transformer/config.json", num_layers=4),
        {"transformer keys": "fail", "transformer against-config": "warn"},
    ),
    "other heads in the config": (
        lambda out: edit_json(out / "transformer/config.json", num_attention_heads=4),
        {"transformer shapes": "fail", "transformer against-config": "warn"},
    ),
    "norm_eps": (lambda out: edit_json(out / "transformer/config.json", norm_eps=1e-6), {"transformer config": "warn"}),
    "scaling_factor": (lambda out: edit_json(out / "vae/config.json", scaling_factor=1.1), {"vae config": "warn"}),
    "sample sizes": (
        lambda out: edit_json(out / "transformer/config.json", sample_width=90),
        {"transformer against-config": "warn"},
    ),
    "weights cut short": (
        lambda out: (out / "vae" / WEIGHTS).write_bytes((out / "vae" / WEIGHTS).read_bytes()[:-9]),
        {"vae files": "fail", "vae against": "skipped"},
    ),
    "no weights": (
        lambda out: (out / "text_encoder/model.safetensors").unlink(),
        {"text_encoder files": "fail", "text_encoder against": "skipped"},
    ),
    "an old index": (
        lambda out: (out / "transformer" / INDEX).write_text(
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys(load_file(out / "transformer" / WEIGHTS), WEIGHTS)})
        ),
        {"transformer files": "fail"},
    ),
    "no vocabulary": (lambda out: (out / "tokenizer/tokenizer.json").unlink(), {"tokenizer": "fail"}),
    "no tokenizer": (lambda out: shutil.rmtree(out / "tokenizer"), {"pipeline": "fail", "tokenizer": "fail"}),
    "no text encoder": (lambda out: shutil.rmtree(out / "text_encoder"), {"pipeline": "fail"}),
    "another pipeline": (
        lambda out: edit_json(out / "model_index.json", _class_name="CogVideoXImageToVideoPipeline"),
        {"pipeline": "fail"},
    ),
    "another class": (
        lambda out: edit_json(out / "model_index.json", transformer=["diffusers", "UNet2DModel"]),
        {"pipeline": "fail"},
    ),
    "an index without a part": (
        lambda out: edit_json(out / "model_index.json", vae=None),
        {"pipeline": "fail"},
    ),
    "a scheduler's default": (
        lambda out: edit_json(out / "scheduler/scheduler_config.json", rescale_betas_zero_snr=False),
        {"scheduler": "warn"},
    ),
    "a scheduler without its shift": (
        lambda out: edit_json(out / "scheduler/scheduler_config.json", snr_shift_scale=None),
        {"scheduler": "warn"},
    ),
    "no scheduler_config.json": (
        lambda out: (out / "scheduler/scheduler_config.json").unlink(),
        {"scheduler": "fail"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILE_DAMAGE)
def test_damage_of_files_is_found(name: str, exported: Path, out: Path) -> None:
    change, expected = FILE_DAMAGE[name]
    change(out)
    report = cogtools.verify_model(out, against=exported / "run")
    assert failed(report) == expected
    worst = "fail" if "fail" in expected.values() else "warn"
    assert report.verdict == worst
    assert cogtools.verify_model(out, against=exported / "run", strict=True).verdict == "fail"


def shards(tmp_path: Path, exported: Path) -> Path:
    cogtools.export_model(exported / "run", tmp_path / "sharded", max_shard_size="500KB")
    return tmp_path / "sharded/transformer"


SHARD_DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard is missing": (lambda folder: sorted(folder.glob("*-00002-*"))[0].unlink(), "fail"),
    "no metadata": (lambda folder: edit_json(folder / INDEX, metadata=None), "fail"),
    "another total": (lambda folder: edit_json(folder / INDEX, metadata={"total_size": 5}), "warn"),
    "an old shard": (
        lambda folder: shutil.copy(next(folder.glob("*-00002-*")), folder / WEIGHTS.replace(".", "-00009-of-00009.")),
        "warn",
    ),
    "a tensor that the index does not name": (
        lambda folder: edit_tensors(sorted(folder.glob("*-00001-*"))[0], lambda t: t.update(x=torch.zeros(1))),
        "warn",
    ),
    "a tensor that its shard lacks": (
        lambda folder: edit_tensors(next(folder.glob("*-00001-*")), lambda t: t.__delitem__("patch_embed.proj.bias")),
        "fail",
    ),
    "a single file beside them": (
        lambda folder: shutil.copy(sorted(folder.glob("*-00001-*"))[0], folder / WEIGHTS),
        "fail",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARD_DAMAGE)
def test_damage_of_shards_is_found(name: str, exported: Path, tmp_path: Path) -> None:
    folder = shards(tmp_path, exported)
    assert failed(cogtools.verify_model(folder)) == {}
    change, status = SHARD_DAMAGE[name]
    change(folder)
    assert failed(cogtools.verify_model(folder))["transformer files"] == status


# Positions


@pytest.mark.parametrize("scale", [1.875, 1.0])
def test_computed_positions_are_diffusers(scale: float) -> None:
    config: dict[str, Any] = {
        "num_attention_heads": 3, "num_layers": 1, "sample_width": 12, "sample_height": 8, "sample_frames": 9,
        "max_text_seq_length": 5, "spatial_interpolation_scale": scale, "temporal_interpolation_scale": 1.3,
        "use_rotary_positional_embeddings": False,
    }  # fmt: skip
    expected = CogVideoXTransformer3DModel(**config).patch_embed.pos_embedding[0].numpy()
    grid = grid_of(config)
    assert grid is not None
    found = np.concatenate(list(position_blocks(grid)))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-6


@pytest.mark.parametrize(
    ("change", "status"),
    [({}, None), ({"spatial_interpolation_scale": 1.0}, "fail"), ({"sample_width": 16, "sample_height": 4}, "fail"),
     ({"sample_width": 10}, "fail"), ({"sample_frames": "9"}, "fail")],
)  # fmt: skip
def test_the_positions_of_a_2b_prove_the_sizes(change: dict[str, object], status: str | None, tmp_path: Path) -> None:
    state = sat_state_dict(TOY_2B, None, torch.float32)
    key = "model.diffusion_model.mixins.pos_embed.pos_embedding"
    built = CogVideoXTransformer3DModel(
        num_attention_heads=2, num_layers=1, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=16
    )
    state[key] = built.patch_embed.pos_embedding.clone()
    run = save_model_run(tmp_path / "run", TOY_2B, state=state)
    cogtools.export_model(run, tmp_path / "out")
    edit_json(tmp_path / "out/transformer/config.json", **change)
    found = failed(cogtools.verify_model(tmp_path / "out/transformer", against=run))
    assert found.get("transformer positions") == status


# Loading


def test_what_the_libraries_warn_of_is_found(out: Path) -> None:
    edit_tensors(out / "transformer" / WEIGHTS, one_less)
    edit_tensors(out / "vae" / WEIGHTS, lambda tensors: tensors.update(x=torch.zeros(1)))
    (out / "tokenizer/tokenizer.json").unlink()
    edit_json(out / "scheduler/scheduler_config.json", unknown_field=1)
    report = cogtools.verify_model(out, load=True)
    (load,) = [check for check in report.checks if check.name == "load"]
    assert load.status == "fail"
    subjects = {problem.subject.split(",")[0] for problem in load.problems}
    assert subjects == {"transformer", "vae", "tokenizer", "scheduler"}
    assert {problem.kind for problem in load.problems} >= {"missing", "unexpected", "library_warning", "value"}
    assert report.libraries.keys() == {"diffusers", "transformers"}


def test_what_a_library_raises_is_found(out: Path) -> None:
    edit_tensors(out / "transformer" / WEIGHTS, transposed)
    (load,) = [check for check in cogtools.verify_model(out, load=True).checks if check.name == "load"]
    assert load.problems[0].kind in ("error", "shape")


# The command


def test_a_lora_is_verified_as_before_and_nothing_heavy_is_imported(exported: Path, tmp_path: Path) -> None:
    cogtools.export_lora(exported / "run", tmp_path / "lora")
    assert imported_by("verify", tmp_path / "lora") <= {"numpy", "safetensors"}
    assert imported_by("verify", exported / "out") <= {"numpy"}
    assert imported_by("verify", exported / "out", "--against", exported / "run") <= {"numpy", "yaml"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--layers", "3"], "--layers is for LoRAs"),
        (["--iteration", "3"], "--iteration and --ema say which weights of a checkpoint are meant"),
        (["--model", "3b"], "there is no such model"),
        (["--against", "nowhere"], "there is no such file"),
    ],
)
def test_options_that_make_no_sense(words: list[str], expected: str, exported: Path, cogtools_cli: CommandLine) -> None:
    result = cogtools_cli("verify", exported / "out", *words)
    assert result.code == 2
    assert result.err.splitlines()[0].startswith(f"error: {expected}")


def test_a_checkpoint_without_a_model_cannot_be_held_against(
    exported: Path, tmp_path: Path, cogtools_cli: CommandLine
) -> None:
    cogtools.export_lora(exported / "run", tmp_path / "lora")
    result = cogtools_cli("verify", exported / "out", "--against", tmp_path / "lora")
    assert result.code == 2
    assert "there is no model in this checkpoint, only a LoRA" in result.err


def test_another_training_is_not_the_checkpoint(exported: Path, tmp_path: Path, cogtools_cli: CommandLine) -> None:
    other = save_model_run(tmp_path / "other", TOY_5B_I2V)
    result = cogtools_cli("verify", exported / "out", "--against", other)
    assert result.code == 2
    torch.save(transformer_of(sat_state_dict(TOY_5B, None, seed=5)), tmp_path / "mp_rank_00_model_states.pt")
    result = cogtools_cli(
        "verify", exported / "out", "--against", tmp_path / "mp_rank_00_model_states.pt", "--model", "5b"
    )
    assert result.code == 1
    assert result.out.splitlines()[-1].startswith("NOT verified: 1 of ")


def test_shards_without_their_index_are_nothing_that_diffusers_loads(tmp_path: Path) -> None:
    run = save_model_run(tmp_path / "run", TOY_2B)
    cogtools.export_model(run, tmp_path / "out", max_shard_size="500KB")
    index = "diffusion_pytorch_model.safetensors.index.json"
    (tmp_path / "out/transformer" / index).unlink()
    report = cogtools.verify_model(tmp_path / "out", against=run)
    (check,) = [check for check in report.checks if check.name == "transformer files"]
    assert (report.verdict, check.status) == ("fail", "fail")
    assert [(problem.kind, problem.subject) for problem in check.problems] == [("missing", index)]


@pytest.mark.parametrize("model", TOY_MODELS, ids=slug_of)
def test_what_went_to_diffusers_and_back_is_the_training_s_but_for_what_sat_makes_itself(
    model: SatModel, tmp_path: Path
) -> None:
    run = save_model_run(tmp_path / "run", model)
    cogtools.export_model(run, tmp_path / "there")
    cogtools.export_model(tmp_path / "there", tmp_path / "back", format="sat")
    assert cogtools.verify_model(tmp_path / "back", against=run).verdict == "pass"
    cogtools.export_model(tmp_path / "back", tmp_path / "again")
    configs = [tmp_path / folder / "transformer/config.json" for folder in ("there", "again")]
    assert configs[0].read_bytes() == configs[1].read_bytes()


@pytest.mark.parametrize("merged", [False, True], ids=["exported", "merged"])
def test_the_weights_that_the_record_names_are_taken_of_a_save_folder(merged: bool, tmp_path: Path) -> None:
    run = save_model_run(tmp_path / "run", TOY_2B, rank=4)
    other = save_model_run(tmp_path / "other", TOY_2B, rank=4, seed=1)
    (other / "1000").rename(run / "1000-ema")
    if merged:
        cogtools.merge(run, out=tmp_path / "out", ema=True)
    else:
        cogtools.export_model(run, tmp_path / "out", ema=True)
    report = cogtools.verify_model(tmp_path / "out", against=run)
    assert report.verdict == "pass"
    assert report.notices == ("Held against the EMA weights of iteration 1000, which the file's record names.",)
