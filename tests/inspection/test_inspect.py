"""inspect: what it says of a checkpoint is what torch.load and the files themselves say."""

import json
import math
import os
import pickle
import shlex
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cogtools.checkpoint.opening import open_checkpoint
from cogtools.checkpoint.pickle.dangers import danger_of
from cogtools.conversion.plan import plan_lora
from cogtools.conversion.scale import carry
from cogtools.errors import CogtoolsError, ExportError, Hint
from cogtools.inspection.contents import kind_of
from cogtools.inspection.inspect import inspect_checkpoint
from cogtools.inspection.report import (
    CheckpointReport,
    DTypeReport,
    EntryReport,
    ExportOutlook,
    FileReport,
    GlobalReport,
    IterationReport,
    LoraReport,
    ModelReport,
    SecondCopy,
    SectionReport,
)
from cogtools.inspection.sections import SECTIONS, section_beside, section_of
from cogtools.inspection.selection import Selection, matches, natural
from cogtools.layouts import diffusers
from cogtools.verification.verify import verify_lora
from tests.support.command_line import CommandLine, program, run_program, run_python
from tests.support.factories import (
    COGVIDEOX_2B,
    SAVERS,
    TOY_2B,
    module_shapes,
    sat_checkpoint,
    sat_state_dict,
    save_run,
    zoo,
)


@pytest.fixture
def inspect(cogtools_cli: CommandLine) -> CommandLine:
    """Run `cogtools inspect` in this process."""
    return partial(cogtools_cli, "inspect")


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A checkpoint file of a toy training, alone."""
    path = tmp_path / "toy.pt"
    torch.save(sat_checkpoint(sat_state_dict(TOY_2B, 4)), path)
    return path


# What torch.load sees


def described_by_torch(value: Any, path: str = "") -> dict[str, tuple[Any, ...]]:
    """Every tensor in nested containers: dtype, shape, stride, offset, and which storage it views."""
    if isinstance(value, torch.Tensor):
        facts = (
            str(value.dtype).removeprefix("torch."),
            tuple(value.shape),
            tuple(value.stride()),
            value.storage_offset(),
            value.untyped_storage()._cdata,
        )
        return {path: facts}
    items = list(value.items()) if isinstance(value, dict) else []
    items = list(enumerate(value)) if isinstance(value, list | tuple) else items
    found: dict[str, tuple[Any, ...]] = {}
    for name, item in items:
        found |= described_by_torch(item, f"{path}.{name}" if path else str(name))
    return found


def renumbered(described: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """The same with storages numbered by the keys, in order, that view them first."""
    numbers: dict[object, int] = {}
    return {key: (*facts[:-1], numbers.setdefault(facts[-1], len(numbers))) for key, facts in sorted(described.items())}


def described_by_report(report: CheckpointReport) -> dict[str, tuple[Any, ...]]:
    wrapper = report.wrapper + "." if report.wrapper else ""
    return {
        (wrapper if tensor.in_state_dict else "") + tensor.key: (
            tensor.dtype,
            tensor.shape,
            tensor.stride,
            tensor.storage_offset,
            tensor.storage,
        )
        for tensor in report.tensors
    }


@pytest.mark.parametrize("saver", [name for name in SAVERS if name != "cuda"])
def test_every_tensor_is_as_torch_loads_it(tmp_path: Path, saver: str) -> None:
    path = tmp_path / "a.pt"
    SAVERS[saver](sat_checkpoint(sat_state_dict(TOY_2B, 4)), path)
    loaded = torch.load(path, weights_only=False)
    assert renumbered(described_by_report(inspect_checkpoint(path))) == renumbered(described_by_torch(loaded))


def test_odd_tensors_are_as_torch_loads_them(tmp_path: Path) -> None:
    torch.save(zoo(), tmp_path / "zoo.pt")
    loaded = torch.load(tmp_path / "zoo.pt", weights_only=False)
    assert renumbered(described_by_report(inspect_checkpoint(tmp_path / "zoo.pt"))) == renumbered(
        described_by_torch(loaded)
    )


def test_the_real_trainers_tensors_are_as_torch_loads_them(real: Path) -> None:
    paths = sorted(real.glob("*/*/*.pt"))
    assert len(paths) >= 10
    for path in paths:
        loaded = torch.load(path, weights_only=False)
        found = described_by_report(inspect_checkpoint(path))
        assert renumbered(found) == renumbered(described_by_torch(loaded)), path


def test_offsets_are_where_the_bytes_are(tmp_path: Path) -> None:
    state = zoo()
    torch.save(state, tmp_path / "zoo.pt")
    content = (tmp_path / "zoo.pt").read_bytes()
    report = inspect_checkpoint(tmp_path / "zoo.pt", Selection(offsets=True, sort="offset"))
    offsets = [tensor.offset_bytes for tensor in report.tensors if tensor.offset_bytes is not None]
    assert offsets == sorted(offsets)
    assert len(offsets) == len(state)
    for tensor in report.tensors:
        first = state[tensor.key].detach().flatten()[:1].contiguous()
        found = content[tensor.offset_bytes :][: first.nbytes]
        assert found == first.view(torch.uint8).numpy().tobytes(), tensor.key
        assert tensor.file == tmp_path / "zoo.pt"


# The whole report


def test_the_report_of_a_training_says_what_is_in_it(toy: Path) -> None:
    report = inspect_checkpoint(toy, Selection(limit=0))
    layers = (0, 1, 2)
    shapes = module_shapes(TOY_2B, 4)
    parameters = {
        section: sum(
            math.prod(shape)
            for key, shape in shapes.items()
            # The embedding of T5 has two keys and one storage.
            if section_of(key) == section and not key.endswith("embed_tokens.weight")
        )
        for section in ("lora", "transformer", "text_encoder", "vae")
    }
    tensors = {section: sum(section_of(key) == section for key in shapes) for section in parameters}
    frozen = sum(parameters.values()) - parameters["lora"]
    rng_bytes = torch.Generator().get_state().numel() + 16
    assert report.lora is not None
    assert report.lora.readers[-1].why == "the file is not called mp_rank_00_model_states.pt"
    assert report == CheckpointReport(
        checkpoint=toy,
        format="torch.save (zip)",
        size_bytes=toy.stat().st_size,
        files=(),
        iterations=(),
        wrapper="module",
        state_dict_tensors=len(shapes),
        beside_tensors=len(shapes) - tensors["lora"] - 1 + 2,
        parameters=sum(parameters.values()),
        stored_bytes=2 * sum(parameters.values()) + rng_bytes,
        unviewed_bytes=0,
        dtypes=(DTypeReport("float16", len(shapes), sum(parameters.values()), 2 * sum(parameters.values())),),
        sections=(
            *(
                SectionReport(name, tensors[name], parameters[name], 2 * parameters[name], 2 * parameters[name])
                for name in parameters
            ),
            SectionReport("frozen_param_fragments", len(shapes) - tensors["lora"] - 1, frozen, 2 * frozen, 0),
            SectionReport("random_states", 2, rng_bytes, rng_bytes, rng_bytes),
        ),
        second_copy=None,
        trainer={
            "iteration": 1000,
            "global_steps": 1000,
            "global_samples": 1000,
            "skipped_steps": 0,
            "ds_version": "0.19.8",
            "dp_world_size": 1,
            "mp_world_size": 1,
        },
        entries=report.entries,  # in a test of their own
        not_tensors=(),
        globals=(
            GlobalReport("numpy._core.multiarray._reconstruct", 1, "harmless"),
            GlobalReport("numpy.dtype", 1, "harmless"),
            GlobalReport("numpy.ndarray", 1, "harmless"),
        ),
        metadata={},
        model=ModelReport("CogVideoX of no published size: 3 layers, hidden size 128", (), 3, 128),
        lora=LoraReport(
            layout="sat",
            names=None,
            tensors=24,
            size_bytes=24576,
            layers=layers,
            modules=12,
            ranks=(4,),
            dtypes=("float16",),
            complete=True,
            missing=(),
            unplaced=(),
            alpha=1,
            alpha_source="default",
            reader="SAT",
            unstated_scaling=0.25,
            misstated=(),
            scalings=(0.25,),
            export=ExportOutlook(
                possible=True,
                tensors=24,
                size_bytes=24576,
                formats=("diffusers", "peft", "comfyui", "videox-fun", "diffsynth", "sat"),
                notices=(
                    "There is no training_config.yaml with a lora_alpha, so alpha is 1, SAT's default. "
                    "If the training had another one, state it with --alpha.",
                ),
                hint=Hint(None, f"cogtools export-lora {toy} OUT_DIR"),
            ),
            readers=report.lora.readers,  # in tests of their own
        ),
        other_adapter=None,
        tensors=(),
        selected=2 * len(shapes) - tensors["lora"] + 1,
    )


def test_entries_are_told_in_few_words_whatever_they_hold() -> None:
    endless: list[object] = []
    endless.append(endless)
    wide: object = []
    for _ in range(100):
        wide = [wide] * 10  # 10 ** 100 items when written out
    found = [
        kind_of(value) for value in (None, True, 7, 0.5, 10**999, "a\nb", "x" * 101, b"abc", endless, wide, {1, 2})
    ]
    assert found == [
        *("None", "True", "7", "0.5", "a number of type int", '"a\\nb"', "101 characters", "3 bytes"),
        *("list of 1", "list of 10", "set of 2"),
    ]


def test_a_call_that_was_not_made_is_told_by_its_name(tmp_path: Path) -> None:
    class Config:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.path.join, ("a", "b")

    torch.save({"module": {"weight": torch.ones(2)}, "config": Config(), "note": None}, tmp_path / "a.pt")
    report = inspect_checkpoint(tmp_path / "a.pt")
    assert report.entries == (
        EntryReport("config", "a call of posixpath.join, not made"),
        EntryReport("note", "None"),
    )
    assert report.globals == (GlobalReport("posixpath.join", 1, "dangerous"),)


@pytest.mark.parametrize("values", ["equal", "other"])
def test_what_is_stored_twice_is_told_by_storages_and_their_crc32s(tmp_path: Path, values: str) -> None:
    checkpoint = sat_checkpoint(sat_state_dict(TOY_2B, 4), duplicate_frozen=True)
    copies = checkpoint["frozen_param_fragments"]
    if values == "other":
        for tensor in copies.values():
            tensor += 1
    torch.save(checkpoint, tmp_path / "a.pt")
    size_bytes = sum(tensor.nbytes for tensor in copies.values())
    report = inspect_checkpoint(tmp_path / "a.pt")
    expected = SecondCopy(len(copies), size_bytes, checked=len(copies)) if values == "equal" else None
    assert report.second_copy == expected
    (frozen,) = (section for section in report.sections if section.section == "frozen_param_fragments")
    assert frozen.stored_bytes == size_bytes


def test_without_crc32s_a_second_copy_is_told_by_its_keys(tmp_path: Path) -> None:
    checkpoint = sat_checkpoint(sat_state_dict(TOY_2B, 4), duplicate_frozen=True)
    SAVERS["without-crc32"](checkpoint, tmp_path / "a.pt")
    copies = checkpoint["frozen_param_fragments"]
    assert inspect_checkpoint(tmp_path / "a.pt").second_copy == SecondCopy(
        len(copies), sum(tensor.nbytes for tensor in copies.values()), checked=0
    )


@pytest.mark.parametrize(
    ("key", "section"),
    [
        ("model.diffusion_model.transformer.layers.0.attention.dense.matrix_A.0", "lora"),
        ("module.model.diffusion_model.transformer.layers.0.attention.dense.original.weight", "transformer"),
        ("mixins.patch_embed.proj.weight", "transformer"),
        ("transformer_blocks.0.attn1.to_q.weight", "transformer"),
        ("transformer.transformer_blocks.0.attn1.to_q.lora_A.weight", "lora"),
        ("conditioner.embedders.0.transformer.shared.weight", "text_encoder"),
        ("encoder.block.0.layer.0.layer_norm.weight", "text_encoder"),
        ("first_stage_model.encoder.conv_in.conv.weight", "vae"),
        ("encoder.conv_in.conv.weight", "vae"),
        ("frozen_param_fragments.first_stage_model.encoder.conv_in.conv.weight", "frozen_param_fragments"),
        ("optimizer.state.0.exp_avg", "optimizer"),
        ("cuda_rng_state", "random_states"),
        ("something.weight", "other"),
        ("lora_unet__transformer_blocks_0_attn1_to_q.lora_down.weight", "lora"),
        ("lora_unet__transformer_blocks_0_attn1_to_q.alpha", "lora"),
        ("diffusion_model.blocks.0.q.alpha", "lora"),
        ("first_stage_model.decoder.act.alpha", "vae"),
    ],
)
def test_a_key_belongs_to_one_section(key: str, section: str) -> None:
    assert section_of(key) == section
    assert section in SECTIONS


MATRIX_A = "model.diffusion_model.transformer.layers.0.attention.dense.matrix_A.0"


@pytest.mark.parametrize(
    ("container", "key", "section"),
    [
        ("params", MATRIX_A, "lora"),
        ("net.module", "model.diffusion_model.time_embed.0.bias", "transformer"),
        ("ema", "conditioner.embedders.0.transformer.shared.weight", "text_encoder"),
        ("text_encoder", "encoder.layers.0.mlp.fc1.weight", "text_encoder"),
        ("params_ema", "first_stage_model.encoder.conv_in.conv.weight", "vae"),
        ("frozen_param_fragments", MATRIX_A, "frozen_param_fragments"),
        ("state_dict.frozen_param_fragments", MATRIX_A, "frozen_param_fragments"),
        ("optimizer_state_dict.state." + MATRIX_A, "exp_avg", "optimizer"),
        ("state_dict", "torch_rng_state", "random_states"),
        ("lora", "first_stage_model.encoder.conv_in.conv.weight", "vae"),
        ("layers.0.lora_A", "weight", "lora"),
        ("", "x", "other"),
        ("a." * 100_000 + "b", "x", "other"),
    ],
    ids=lambda value: value[:40],
)
def test_a_tensor_beside_the_state_dict_belongs_where_its_container_or_its_key_says(
    container: str, key: str, section: str
) -> None:
    assert section_beside(container, key) == section


@pytest.mark.parametrize(
    ("wrap", "sections"),
    [
        (lambda state: {"params": state}, {"lora": 24, "transformer": 71, "text_encoder": 13, "vae": 104}),
        (lambda state: {"lora": state}, {"lora": 24, "transformer": 71, "text_encoder": 13, "vae": 104}),
        (
            lambda state: {**state, "optimizer": {"state": {0: {"exp_avg": torch.ones(9)}}}, "epoch": 3},
            {"lora": 24, "transformer": 71, "text_encoder": 13, "vae": 104, "optimizer": 1},
        ),
    ],
    ids=["params", "lora", "optimizer within"],
)
def test_no_tensor_is_hidden_by_a_name_that_is_not_known(
    tmp_path: Path, wrap: Callable[[dict[str, torch.Tensor]], dict[str, object]], sections: dict[str, int]
) -> None:
    torch.save(wrap(sat_state_dict(TOY_2B, 4)), tmp_path / "a.pt")
    report = inspect_checkpoint(tmp_path / "a.pt")
    assert {section.section: section.tensors for section in report.sections} == sections
    assert len(report.tensors) == sum(sections.values())


def test_a_lora_that_is_not_in_the_state_dict_is_found_under_its_own_name(inspect: CommandLine, tmp_path: Path) -> None:
    torch.save({"params": sat_state_dict(TOY_2B, 4)}, tmp_path / "a.pt")
    out = inspect(tmp_path / "a.pt").out
    assert "\n  tensors    212, none in a state dict, 1,255,491 parameters, float16\n" in out
    assert "\n  model      CogVideoX of no published size: 3 layers, hidden size 128\n" in out
    assert (
        "\n  LoRA       complete: 3 layers (0-2), rank 4, float16, 24 tensors, 24.6 kB "
        "(SAT's names after an unknown prefix 'params.model.diffusion_model.')\n" in out
    )
    assert "\n  exports to 24 tensors, 24.6 kB, in diffusers' layout\n" in out


def test_a_lora_that_is_spread_over_nested_dicts_is_said_to_be_out_of_export_loras_sight(
    inspect: CommandLine, tmp_path: Path
) -> None:
    torch.save({"params": {"layers": {0: {"lora_A": {"weight": torch.ones(2, 2)}}}}}, tmp_path / "a.pt")
    out = inspect(tmp_path / "a.pt").out
    assert "\n  LoRA       1 tensor, but not in the state dict (see --lora)\n" in out
    assert "\n  exports to nothing: its keys are spread over nested dicts\n" in out


def test_one_part_of_a_tensor_parallel_training_is_refused_under_two_wrappers_too(tmp_path: Path) -> None:
    inner = {"module": sat_state_dict(TOY_2B, 4, base="telling"), "mp_world_size": 2}
    torch.save({"state_dict": inner}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint, pytest.raises(ExportError) as raised:
        plan_lora(checkpoint, diffusers.LAYOUT)
    assert raised.value.found == "mp_world_size 2 in the checkpoint"


@pytest.mark.parametrize("path", ["ema", "nested.model"])
def test_copies_are_found_at_any_depth_and_counted_by_storages(tmp_path: Path, path: str) -> None:
    state = sat_state_dict(TOY_2B, 4)
    # The trainer's LoRA tensors share a storage, which clones of them do not: their CRC-32s cannot be compared.
    clones: object = {key: tensor.clone() for key, tensor in state.items()}
    size_bytes = sum(tensor.nbytes for tensor in state.values())
    for name in reversed(path.split(".")):
        clones = {name: clones}
    assert isinstance(clones, dict)
    torch.save({"module": state, **clones}, tmp_path / "a.pt")
    report = inspect_checkpoint(tmp_path / "a.pt")
    tied = state["conditioner.embedders.0.transformer.shared.weight"].nbytes
    assert report.second_copy == SecondCopy(len(state), size_bytes, checked=len(state) - 24)
    assert report.stored_bytes == 2 * size_bytes - tied


def test_bytes_that_no_tensor_views_are_counted(inspect: CommandLine, tmp_path: Path) -> None:
    large = torch.zeros(1_000_000)
    views = {"a": large[:10], "b": large[5:20], "c": large[100:110].flip(0), "transposed": torch.ones(3, 4).T}
    torch.save({"module": views}, tmp_path / "a.pt")
    report = inspect_checkpoint(tmp_path / "a.pt")
    assert (report.stored_bytes, report.unviewed_bytes) == (4_000_000 + 40 + 48, 4_000_000 - 80)
    assert "unused     4.0 MB of 4.0 MB belong to no tensor" in inspect(tmp_path / "a.pt").out


def test_a_file_that_is_one_tensor_is_shown(inspect: CommandLine, tmp_path: Path) -> None:
    torch.save(torch.ones(3), tmp_path / "a.pt")
    out = inspect(tmp_path / "a.pt").out
    assert "\n  tensors    1, not in a state dict, 3 parameters, float32\n" in out
    assert out.endswith("\n<tensor>  float32  (3,)      12  other\n")


# LoRAs


def lora_facts(report: CheckpointReport) -> tuple[Any, ...]:
    lora = report.lora
    assert lora is not None
    return lora.layout, lora.complete, lora.missing, lora.ranks, lora.alpha, lora.alpha_source, lora.scalings


def test_what_a_lora_lacks_is_folded(tmp_path: Path) -> None:
    state = sat_state_dict(COGVIDEOX_2B, 4, base="telling")
    gone = [key for key in state if any(f"layers.{layer}." in key for layer in (3, 4, 5)) and "matrix_B.2" in key]
    gone += [key for key in state if "layers.29." in key and ".matrix_" in key]
    for key in gone:
        del state[key]
    torch.save({"module": state}, tmp_path / "a.pt")
    report = inspect_checkpoint(tmp_path / "a.pt")
    assert lora_facts(report) == (
        "sat",
        False,
        ("layers 3-5: to_v lora_B", "layer 29: all tensors"),
        (4,),
        1,
        "default",
        (0.25,),
    )
    assert report.lora is not None
    outlook = report.lora.export
    assert outlook is not None
    assert (outlook.possible, outlook.reason, [problem.subject for problem in outlook.problems]) == (
        False,
        "the LoRA in this checkpoint cannot be exported as it is",
        ["layers 3-5: to_v lora_B", "layer 29: all tensors"],
    )


def diffusers_lora(layers: range) -> dict[str, torch.Tensor]:
    return {
        f"transformer.transformer_blocks.{layer}.attn1.{module}.lora_{factor}.weight": torch.ones(shape)
        for layer in layers
        for module in ("to_q", "to_k", "to_v", "to_out.0")
        for factor, shape in (("A", (4, 1920)), ("B", (1920, 4)))
    }


def test_a_lora_in_diffusers_layout_is_held_against_its_model(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(diffusers_lora(range(28)), path)
    report = inspect_checkpoint(path)
    missing = ("layers 28-29: all tensors",)
    assert lora_facts(report) == ("diffusers", False, missing, (4,), None, None, (1.0,))
    assert report.model == ModelReport("CogVideoX-2B", ("2b",), 30, 1920)


def test_a_lora_in_diffusers_layout_is_complete_if_it_has_the_layers_that_it_states(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    names = (key.removeprefix("transformer.").removesuffix(".lora_A.weight") for key in diffusers_lora(range(28)))
    modules = [module for name in names if (module := diffusers.parse_module(name)) is not None]
    metadata = carry(diffusers.LAYOUT, dict.fromkeys(modules, 4), dict.fromkeys(modules, 2)).header
    save_file(diffusers_lora(range(28)), path, metadata=metadata)
    report = inspect_checkpoint(path)
    assert lora_facts(report) == ("diffusers", True, (), (4,), 2, "lora_adapter_metadata", (0.5,))


@pytest.mark.parametrize(
    "metadata", ["{", "[]", '{"transformer.lora_alpha": "4"}', '{"transformer.lora_alpha": Infinity}', "[" * 100_000]
)
def test_metadata_that_states_no_alpha_is_no_error(tmp_path: Path, metadata: str) -> None:
    save_file(diffusers_lora(range(30)), tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": metadata})
    report = inspect_checkpoint(tmp_path / "a.safetensors")
    assert lora_facts(report) == ("diffusers", True, (), (4,), None, None, ())


@pytest.mark.parametrize(
    ("stated", "scalings"),
    [
        pytest.param({"r": 4, "lora_alpha": 1}, (0.25,), id="plain"),
        pytest.param({"r": 4, "lora_alpha": 1, "use_rslora": True}, (0.5,), id="rank-stabilised"),
        pytest.param({"r": 4, "lora_alpha": 1, "layers_to_transform": list(range(10))}, (0.25,), id="some-layers"),
        pytest.param({"r": 4, "lora_alpha": 1, "alpha_pattern": {"to_q": 2}}, (0.25, 0.5), id="two-alphas"),
        pytest.param({"r": 4}, (), id="no-alpha"),
        pytest.param(None, (1.0,), id="nothing"),
    ],
)
def test_inspect_and_verify_read_what_a_file_states_alike(
    tmp_path: Path, stated: dict[str, Any] | None, scalings: tuple[float, ...]
) -> None:
    metadata = {}
    if stated is not None:
        stated = {"target_modules": ["to_q", "to_k", "to_v", "to_out.0"], "rank_pattern": {}, **stated}
        metadata["lora_adapter_metadata"] = json.dumps({f"transformer.{name}": stated[name] for name in stated})
    layers = range(10 if stated and "layers_to_transform" in stated else 30)
    save_file(diffusers_lora(layers), tmp_path / "a.safetensors", metadata=metadata)
    seen = inspect_checkpoint(tmp_path / "a.safetensors").lora
    proven = verify_lora(tmp_path)
    complete = next(check.status == "pass" for check in proven.checks if check.name == "complete")
    assert seen is not None
    assert (seen.complete, seen.scalings) == (complete, scalings)
    assert proven.scaling == scalings


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({}, "alpha      not stated: diffusers runs it at scaling 1"),
        (
            {"lora_adapter_metadata": '{"transformer.r": 4}'},
            "alpha      cannot be used: missing: lora_alpha (found diffusers and PEFT then take 8, expected the value)",
        ),
    ],
)
def test_a_scale_that_is_not_stated_is_told_for_what_it_does(
    inspect: CommandLine, tmp_path: Path, metadata: dict[str, str], told: str
) -> None:
    save_file(diffusers_lora(range(30)), tmp_path / "a.safetensors", metadata=metadata)
    assert f"  {told}\n" in inspect(tmp_path / "a.safetensors").out


def test_a_peft_folder_states_its_alpha_in_a_file_of_its_own(tmp_path: Path) -> None:
    tensors = {
        "base_model.model." + key.removeprefix("transformer."): value
        for key, value in diffusers_lora(range(30)).items()
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    report = inspect_checkpoint(tmp_path)
    assert lora_facts(report) == ("peft", True, (), (4,), 8, "adapter_config.json", (2,))


def test_a_peft_folder_without_its_configuration_is_told_that_peft_loads_nothing(
    inspect: CommandLine, tmp_path: Path
) -> None:
    tensors = {
        f"base_model.model.{key.removeprefix('transformer.')}": x for key, x in diffusers_lora(range(30)).items()
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    told = "  alpha      not stated: PEFT loads nothing without it\n"
    assert told in inspect(tmp_path / "adapter_model.safetensors").out


def test_a_lora_in_a_layout_that_is_not_known_is_told_by_its_keys(tmp_path: Path) -> None:
    key = "network.layers.0.lora_A.weight"
    save_file({key: torch.ones(4, 8)}, tmp_path / "a.safetensors")
    report = inspect_checkpoint(tmp_path / "a.safetensors")
    assert lora_facts(report) == (None, None, (), (), None, None, ())
    assert report.lora is not None
    assert report.lora.unplaced == (key,)


@pytest.mark.parametrize(
    ("rename", "layout", "names"),
    [
        (
            lambda key: key.replace("transformer.", "diffusion_model.", 1),
            "videox-fun",
            "diffusers' names after ComfyUI's prefix",
        ),
        (
            lambda key: key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
            "diffusers",
            "diffusers' names with lora_down and lora_up for lora_A and lora_B",
        ),
    ],
    ids=["ComfyUI's prefix", "down and up"],
)
def test_a_lora_with_other_names_is_recognised(
    inspect: CommandLine, tmp_path: Path, rename: Callable[[str], str], layout: str, names: str
) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {rename(key): value for key, value in diffusers_lora(range(29)).items()}
    alphas = {f"{key.partition('.lora_')[0]}.alpha": torch.tensor(1.0) for key in tensors}
    save_file(tensors | alphas, path)
    report = inspect_checkpoint(path)
    missing = ("layer 29: all tensors",)
    assert lora_facts(report) == (layout, False, missing, (4,), 1, "alpha tensors", (0.25,))
    lora = report.lora
    assert lora is not None
    assert (lora.names, lora.dtypes, lora.unplaced, lora.tensors) == (names, ("float32",), (), 29 * 8 + 29 * 4)
    out = inspect(path, "--stats", "--limit", "0").out
    assert f"\n  LoRA       incomplete: 29 layers (0-28), rank 4, float32, 348 tensors, 7.1 MB ({names})\n" in out
    assert "\n  alpha      1 (stated in alpha tensors), scaling 1/4 = 0.25\n" in out
    assert (
        "\n  no export  the LoRA in this checkpoint cannot be exported as it is\n"
        "             missing: layer 29: all tensors\n"
        "             try: if only these layers were trained, export with --allow-partial\n" in out
    )


def test_the_updates_of_a_lora_in_no_known_layout_are_not_computed(inspect: CommandLine, tmp_path: Path) -> None:
    save_file({"network.layers.0.lora_A.weight": torch.ones(4, 8)}, tmp_path / "a.safetensors")
    out = inspect(tmp_path / "a.safetensors", "--stats", "--limit", "0").out
    assert "\nThe updates of a LoRA in this layout are not computed.\n" in out


def test_a_lora_that_is_in_diffusers_layout_already_exports_too(inspect: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(diffusers_lora(range(30)), path)
    assert (
        "\n  exports to 240 tensors, 7.4 MB, in diffusers' layout\n"
        "             Nothing states the scale: taken as 1, as diffusers does. Trainers that lose it, with the scaling "
        "of their defaults: CogVideo's finetune 0.5, VideoX-Fun with --use_peft_lora 0.5, SAT's own exporter 1/rank. "
        "State it with --alpha, or in export-lora with --scaling.\n"
        "  formats    diffusers, peft, comfyui, videox-fun, diffsynth, sat\n"
        f"             try: cogtools export-lora {path} OUT_DIR --format comfyui --alpha A\n" in inspect(path).out
    )


def test_the_advice_to_inspect_is_not_given_by_inspect(inspect: CommandLine, tmp_path: Path) -> None:
    state = sat_state_dict(COGVIDEOX_2B, 4, base="telling")
    torch.save({key: value for key, value in state.items() if ".layers.3." not in key}, tmp_path / "a.pt")
    out = inspect(tmp_path / "a.pt").out
    assert "  try: if only these layers were trained, export with --allow-partial\n" in out
    assert "cogtools inspect" not in out


# Names that can run code


@pytest.mark.parametrize(
    ("module", "name", "danger"),
    [
        *(("posix", "system", "dangerous"), ("nt", "system", "dangerous"), ("os", "getcwd", "dangerous")),
        *(("subprocess", "Popen", "dangerous"), ("builtins", "eval", "dangerous"), ("builtins", "dict", "harmless")),
        *(("__builtin__", "getattr", "dangerous"), ("runpy", "run_path", "dangerous")),
        *(("operator", "attrgetter", "dangerous"), ("functools", "partial", "dangerous")),
        *(("torch.hub", "load", "dangerous"), ("torch", "load", "dangerous"), ("torch.storage", "x", "unknown")),
        *(("torch.storage", "_load_from_bytes", "dangerous"), ("importlib.util", "find_spec", "dangerous")),
        *(("pip._internal", "main", "dangerous"), ("pipeline", "main", "unknown")),
        *(("numpy", "ndarray", "harmless"), ("numpy", "ndarray.tofile", "dangerous")),
        *(("numpy", "__builtins__", "dangerous"), ("mine", "Config.os.system", "dangerous")),
        *(("argparse", "Namespace", "harmless"), ("argparse", "FileType", "dangerous")),
        *(("mine", "Config", "unknown"), ("copyreg extension", "7", "unknown")),
    ],
)
def test_a_name_is_judged_by_module_and_name(module: str, name: str, danger: str) -> None:
    assert danger_of(module, name) == danger


def test_a_pickle_that_would_run_code_is_looked_at_and_named(inspect: CommandLine, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"module": {"weight": torch.ones(2)}, "bomb": Bomb()}, tmp_path / "a.pt")
    result = inspect(tmp_path / "a.pt")
    assert result.code == 0
    assert "  DANGER     posix.system (1x): can run code if this file is loaded elsewhere\n" in result.out
    assert "             None of these names was imported or called.\n" in result.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt"]


# Text and JSON


GOLDEN = """\
{path}
  format     torch.save (zip), {size}
  tensors    3 in 'module', 15 parameters, float32 48 bytes, int64 24 bytes; 1 more outside the state dict
  trainer    iteration 7
  also holds note

  section                  tensors      parameters     stored  share
  transformer                    2              12   48 bytes  60.0%
  other                          1               3   24 bytes  30.0%
  random_states                  1               8    8 bytes  10.0%

key                               dtype    shape  bytes  section
transformer.layers.2.mlp.weight   float32  (2,3)     24  transformer
transformer.layers.10.mlp.weight  float32  (2,3)     24  transformer
steps                             int64    (3,)      24  other
torch_rng_state                   uint8    (8,)       8  random_states
"""


def small_checkpoint() -> dict[str, object]:
    state = {
        "steps": torch.arange(3),
        "transformer.layers.10.mlp.weight": torch.ones(2, 3),
        "transformer.layers.2.mlp.weight": torch.ones(2, 3),
    }
    rng = torch.zeros(8, dtype=torch.uint8)
    return {"module": state, "iteration": 7, "note": "hi", "nothing": None, "torch_rng_state": rng}


def test_text_and_json_are_two_renderings_of_one_report(inspect: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(small_checkpoint(), path)
    text = inspect(path)
    assert (text.code, text.err) == (0, "")
    assert text.out == GOLDEN.format(path=path, size=f"{path.stat().st_size / 1000:.1f} kB")
    (report,) = inspect(path, "--json").json["report"]["checkpoints"]
    assert [(tensor["key"], tensor["section"], tensor["dtype"], tensor["shape"], tensor["size_bytes"])
            for tensor in report["tensors"]] == [
        ("transformer.layers.2.mlp.weight", "transformer", "float32", [2, 3], 24),
        ("transformer.layers.10.mlp.weight", "transformer", "float32", [2, 3], 24),
        ("steps", "other", "int64", [3], 24),
        ("torch_rng_state", "random_states", "uint8", [8], 8),
    ]  # fmt: skip
    assert report["entries"] == [
        {"name": "iteration", "kind": "7"},
        {"name": "note", "kind": '"hi"'},
        {"name": "nothing", "kind": "None"},
    ]


NOT_WITH_TREE = "does not go with --tree, which folds all the tensors of equal layers into one line"

OPTIONS = [
    [], ["--tree"], ["--tree", "--stats"],
    ["--lora"], ["--offsets"], ["--sort", "size"], ["--sort", "offset"], ["--limit", "3"], ["--stats"],
    ["--keys", "*layers.1.*"], ["--section", "vae", "--stats", "--offsets"], ["--keys", "nothing like this"],
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_json_keeps_to_its_schema(inspect: CommandLine, toy: Path, options: list[str]) -> None:
    result = inspect(toy, "--json", *options)
    assert (result.code, result.err) == (0, "")
    assert [found["state_dict_tensors"] for found in result.json["report"]["checkpoints"]] == [212]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_text_ends_well_with_every_option(inspect: CommandLine, toy: Path, options: list[str]) -> None:
    result = inspect(toy, *options)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"{toy}\n  format     torch.save (zip)")


@pytest.mark.parametrize(
    ("content", "options", "what"),
    [
        (b"epoch 1: loss 0.3\n", [], "this is not a checkpoint"),
        (b"", [], "this is not a checkpoint"),
        (b"PK\x03\x04 and no more", [], "the file is cut short: this zip archive has no directory at its end"),
        (None, [], "there is no such file"),
        (b"", ["--sort", "colour"], "Invalid value for '--sort': 'colour' is not one of 'key', 'size', 'offset'"),
        (b"", ["--section", "lorra"], "there is no such section"),
        (b"", ["--limit", "-1"], "--limit is a number of tensors"),
        (b"", ["--limit", "x"], "Invalid value for '--limit': 'x' is not a valid int"),
        (b"", ["--plot", "a.gif"], "--plot draws a picture"),
        (b"", ["--tree", "--limit", "5"], f"--limit {NOT_WITH_TREE}"),
        (b"", ["--tree", "--offsets"], f"--offsets {NOT_WITH_TREE}"),
        (b"", ["--tree", "--sort", "size"], f"--sort {NOT_WITH_TREE}"),
    ],
)
def test_bad_input_is_told_in_text_and_json_and_ends_with_2(
    inspect: CommandLine, tmp_path: Path, content: bytes | None, options: list[str], what: str
) -> None:
    if content is not None:
        (tmp_path / "a.pt").write_bytes(content)
    text = inspect(tmp_path / "a.pt", *options)
    assert (text.code, text.out, text.err.splitlines()[0]) == (2, "", f"error: {what}")
    found = inspect(tmp_path / "a.pt", "--json", *options)
    assert (found.code, found.err) == (2, "")
    assert found.json["error"]["what"] == what


def test_no_checkpoint_at_all_is_a_usage_error(inspect: CommandLine) -> None:
    usage = "error: Missing argument 'CHECKPOINT...'\n  try:       cogtools inspect --help\n"
    assert inspect() == (2, "", usage)


def test_several_checkpoints_are_shown_one_after_the_other(inspect: CommandLine, tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.save({"module": {name: torch.ones(1)}}, tmp_path / name)
    found = inspect(tmp_path / "a", tmp_path / "b", "--json").json
    keys = [[tensor["key"] for tensor in one["tensors"]] for one in found["report"]["checkpoints"]]
    assert keys == [["a"], ["b"]]
    text = inspect(tmp_path / "a", tmp_path / "b").out
    assert [line for line in text.splitlines() if line.startswith(str(tmp_path))] == [
        *(str(tmp_path / "a"), str(tmp_path / "b"))
    ]


# Folders


def test_a_save_folder_lists_its_iterations(tmp_path: Path) -> None:
    checkpoint = sat_checkpoint(sat_state_dict(TOY_2B, 4))
    save_run(tmp_path / "run", checkpoint, ema=checkpoint, rank=4, alpha=2)
    report = inspect_checkpoint(tmp_path / "run", ema=True)
    assert report.iterations == (
        IterationReport("1000", ema=False, latest=True, inspected=False),
        IterationReport("1000-ema", ema=True, latest=False, inspected=True),
    )
    assert lora_facts(report) == ("sat", True, (), (4,), 2, "training_config.yaml", (0.5,))


def test_sharded_weights_list_their_files(tmp_path: Path) -> None:
    for number, key in enumerate(("a", "b")):
        save_file({key: torch.ones(3)}, tmp_path / f"model-{number}.safetensors")
    weight_map = {"a": "model-0.safetensors", "b": "model-1.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    report = inspect_checkpoint(tmp_path, Selection(offsets=True))
    size_bytes = (tmp_path / "model-0.safetensors").stat().st_size
    assert report.files == tuple(
        FileReport(tmp_path / name, "safetensors", size_bytes, 1) for name in weight_map.values()
    )
    assert [(tensor.key, tensor.file) for tensor in report.tensors] == [
        (key, tmp_path / name) for key, name in weight_map.items()
    ]


def test_of_many_iterations_the_first_the_last_and_the_marked_ones_are_named(
    inspect: CommandLine, tmp_path: Path
) -> None:
    for number in range(100, 2100, 100):
        (tmp_path / str(number)).mkdir()
        torch.save({"module": {"a": torch.ones(1)}}, tmp_path / str(number) / "mp_rank_00_model_states.pt")
    (tmp_path / "latest").write_text("2000")
    out = inspect(tmp_path, "--iteration", "1000").out
    assert "\n  iterations 100, 200, 300 … 1000 (this one) … 1800, 1900, 2000 (latest); 20 in all\n" in out
    for number in range(700, 2100, 100):
        (tmp_path / str(number) / "mp_rank_00_model_states.pt").unlink()
    assert "\n  iterations 100, 200 (this one), 300, 400, 500, 600\n" in inspect(tmp_path, "--iteration", "200").out


def test_the_files_of_a_pipeline_are_named_with_their_component(inspect: CommandLine, tmp_path: Path) -> None:
    for component in ("transformer", "vae"):
        (tmp_path / component).mkdir()
        save_file({"a": torch.ones(3)}, tmp_path / component / "diffusion_pytorch_model.safetensors")
    (tmp_path / "model_index.json").write_text('{"transformer": [], "vae": []}')
    lines = inspect(tmp_path).out.splitlines()
    assert [line.split(":")[0].strip() for line in lines[2:4]] == [
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]


# Which tensors


def test_keys_are_globs_or_parts_of_a_key() -> None:
    key = "model.layers.10.weight"
    patterns = ("layers.10", "*.weight", "layers.*", "model.layers.1[0-9].*", "Layers", "model.layers.?.weight")
    assert [matches(key, pattern) for pattern in patterns] == [True, True, False, True, False, False]


def test_layers_come_in_the_order_of_their_numbers() -> None:
    keys = ["a.10.b", "a.9.b", "a.9", "b", "10", "9", "a", f"a.{'9' * 40}.b"]
    assert sorted(keys, key=natural) == ["9", "10", "a", "a.9", "a.9.b", "a.10.b", f"a.{'9' * 40}.b", "b"]


def test_a_selection_lists_what_fits_and_says_how_many_there_are(tmp_path: Path) -> None:
    state = OrderedDict((f"layers.{layer}.weight", torch.ones(layer + 1)) for layer in range(12))
    torch.save({"module": state}, tmp_path / "a.pt")

    def listed(selection: Selection) -> tuple[list[str], int]:
        report = inspect_checkpoint(tmp_path / "a.pt", selection)
        return [tensor.key.split(".")[1] for tensor in report.tensors], report.selected

    assert listed(Selection(limit=3)) == (["0", "1", "2"], 12)
    assert listed(Selection(sort="size", limit=2)) == (["11", "10"], 12)
    assert listed(Selection(keys=("layers.1?.*", "rs.3."))) == (["3", "10", "11"], 3)
    assert listed(Selection(lora=True)) == ([], 0)
    assert listed(Selection(section="vae")) == ([], 0)


def test_nothing_that_matches_is_said_in_plain_words(inspect: CommandLine, toy: Path) -> None:
    assert inspect(toy, "--keys", "nothing like this").out.endswith("\n\nno tensors match\n")


def test_into_a_pipe_every_column_is_one_word_and_bytes_are_exact(inspect: CommandLine, toy: Path) -> None:
    table = inspect(toy, "--offsets").out.partition("\nkey ")[2].splitlines()
    assert table[0].split() == ["dtype", "shape", "bytes", "offset", "section"]
    listed = inspect_checkpoint(toy, Selection(offsets=True)).tensors
    assert [line.split() for line in table[1:]] == [
        [
            tensor.key, tensor.dtype, str(tensor.shape).replace(" ", ""),
            str(tensor.size_bytes), str(tensor.offset_bytes), tensor.section,
        ]
        for tensor in listed
    ]  # fmt: skip


def test_selections_that_make_no_sense_are_refused(toy: Path) -> None:
    with pytest.raises(CogtoolsError):
        inspect_checkpoint(toy, Selection(section="lorra"))


# What it takes


@pytest.mark.skipif(sys.platform != "linux", reason="counts reads in /proc/self/io")
def test_no_weights_are_read_to_look(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"module": {"weight": torch.zeros(4_000_000)}}, path)  # 16 MB
    code = (
        "from cogtools import inspect_checkpoint\n"
        "import cogtools.inspection.inspect\n"
        "def read_bytes(): return int(open('/proc/self/io').readline().split()[1])\n"
        "before = read_bytes()\n"
        f"inspect_checkpoint({str(path)!r})\n"
        "print(read_bytes() - before)"
    )
    assert int(run_python(code).out) < 2_000_000


def test_a_reader_that_closes_the_pipe_is_no_error(tmp_path: Path) -> None:
    torch.save({"module": {f"layers.{layer}.weight": torch.ones(1) for layer in range(5000)}}, tmp_path / "a.pt")
    command = f"{shlex.join(program('inspect', tmp_path / 'a.pt'))} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'a.pt'}\n", "")


def test_whatever_a_file_says_nothing_in_it_acts_on_the_terminal(tmp_path: Path) -> None:
    evil = "\x1b[2J\u202e[red]evil\r\n.weight"
    state = {evil: torch.ones(2), "not": evil, "x" * 100_000: torch.ones(1), ".".join("a" * 5000): torch.ones(1)}
    values = {"iteration": evil, "ds_version": "\x1b]0;evil\x07", evil: pickle.PickleBuffer}
    torch.save({"module": state, **values}, tmp_path / "a.pt")
    for options in ([], ["--tree"], ["--stats"], ["--keys", "evil"]):
        done = run_program("inspect", tmp_path / "a.pt", *options)
        assert (done.code, done.err) == (0, "")
        assert not set(done.out) - {"\n"} & {chr(code) for code in range(32)}
        assert "\u202e" not in done.out
        assert len(done.out) < 1_000_000
