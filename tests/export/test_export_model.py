"""Whole models, there and back: every byte where it belongs, the folders that diffusers and SAT load."""

import json
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import T5EncoderModel

import cogtools
from cogtools.conversion.model_reading import model_of_slug
from cogtools.layouts.family import MODELS, Model
from tests.support.base_weights import diffusers_base
from tests.support.command_line import CommandLine, imported_by
from tests.support.factories import (
    SAVERS,
    TOY_1_5_5B,
    TOY_1_5_5B_I2V,
    TOY_2B,
    TOY_5B,
    TOY_5B_I2V,
    TOY_MODELS,
    TRANSFORMER,
    SatModel,
    StateDict,
    sat_checkpoint,
    sat_state_dict,
    with_module_prefix,
    zero3_checkpoint,
)
from tests.support.models import (
    load_folder,
    model_config,
    save_model_run,
    slug_of,
    text_encoder_of,
    transformer_of,
    vae_of,
    without_a_word,
)

by_toy = pytest.mark.parametrize("model", TOY_MODELS, ids=[slug_of(model) for model in TOY_MODELS])


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[key].dtype == tensor.dtype and found[key].shape == tensor.shape and torch.equal(found[key], tensor)
        for key, tensor in expected.items()
    )


def expected_transformer(state: StateDict, model: SatModel) -> dict[str, torch.Tensor]:
    """The transformer's tensors under diffusers' names, worked out by the tests' own renaming."""
    found = {key.replace(".original", ""): tensor for key, tensor in state.items()}
    for layer in range(model.layers):
        for name in ("query_key_value", "dense"):
            for kind in ("weight", "bias"):
                key = f"{TRANSFORMER}transformer.layers.{layer}.attention.{name}"
                found[f"{key}.original.{kind}"] = found[f"{key}.{kind}"]
    expected = diffusers_base(found, model.layers)
    if model.name.endswith("5B-I2V") and model.pos_embedding:
        expected["patch_embed.pos_embedding"] = found[f"{TRANSFORMER}mixins.pos_embed.pos_embedding"]
    if model.ofs_embed_dim is not None:
        for number in (1, 2):
            for kind in ("weight", "bias"):
                key = f"{TRANSFORMER}ofs_embed.{2 * number - 2}.{kind}"
                expected[f"ofs_embedding.linear_{number}.{kind}"] = found[key]
    return expected


@by_toy
@pytest.mark.parametrize("rank", [None, 4], ids=["base", "with LoRA"])
def test_diffusers_loads_every_part_strictly_with_the_checkpoints_values(
    model: SatModel, rank: int | None, tmp_path: Path
) -> None:
    run = save_model_run(tmp_path / "run", model, rank=rank)
    state = sat_state_dict(model, rank)
    report = cogtools.export_model(run, tmp_path / "out")
    assert [part.name for part in report.parts] == ["transformer", "vae", "text_encoder", "scheduler"]
    assert report.missing == ("tokenizer",)
    assert report.model == f"{model.name.removeprefix('toy ')}, of other sizes: 3 layers, hidden size 128"
    assert report.crc32 == "checked"
    assert same(load_folder(tmp_path / "out/transformer"), expected_transformer(state, model))
    with without_a_word():
        transformer = CogVideoXTransformer3DModel.from_pretrained(
            tmp_path / "out/transformer", torch_dtype=torch.float16
        )
        vae = AutoencoderKLCogVideoX.from_pretrained(tmp_path / "out/vae", torch_dtype=torch.float16)
        text_encoder = T5EncoderModel.from_pretrained(tmp_path / "out/text_encoder")
        CogVideoXDDIMScheduler.from_pretrained(tmp_path / "out/scheduler")
    assert same(dict(transformer.state_dict()), expected_transformer(state, model))
    assert len(load_folder(tmp_path / "out/vae")) == len(vae.state_dict()) == len(vae_of(state))
    assert text_encoder.dtype == torch.float16


@by_toy
def test_there_and_back_is_bit_identical_for_every_key_that_is_not_made_up(model: SatModel, tmp_path: Path) -> None:
    run = save_model_run(tmp_path / "run", model)
    cogtools.export_model(run, tmp_path / "out")
    report = cogtools.export_model(tmp_path / "out/transformer", tmp_path / "back", format="sat")
    back = torch.load(tmp_path / "back/1/mp_rank_00_model_states.pt", weights_only=True)["module"]
    state = transformer_of(sat_state_dict(model, None))
    computed = ("freqs_sin", "freqs_cos") if model.name.endswith("I2V") else ("freqs_sin", "freqs_cos", "pos_embedding")
    unused = f"{TRANSFORMER}transformer.position_embeddings.weight"
    expected = {key: tensor for key, tensor in state.items() if not key.endswith(computed) and key != unused}
    made_up = {unused: torch.zeros_like(state[unused])} if unused in state else {}
    assert same(dict(back), expected | made_up)
    assert (tmp_path / "back/latest").read_text() == "1"
    assert any("Made up" in notice for notice in report.notices) == bool(made_up)


def test_a_whole_pipeline_gives_its_transformer_to_sat(tmp_path: Path) -> None:
    run = save_model_run(tmp_path / "run", TOY_5B)
    cogtools.export_model(run, tmp_path / "out")
    (tmp_path / "out/model_index.json").write_text(json.dumps({"_class_name": "CogVideoXPipeline", "transformer": []}))
    report = cogtools.export_model(tmp_path / "out", tmp_path / "back", format="sat")
    assert report.format == "sat"
    assert [part.tensors for part in report.parts] == [len(expected_back(TOY_5B))]


def expected_back(model: SatModel) -> list[str]:
    keys = transformer_of(sat_state_dict(model, None))
    return [key for key in keys if not key.endswith(("freqs_sin", "freqs_cos"))]


# The structures of the real models


@pytest.mark.parametrize("known", MODELS, ids=[model.slug for model in MODELS])
def test_the_real_models_have_the_released_configuration(known: Model, tmp_path: Path) -> None:
    from benchmarks.full_size import MODELS as SAT_MODELS
    from cogtools.conversion.model import find_parts
    from cogtools.conversion.model_reading import read_transformer
    from tests.support.entries import checkpoint_of_shapes
    from tests.support.factories import module_shapes

    shapes = {
        key: shape for key, shape in module_shapes(SAT_MODELS[known.slug], 4).items() if key.startswith(TRANSFORMER)
    }
    checkpoint = checkpoint_of_shapes(tmp_path / "x.pt", shapes)
    reading = read_transformer(find_parts(checkpoint)["transformer"])
    assert reading.model == known
    head = {"_class_name": "CogVideoXTransformer3DModel", "_diffusers_version": known.diffusers_version}
    assert reading.config == head | known.config
    assert reading.notices == ()
    with torch.device("meta"):
        built = CogVideoXTransformer3DModel.from_config(dict(reading.config))
    assert {key: tuple(tensor.shape) for key, tensor in built.state_dict().items()} == reading.shapes


@pytest.mark.parametrize("model", [TOY_5B, TOY_5B_I2V], ids=["5b", "5b-i2v"])
def test_a_patch_embedding_stored_as_a_linear_becomes_the_convolution(model: SatModel, tmp_path: Path) -> None:
    flat = replace(model, patch=(prod(model.patch),), freqs=False)
    state = sat_state_dict(flat, None)
    report = cogtools.export_model(save_model_run(tmp_path / "run", flat, state=state), tmp_path / "out")
    weight = load_folder(tmp_path / "out/transformer")["patch_embed.proj.weight"]
    key = f"{TRANSFORMER}mixins.patch_embed.proj.weight"
    assert torch.equal(weight, state[key].reshape(128, *model.patch))
    assert sum("convolution" in notice for notice in report.notices) == 1
    assert report.model == f"{model.name.removeprefix('toy ')}, of other sizes: 3 layers, hidden size 128"


# Which model it is


@pytest.mark.parametrize(("model", "drop", "by"), [
    (TOY_2B, (), "its positional keys"),
    (TOY_5B, ("position_embeddings.weight",), "its positional keys"),
    (TOY_2B, ("pos_embedding",), "training_config.yaml"),
    (TOY_5B, ("freqs_sin", "freqs_cos", "position_embeddings.weight"), "training_config.yaml"),
    (TOY_5B_I2V, ("freqs_sin", "freqs_cos"), "its sizes"),
    (TOY_1_5_5B, ("position_embeddings.weight",), "its sizes"),
    (TOY_1_5_5B_I2V, (), "its sizes"),
])  # fmt: skip
def test_what_tells_the_model(model: SatModel, drop: tuple[str, ...], by: str, tmp_path: Path) -> None:
    state = StateDictWithout(sat_state_dict(model, None), drop)
    report = cogtools.export_model(save_model_run(tmp_path / "run", model, state=state), tmp_path / "out", dry_run=True)
    assert report.model is not None
    assert report.model.startswith(f"{model.name.removeprefix('toy ')},")
    assert report.known_by == by


def StateDictWithout(state: StateDict, ends: tuple[str, ...]) -> StateDict:  # noqa: N802
    return type(state)((key, tensor) for key, tensor in state.items() if not ends or not key.endswith(ends))


def test_where_nothing_tells_the_model_the_user_has_to(tmp_path: Path, cogtools_cli: CommandLine) -> None:
    state = StateDictWithout(sat_state_dict(TOY_2B, None), ("pos_embedding",))
    run = save_model_run(tmp_path / "run", TOY_2B, state=state, config=False)
    result = cogtools_cli("export-model", run, tmp_path / "out")
    assert result.code == 2
    assert result.err.splitlines()[0] == "error: it cannot be told which model this is"
    assert "expected:  2b or 5b" in result.err
    assert not (tmp_path / "out").exists()
    for slug in ("2b", "5b"):
        report = cogtools.export_model(run, tmp_path / slug, model=slug)
        assert (report.known_by, report.model) == (
            "--model",
            f"{model_name(slug)}, of other sizes: 3 layers, hidden size 128",
        )


def model_name(slug: str) -> str:
    model = model_of_slug(slug)
    assert model is not None
    return model.name


@pytest.mark.parametrize(("model", "asked"), [(TOY_2B, "5b"), (TOY_5B, "2b"), (TOY_1_5_5B, "5b"), (TOY_5B_I2V, "2b")])
def test_a_model_that_the_tensors_are_not_of_is_refused(
    model: SatModel, asked: str, tmp_path: Path, cogtools_cli: CommandLine
) -> None:
    run = save_model_run(tmp_path / "run", model)
    result = cogtools_cli("export-model", run, tmp_path / "out", "--model", asked)
    assert result.code == 2
    assert "what tells the model of this transformer disagrees" in result.err
    assert not (tmp_path / "out").exists()


# Sizes of videos


def test_sizes_that_the_positions_contradict_are_a_warning_for_2b_and_an_error_for_5b_i2v(tmp_path: Path) -> None:
    run = save_model_run(tmp_path / "2b", TOY_2B, config=False)
    report = cogtools.export_model(run, tmp_path / "out", model="2b")
    assert [notice for notice in report.notices if "64 positions" in notice] == [
        "The checkpoint has 64 positions; the sizes in transformer/config.json give 17,776: set sample_width, "
        "sample_height, sample_frames and max_text_seq_length there to what the training had (text + ((frames - 1) / 4 "
        "+ 1) * (width / 2) * (height / 2)). The weights are right all the same."
    ]
    run = save_model_run(tmp_path / "i2v", TOY_5B_I2V, config=False)
    with pytest.raises(cogtools.CogtoolsError, match="does not fit the sizes of video and text"):
        cogtools.export_model(run, tmp_path / "out-i2v")
    assert not (tmp_path / "out-i2v").exists()


def test_the_training_configuration_states_what_the_tensors_do_not(tmp_path: Path) -> None:
    run = save_model_run(tmp_path / "run", TOY_2B)
    text = (run / "training_config.yaml").read_text()
    for old, new in [("scale_factor: 1.15258426", "scale_factor: 0.9"), ("shift_scale: 3.0", "shift_scale: 2.0"),
                     ("height_interpolation: 1.875", "height_interpolation: 1.5")]:  # fmt: skip
        assert old in text
        text = text.replace(old, new)
    (run / "training_config.yaml").write_text(text)
    cogtools.export_model(run, tmp_path / "out")
    configs = {
        name: json.loads((tmp_path / "out" / name).read_text())
        for name in ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")
    }
    transformer, vae, scheduler = configs.values()
    assert (vae["scaling_factor"], scheduler["snr_shift_scale"]) == (0.9, 2.0)
    stated = ("sample_width", "sample_height", "sample_frames", "max_text_seq_length", "spatial_interpolation_scale")
    assert [transformer[name] for name in stated] == [8, 8, 9, 16, 1.5]


def test_1_5_keeps_the_sizes_that_it_was_released_for(tmp_path: Path) -> None:
    cogtools.export_model(save_model_run(tmp_path / "run", TOY_1_5_5B), tmp_path / "out")
    config = json.loads((tmp_path / "out/transformer/config.json").read_text())
    assert [config[f"sample_{name}"] for name in ("width", "height", "frames")] == [170, 96, 81]
    assert json.loads((tmp_path / "out/vae/config.json").read_text())["invert_scale_latents"] is True


# Where the tensors come from


@pytest.mark.parametrize("saver", sorted(SAVERS))
def test_a_checkpoint_written_in_any_way_gives_the_same_files(saver: str, tmp_path: Path) -> None:
    state = sat_state_dict(TOY_5B, 4)
    SAVERS[saver](sat_checkpoint(state), tmp_path / "x.pt")
    cogtools.export_model(tmp_path / "x.pt", tmp_path / "out")
    assert same(load_folder(tmp_path / "out/transformer"), expected_transformer(state, TOY_5B))


@pytest.mark.parametrize("wrap", [with_module_prefix, lambda state: zero3_checkpoint(state)["module"], transformer_of])
def test_wrapped_flattened_and_stripped_checkpoints_are_read(
    wrap: Callable[[StateDict], StateDict], tmp_path: Path
) -> None:
    state = sat_state_dict(TOY_5B, None)
    torch.save({"module": wrap(state)}, tmp_path / "x.pt")
    cogtools.export_model(tmp_path / "x.pt", tmp_path / "out")
    assert same(load_folder(tmp_path / "out/transformer"), expected_transformer(state, TOY_5B))


def test_a_vae_or_a_text_encoder_alone_becomes_that_part(tmp_path: Path, cogtools_cli: CommandLine) -> None:
    state = sat_state_dict(TOY_2B, None)
    torch.save({"state_dict": vae_of(state) | {"loss.logvar": torch.zeros(1)}}, tmp_path / "3d-vae.pt")
    torch.save(text_encoder_of(state), tmp_path / "t5.pt")
    result = cogtools_cli("export-model", tmp_path / "3d-vae.pt", tmp_path / "vae")
    assert result.code == 2
    assert "state the model with --model" in result.err
    report = cogtools.export_model(tmp_path / "3d-vae.pt", tmp_path / "vae", model="1.5-5b")
    assert [(part.name, part.tensors) for part in report.parts] == [("vae", 104)]
    with without_a_word():
        vae = AutoencoderKLCogVideoX.from_pretrained(tmp_path / "vae/vae")
    assert vae.config.invert_scale_latents
    report = cogtools.export_model(tmp_path / "t5.pt", tmp_path / "t5")
    assert report.model is None
    assert [(part.name, part.tensors) for part in report.parts] == [("text_encoder", 12)]
    with without_a_word():
        assert T5EncoderModel.from_pretrained(tmp_path / "t5/text_encoder").dtype == torch.float16


# Files


@pytest.mark.parametrize("size", ["1KB", "100KB", "1.5MB", "5GB"])
def test_shards_are_cut_as_diffusers_cuts_them(size: str, tmp_path: Path) -> None:
    run = save_model_run(tmp_path / "run", TOY_5B)
    cogtools.export_model(run, tmp_path / "out", max_shard_size=size)
    folder = tmp_path / "out/transformer"
    with without_a_word():
        loaded = CogVideoXTransformer3DModel.from_pretrained(folder, torch_dtype=torch.float16)
    split = split_torch_state_dict_into_shards(
        loaded.state_dict(), max_shard_size=size, filename_pattern="diffusion_pytorch_model{suffix}.safetensors"
    )
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found[file.name] = sorted(opened.keys())
    assert found == {name: sorted(keys) for name, keys in split.filename_to_tensors.items()}
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    assert index.exists() == split.is_sharded
    if split.is_sharded:
        content = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        assert index.read_text() == json.dumps(content, indent=2, sort_keys=True) + "\n"
    assert same(load_folder(folder), expected_transformer(sat_state_dict(TOY_5B, None), TOY_5B))


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    run = save_model_run(tmp_path / "run", TOY_2B, rank=4)
    for name in "ab":
        cogtools.export_model(run, tmp_path / name)
        cogtools.export_model(tmp_path / name / "transformer", tmp_path / f"sat-{name}", format="sat")
    for one, other in (("a", "b"), ("sat-a", "sat-b")):
        files = {path.relative_to(tmp_path / one): path.read_bytes() for path in (tmp_path / one).rglob("*.*")}
        assert files == {
            path.relative_to(tmp_path / other): path.read_bytes() for path in (tmp_path / other).rglob("*.*")
        }


def test_a_dry_run_shows_every_row_and_writes_nothing(tmp_path: Path, cogtools_cli: CommandLine) -> None:
    run = save_model_run(tmp_path / "run", TOY_2B, rank=4)
    result = cogtools_cli("export-model", run, tmp_path / "out", "--dry-run")
    assert result.code == 0
    assert not (tmp_path / "out").exists()
    name = "transformer_blocks.0.norm1.linear.weight"
    line = next(line for line in result.out.splitlines() if f" {name} " in line)
    assert line.split() == [
        "transformer", name, "float16", "(768,32)",
        f"{TRANSFORMER}mixins.adaln_layer.adaLN_modulations.0.1.weight[0:384,", "768:1152]",
    ]  # fmt: skip
    left_out = f"left out  {TRANSFORMER}mixins.pos_embed.pos_embedding  (positions that were not trained: diffusers "
    assert left_out + "computes them)" in result.out
    report = cogtools_cli("export-model", run, tmp_path / "out", "--dry-run", "--json").json["report"]
    assert not report["written"]
    assert len(report["plan"]["tensors"]) == 88 + 104 + 12
    assert len(report["plan"]["left_out"]) == 24 + 1 + 1


def test_torch_is_not_imported(tmp_path: Path) -> None:
    run = save_model_run(tmp_path / "run", TOY_2B)
    heavy = imported_by("export-model", run, tmp_path / "out")
    assert heavy <= {"yaml"}
    assert imported_by("export-model", tmp_path / "out/transformer", tmp_path / "sat", "--format", "sat") <= {"yaml"}
    assert imported_by("export-model", "--help") == set()


@pytest.mark.parametrize("command", [[], ["--format", "sat"]], ids=["to diffusers", "to SAT"])
def test_json_keeps_to_its_schema(command: list[str], tmp_path: Path, cogtools_cli: CommandLine) -> None:
    run = save_model_run(tmp_path / "run", TOY_5B, rank=4)
    cogtools.export_model(run, tmp_path / "diffusers")
    source = tmp_path / "diffusers/transformer" if command else run
    report = cogtools_cli("export-model", source, tmp_path / "out", *command, "--json").json["report"]
    assert report["written"]
    files = {f"{part['folder']}/{name}" for part in report["parts"] for name in part["files"]}
    assert files == {str(path) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert report["size_bytes"] == sum(Path(name).stat().st_size for name in files)


def test_a_lora_beside_the_base_is_left_out_and_merge_is_named(tmp_path: Path) -> None:
    run = save_model_run(tmp_path / "run", TOY_2B, rank=4)
    report = cogtools.export_model(run, tmp_path / "out")
    assert report.lora_tensors == 24
    path = run / "1000/mp_rank_00_model_states.pt"
    assert (
        "The checkpoint holds a LoRA too (24 tensors): this is the base without it. To have it in the weights: "
        f"cogtools merge {path} OUT"
    ) in report.notices


def test_the_config_of_the_helpers_is_read_back() -> None:
    assert model_config(TOY_2B)["scale_factor"] == 1.15258426
