"""Where a model is written: what is replaced, what is copied from a pipeline, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cogtools
from tests.support.command_line import CommandLine, run_python, surroundings
from tests.support.factories import (
    TOY_1_5_5B,
    TOY_2B,
    TOY_5B,
    TOY_5B_I2V,
    TRANSFORMER,
    is_lora,
    sat_checkpoint,
    sat_state_dict,
)
from tests.support.models import (
    load_folder,
    save_model_run,
    save_tokenizer,
    transformer_of,
    vae_of,
    without_a_word,
)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A whole toy pipeline of 2B, as diffusers saves it, with another seed's values."""
    save_model_run(tmp_path / "base-run", TOY_2B, seed=7)
    cogtools.export_model(tmp_path / "base-run", tmp_path / "base")
    save_tokenizer(tmp_path / "base/tokenizer")
    for manifest in (tmp_path / "base").rglob("cogtools.json"):
        manifest.unlink()
    (tmp_path / "base/model_index.json").write_text(json.dumps({"_class_name": "CogVideoXPipeline"}))
    return tmp_path / "base"


# What is replaced


def test_an_export_over_an_export_needs_overwrite_and_leaves_no_old_shard(
    tmp_path: Path, cogtools_cli: CommandLine
) -> None:
    save_model_run(tmp_path / "run", TOY_5B)
    save_model_run(tmp_path / "other", TOY_5B, seed=1)
    cogtools.export_model(tmp_path / "run", tmp_path / "out", max_shard_size="500KB")
    (tmp_path / "out/README.md").write_text("mine")
    before = files_in(tmp_path / "out")
    result = cogtools_cli("export-model", tmp_path / "other", tmp_path / "out")
    assert result.code == 2
    assert result.err.splitlines()[0] == "error: the output exists already"
    assert files_in(tmp_path / "out") == before
    cogtools.export_model(tmp_path / "other", tmp_path / "out", overwrite=True)
    cogtools.export_model(tmp_path / "other", tmp_path / "fresh")
    assert files_in(tmp_path / "out") == files_in(tmp_path / "fresh") | {"README.md": b"mine"}


def test_only_the_parts_that_are_written_are_replaced(tmp_path: Path) -> None:
    state = sat_state_dict(TOY_5B, None, seed=1)
    torch.save(transformer_of(state), tmp_path / "transformer.pt")
    cogtools.export_model(save_model_run(tmp_path / "run", TOY_5B), tmp_path / "out")
    before = files_in(tmp_path / "out")
    cogtools.export_model(tmp_path / "transformer.pt", tmp_path / "out", model="5b", overwrite=True)
    after = files_in(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert {name.split("/")[0] for name in changed} == {"transformer"}


@pytest.mark.parametrize("change", ["file added", "link added", "config edited", "weights of others", "no list"])
def test_a_folder_that_cogtools_did_not_write_is_never_replaced(
    change: str, tmp_path: Path, cogtools_cli: CommandLine
) -> None:
    run = save_model_run(tmp_path / "run", TOY_5B)
    cogtools.export_model(run, tmp_path / "out")
    folder = tmp_path / "out/transformer"
    if change == "file added":
        (folder / "notes.txt").write_text("mine")
    elif change == "link added":
        (folder / "mine").symlink_to(tmp_path)
    elif change == "config edited":
        (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace('"dropout": 0.0', '"dropout": 0.1')
        )
        (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    elif change == "weights of others":
        (folder / "diffusion_pytorch_model.safetensors").write_bytes(b"other weights")
    else:
        (folder / "cogtools.json").unlink()
    before = files_in(tmp_path / "out")
    result = cogtools_cli("export-model", run, tmp_path / "out", "--overwrite")
    assert result.code == 2
    assert result.err.splitlines()[0] == "error: the output would replace a folder that cogtools did not write"
    assert files_in(tmp_path / "out") == before


def test_the_checkpoint_itself_is_never_replaced(tmp_path: Path, cogtools_cli: CommandLine) -> None:
    cogtools.export_model(save_model_run(tmp_path / "run", TOY_5B), tmp_path / "out")
    before = files_in(tmp_path / "out")
    result = cogtools_cli(
        "export-model", tmp_path / "out/transformer", tmp_path / "out/transformer", "--format", "sat", "--overwrite"
    )
    assert result.code == 2
    assert "the output would replace" in result.err
    assert files_in(tmp_path / "out") == before


def test_a_folder_for_sat_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        cogtools.export_model(save_model_run(tmp_path / f"run-{name}", TOY_5B, seed=seed), tmp_path / name)
    cogtools.export_model(tmp_path / "a/transformer", tmp_path / "sat", format="sat")
    cogtools.export_model(tmp_path / "b/transformer", tmp_path / "fresh", format="sat")
    with pytest.raises(cogtools.CogtoolsError, match="exists already"):
        cogtools.export_model(tmp_path / "b/transformer", tmp_path / "sat", format="sat")
    cogtools.export_model(tmp_path / "b/transformer", tmp_path / "sat", format="sat", overwrite=True)
    assert files_in(tmp_path / "sat") == files_in(tmp_path / "fresh")


def test_what_a_crash_left_between_two_renames_is_put_back(tmp_path: Path) -> None:
    run = save_model_run(tmp_path / "run", TOY_5B)
    cogtools.export_model(run, tmp_path / "out")
    before = files_in(tmp_path / "out")
    (tmp_path / "out/transformer").rename(tmp_path / "out/.transformer.1-00000000.cogtools-old")
    with pytest.raises(cogtools.CogtoolsError, match="exists already"):
        cogtools.export_model(run, tmp_path / "out")
    assert files_in(tmp_path / "out") == before


def test_damage_that_the_crc32s_tell_leaves_everything_as_it_was(tmp_path: Path, cogtools_cli: CommandLine) -> None:
    run = save_model_run(tmp_path / "run", TOY_5B)
    cogtools.export_model(run, tmp_path / "out")
    before = files_in(tmp_path / "out")
    path = run / "1000/mp_rank_00_model_states.pt"
    with cogtools.open_checkpoint(run) as checkpoint:
        place = checkpoint.tensors[f"{TRANSFORMER}mixins.final_layer.linear.weight"].storage.range()
    content = bytearray(path.read_bytes())
    content[place.offset_bytes + 1] ^= 4
    path.write_bytes(content)
    result = cogtools_cli("export-model", run, tmp_path / "out", "--overwrite")
    assert result.code == 2
    assert "the checkpoint is damaged" in result.err
    assert files_in(tmp_path / "out") == before
    result = cogtools_cli("export-model", run, tmp_path / "new")
    assert result.code == 2
    assert not (tmp_path / "new").exists()


def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    run = save_model_run(tmp_path / "run", TOY_5B)
    code = (
        "import sys, cogtools\n"
        "def stop(done, size):\n"
        "    if done > size // 2: raise KeyboardInterrupt\n"
        "try: cogtools.export_model(*sys.argv[1:], progress=stop)\n"
        "except KeyboardInterrupt: pass\n"
    )
    run_python(code, run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# What a pipeline on this machine gives


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")  # releases before 0.42 know no other
def test_a_base_completes_a_pipeline_that_runs(base: Path, tmp_path: Path) -> None:
    from diffusers import CogVideoXPipeline

    run = save_model_run(tmp_path / "run", TOY_2B, rank=4)
    report = cogtools.export_model(run, tmp_path / "out", base=base)
    assert (report.missing, report.pipeline) == ((), True)
    with without_a_word():
        pipe = CogVideoXPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    ids = pipe.tokenizer("a cat on the mat").input_ids
    assert pipe.tokenizer.unk_token_id not in ids
    video = pipe(
        "a cat on the mat", height=64, width=64, num_frames=9, num_inference_steps=2, max_sequence_length=16,
        generator=torch.Generator().manual_seed(0), output_type="pt",
    ).frames  # fmt: skip
    assert video.isfinite().all()
    files = files_in(tmp_path / "out")
    assert json.loads(files["model_index.json"])["transformer"] == ["diffusers", "CogVideoXTransformer3DModel"]
    names: dict[str, object] = {}
    exec(report.load.replace("torch.float16", "torch.float32"), names)
    assert isinstance(names["pipe"], CogVideoXPipeline)


def test_a_base_gives_what_is_missing_and_nothing_else(base: Path, tmp_path: Path) -> None:
    torch.save(transformer_of(sat_state_dict(TOY_2B, None)), tmp_path / "t.pt")
    shutil.copy(save_model_run(tmp_path / "run", TOY_2B) / "training_config.yaml", tmp_path)
    # as Hugging Face's cache has it: links to blobs
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted((base / "vae").iterdir())):
        path.rename(tmp_path / f"blobs/{number}")
        path.symlink_to(Path(os.path.relpath(tmp_path / f"blobs/{number}", path.parent)))
    report = cogtools.export_model(tmp_path / "t.pt", tmp_path / "out", base=base)
    assert report.pipeline
    assert [(part.name, part.source) for part in report.parts] == [
        ("transformer", tmp_path / "t.pt"),
        ("scheduler", None),
        *((name, base / name) for name in ("vae", "text_encoder", "tokenizer")),
    ]
    for name in ("vae", "text_encoder", "tokenizer"):
        copied = files_in(tmp_path / "out" / name)
        del copied["cogtools.json"]
        assert copied == files_in(base / name)
        assert not any(path.is_symlink() for path in (tmp_path / "out" / name).iterdir())
    assert cogtools.export_model(tmp_path / "t.pt", tmp_path / "out", base=base, overwrite=True).pipeline


@pytest.mark.parametrize("wrong", ["not a pipeline", "missing", "model", "tokenizer", "shard", "width"])
def test_a_base_that_does_not_go_with_the_model_is_refused(
    wrong: str, base: Path, tmp_path: Path, cogtools_cli: CommandLine
) -> None:
    torch.save(transformer_of(sat_state_dict(TOY_2B, None)), tmp_path / "t.pt")
    model, folder = "2b", base
    if wrong == "not a pipeline":
        (base / "model_index.json").unlink()
    elif wrong == "missing":
        folder = tmp_path / "nowhere"
    elif wrong == "model":
        torch.save(transformer_of(sat_state_dict(TOY_5B, None)), tmp_path / "t.pt")
        model = "5b"
    elif wrong == "tokenizer":
        (base / "tokenizer/tokenizer.json").unlink()
    elif wrong == "shard":
        (base / "text_encoder/model.safetensors").unlink()
    elif wrong == "width":
        config = base / "text_encoder/config.json"
        config.write_text(config.read_text().replace('"d_model": 32', '"d_model": 64'))
    result = cogtools_cli("export-model", tmp_path / "t.pt", tmp_path / "out", "--base", folder, "--model", model)
    assert result.code == 2
    first = {
        "not a pipeline": "this is not a pipeline of diffusers",
        "missing": "this is not a pipeline of diffusers",
        "model": "the pipeline given with --base does not go with this model",
        "tokenizer": "the tokenizer of the pipeline given with --base is not complete",
        "shard": "there is no checkpoint in this folder",
        "width": "the pipeline given with --base does not go with this model",
    }[wrong]
    assert result.err.splitlines()[0] == f"error: {first}"
    assert not (tmp_path / "out").exists()


def test_a_vae_of_its_own_takes_the_place_of_the_checkpoints(tmp_path: Path) -> None:
    run = save_model_run(tmp_path / "run", TOY_2B)
    state = vae_of(sat_state_dict(TOY_2B, None, torch.float32, seed=3))
    torch.save({"state_dict": state}, tmp_path / "3d-vae.pt")
    report = cogtools.export_model(run, tmp_path / "out", vae=tmp_path / "3d-vae.pt")
    assert {str(tensor.dtype) for tensor in load_folder(tmp_path / "out/vae").values()} == {"torch.float32"}
    assert not any("trainer's copy" in notice for notice in report.notices)
    report = cogtools.export_model(run, tmp_path / "other")
    assert [notice for notice in report.notices if "VAE" in notice] == [
        "The VAE is the trainer's copy, in float16. The released file is in float32: give it with --vae 3d-vae.pt."
    ]


def test_parts_are_not_written_into_another_models_pipeline(tmp_path: Path, cogtools_cli: CommandLine) -> None:
    run = save_model_run(tmp_path / "run", TOY_5B_I2V)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}')
    result = cogtools_cli("export-model", run, tmp_path / "out")
    assert result.code == 2
    assert "the output lies in the folder of another pipeline" in result.err
    assert files_in(tmp_path / "out") == {"model_index.json": b'{"_class_name": "CogVideoXPipeline"}'}


# What is no model, or not one of these


def test_what_cannot_be_exported_is_one_clear_error(tmp_path: Path, cogtools_cli: CommandLine) -> None:
    state = sat_state_dict(TOY_2B, 4)
    transformer = transformer_of(state)
    layer = f"{TRANSFORMER}transformer.layers.1."
    cases = {
        "only a LoRA": (
            {k: v for k, v in state.items() if is_lora(k)},
            "there is no model in this checkpoint, only a LoRA",
        ),
        "nothing": ({"x": torch.zeros(1)}, "there is no CogVideoX model in this checkpoint"),
        "a layer lacks": (
            {k: v for k, v in transformer.items() if not k.startswith(layer + "mlp")},
            "this is not a whole CogVideoX transformer",
        ),
        "a LoRA and one weight": (
            {k: v for k, v in transformer.items() if is_lora(k) or k.endswith("final_layernorm.weight")},
            "this is not a whole CogVideoX transformer",
        ),
        "another shape": (
            dict(transformer) | {layer + "mlp.dense_4h_to_h.weight": torch.zeros(128, 64)},
            "this is not a whole CogVideoX transformer",
        ),
        "an unknown key": (
            dict(transformer) | {f"{TRANSFORMER}model_ema.decay": torch.zeros(1)},
            "this is not a whole CogVideoX transformer",
        ),
        "quantized": (
            dict(transformer) | {layer + "input_layernorm.bias": torch.zeros(128, dtype=torch.int8)},
            "this is not a whole CogVideoX transformer",
        ),
        "both names": (
            dict(transformer) | {layer + "attention.dense.bias": torch.zeros(128)},
            "this is not a whole CogVideoX transformer",
        ),
        "a VAE without its end": (
            {k: v for k, v in vae_of(state).items() if "conv_out" not in k},
            "this is not a whole CogVideoX VAE",
        ),
        "a tensor-parallel rank": (
            sat_checkpoint(state, mp_world_size=2),
            "this is one part of a tensor-parallel training",
        ),
    }
    for name, (content, expected) in cases.items():
        path = tmp_path / f"{name.replace(' ', '-')}.pt"
        torch.save(content, path)
        result = cogtools_cli("export-model", path, tmp_path / "out", "--model", "2b")
        assert (result.code, result.out) == (2, ""), name
        assert result.err.splitlines()[0].startswith(f"error: {expected}"), name
        assert not (tmp_path / "out").exists(), name
        assert cogtools_cli("export-model", path, tmp_path / "out", "--json").json["status"] == "error"


def test_missing_keys_are_named_as_the_file_names_the_others(tmp_path: Path, cogtools_cli: CommandLine) -> None:
    state = transformer_of(sat_state_dict(TOY_5B, None))
    del state[f"{TRANSFORMER}time_embed.0.bias"]
    torch.save(state, tmp_path / "x.pt")
    error = cogtools_cli("export-model", tmp_path / "x.pt", tmp_path / "out", "--json").json["error"]
    assert error["problems"] == [
        {"kind": "missing", "subject": f"{TRANSFORMER}time_embed.0.bias", "found": None, "expected": None, "keys": []}
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model", "3b"], "there is no such model"),
        (["--max-shard-size", "5 apples"], "this is not a size"),
        (["--max-shard-size", "0GB"], "this is not a size"),
        (["--format", "sat", "--vae", "x.pt"], "--vae does not go with --format sat"),
        (["--format", "sat", "--max-shard-size", "5GB"], "--max-shard-size does not go with --format sat"),
        (["--format", "sat"], "this model is in SAT's layout already"),
        (["--vae", "nowhere.pt"], "there is no such file"),
        (["--iteration", "7"], "there is no iteration 7 in this folder"),
        (["--ema"], "there are only plain weights of iteration 1000 in this folder"),
    ],
)
def test_options_that_make_no_sense(words: list[str], expected: str, tmp_path: Path, cogtools_cli: CommandLine) -> None:
    run = save_model_run(tmp_path / "run", TOY_2B)
    result = cogtools_cli("export-model", run, tmp_path / "out", *words)
    assert result.code == 2
    assert result.err.splitlines()[0].startswith(f"error: {expected}")
    assert not (tmp_path / "out").exists()


def test_a_model_in_diffusers_layout_is_not_exported_to_it(tmp_path: Path, cogtools_cli: CommandLine) -> None:
    cogtools.export_model(save_model_run(tmp_path / "run", TOY_1_5_5B), tmp_path / "out")
    result = cogtools_cli("export-model", tmp_path / "out/transformer", tmp_path / "again")
    assert result.code == 2
    assert "this model is in diffusers' layout already" in result.err


def test_two_sets_of_weights_in_one_folder_are_not_guessed_between(tmp_path: Path, cogtools_cli: CommandLine) -> None:
    run = save_model_run(tmp_path / "run", TOY_5B)
    cogtools.export_model(run, tmp_path / "one")
    cogtools.export_model(run, tmp_path / "shards", max_shard_size="500KB")
    shutil.copytree(tmp_path / "shards/transformer", tmp_path / "both")
    shutil.copy(tmp_path / "one/transformer/diffusion_pytorch_model.safetensors", tmp_path / "both")
    result = cogtools_cli("export-model", tmp_path / "both", tmp_path / "sat", "--format", "sat")
    assert result.code == 2
    assert "there are two sets of weights in this folder" in result.err


def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    run = save_model_run(tmp_path / "run", TOY_5B)
    words = [sys.executable, "-m", "cogtools", "export-model", str(run), str(tmp_path / "out")]
    limited = ["bash", "-c", 'ulimit -f 1000; exec "$@"', "-", *words]
    done = subprocess.run(limited, capture_output=True, text=True, check=False, env=surroundings())
    assert done.returncode == 2
    assert "the output cannot be written" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_is_not_named_as_one_file(tmp_path: Path, cogtools_cli: CommandLine) -> None:
    run = save_model_run(tmp_path / "run", TOY_2B, rank=4)
    for command in ("export-model", "merge"):
        result = cogtools_cli(command, run, tmp_path / "model.safetensors")
        assert result.code == 2
        assert result.err.splitlines()[0] == (
            "error: a whole model is a folder of several files, and the output is named as one file"
        )
    assert not (tmp_path / "model.safetensors").exists()
