"""Checkpoints of which no right LoRA can be made: each is told what it is, the whole message once."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from cogtools.checkpoint.opening import open_checkpoint
from cogtools.conversion.plan import plan_lora
from cogtools.errors import ExportError
from cogtools.layouts import diffusers
from tests.support.factories import (
    TEXT_ENCODER,
    TOY_2B,
    TRANSFORMER,
    VAE,
    StateDict,
    sat_checkpoint,
    sat_state_dict,
    zero3_checkpoint,
)
from tests.support.oracles import torch_load

EXPECTED = "keys such as …layers.0.attention.query_key_value.matrix_A.0, or those of another trainer's LoRA"
RANK_00 = "mp_rank_00_model_states.pt"


@pytest.fixture(scope="module")
def base() -> StateDict:
    return sat_state_dict(TOY_2B, None)


def error_of(path: Path) -> ExportError:
    with open_checkpoint(path) as checkpoint, pytest.raises(ExportError) as caught:
        plan_lora(checkpoint, diffusers.LAYOUT, alpha=1)
    return caught.value


def message_of(value: object, folder: Path, name: str = "x.pt") -> str:
    """The whole message, without the path of the test's folder."""
    torch.save(value, folder / name)
    return str(error_of(folder / name)).replace(str(folder / name), "x.pt")


EXPORT = "to convert it for diffusers: cogtools export-model x.pt OUT_DIR"


def no_lora(found: str, hint: str = "cogtools inspect x.pt") -> str:
    return (
        "there is no LoRA in this checkpoint\n"
        f"  file:      x.pt\n  found:     {found}\n  expected:  {EXPECTED}\n  try:       {hint}"
    )


def only(state: StateDict, prefix: str, *, bare: bool = False) -> StateDict:
    return OrderedDict(
        (key.removeprefix(prefix) if bare else key, tensor) for key, tensor in state.items() if key.startswith(prefix)
    )


# LoRAs that are not whole

TENSOR_PARALLEL = (
    "this is one part of a tensor-parallel training, whose LoRA cannot be put together\n"
    "  file:      x.pt\n"
    "  found:     {}\n"
    "  expected:  a training with model_parallel_size 1\n"
    "  try:       train again with model_parallel_size 1: SAT never adds up the ranks' shares of attention.dense's "
    "LoRA, so they have drifted apart and no merge gives back what was trained"
)


def test_a_tensor_parallel_run_is_refused_by_what_its_file_says(tmp_path: Path) -> None:
    made = sat_checkpoint(sat_state_dict(TOY_2B, 4, base="none"), mp_world_size=2)

    assert message_of(made, tmp_path) == TENSOR_PARALLEL.format("mp_world_size 2 in the checkpoint")


def test_a_tensor_parallel_run_is_refused_by_the_file_of_the_other_rank(tmp_path: Path) -> None:
    (tmp_path / "mp_rank_01_model_states.pt").touch()
    made = {"module": sat_state_dict(TOY_2B, 4, base="none")}

    found = "mp_rank_01_model_states.pt beside it"
    assert message_of(made, tmp_path, RANK_00) == TENSOR_PARALLEL.format(found)


def test_a_tensor_parallel_run_is_refused_through_a_link_too(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    torch.save({"module": sat_state_dict(TOY_2B, 4, base="none")}, tmp_path / "run" / RANK_00)
    (tmp_path / "run" / "mp_rank_01_model_states.pt").touch()
    (tmp_path / "best.pt").symlink_to(tmp_path / "run" / RANK_00)

    assert error_of(tmp_path / "best.pt").found == "mp_rank_01_model_states.pt beside it"


def test_the_file_of_another_rank_is_refused_by_its_name(tmp_path: Path) -> None:
    made = {"module": sat_state_dict(TOY_2B, 4, base="none")}
    torch.save(made, tmp_path / "mp_rank_03_model_states.pt")

    assert error_of(tmp_path / "mp_rank_03_model_states.pt").found == "mp_rank_03_model_states.pt, the file of rank 3"


def divided(state: StateDict, ranks: int) -> StateDict:
    """The first tensor-parallel rank's part of a LoRA."""
    made: StateDict = OrderedDict()
    for key, tensor in state.items():
        if "query_key_value.matrix_B" in key:
            made[key] = tensor.chunk(ranks)[0].clone()
        elif "dense.matrix_A" in key:
            made[key] = tensor.chunk(ranks, dim=1)[0].clone()
        else:
            made[key] = tensor
    return made


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_tensor_parallel_run_is_refused_by_its_shapes(ranks: int, tmp_path: Path) -> None:
    made = divided(sat_state_dict(TOY_2B, 4, base="none"), ranks)

    found = f"shapes of one of {ranks} ranks, which divide the hidden size among them"
    assert message_of(made, tmp_path) == TENSOR_PARALLEL.format(found)


def test_the_shapes_of_the_real_tensor_parallel_run_tell_it(real: Path, tmp_path: Path) -> None:
    module = torch_load(real / "2b-fp32-mp2" / "1" / RANK_00)["module"]
    torch.save({"module": module}, tmp_path / "x.pt")

    assert error_of(tmp_path / "x.pt").found == "shapes of one of 2 ranks, which divide the hidden size among them"


@pytest.mark.parametrize("rank", ["00", "01"])
def test_both_files_of_the_real_tensor_parallel_run_are_refused(real: Path, rank: str) -> None:
    error = error_of(real / "2b-fp32-mp2" / "1" / f"mp_rank_{rank}_model_states.pt")

    assert (error.what, error.found) == (
        "this is one part of a tensor-parallel training, whose LoRA cannot be put together",
        "mp_world_size 2 in the checkpoint",
    )


def zero3(part: float, **attributes: Any) -> dict[str, Any]:
    """A ZeRO-3 file of which a rank kept this part of every tensor."""
    made = zero3_checkpoint(sat_state_dict(TOY_2B, 4, base="none"))
    for key, tensor in made["module"].items():
        kept = tensor[: int(tensor.numel() * part)].clone()
        vars(kept).update({"ds_shape": tensor.ds_shape} | attributes)
        made["module"][key] = kept
    return made


def test_a_part_of_a_zero_3_run_is_refused(tmp_path: Path) -> None:
    assert message_of(zero3(0.5), tmp_path) == (
        "this is one part of a ZeRO-3 training: the rest of every tensor is missing\n"
        "  file:      x.pt\n"
        "  found:     256 elements of module.model.diffusion_model.transformer.layers.0.attention."
        "query_key_value.matrix_A.0\n"
        "  expected:  512 elements, for its shape (4, 128)\n"
        "  try:       train with ZeRO stage 2, or with one data-parallel rank: SAT keeps one rank's file only"
    )


def test_the_real_part_of_a_zero_3_run_is_refused(real: Path) -> None:
    error = error_of(real / "5b-bf16-z3-part")

    assert error.what == "this is one part of a ZeRO-3 training: the rest of every tensor is missing"


def test_a_whole_zero_3_file_is_planned_in_its_true_shapes(tmp_path: Path) -> None:
    torch.save(zero3(1), tmp_path / "flat.pt")
    torch.save({"module": sat_state_dict(TOY_2B, 4, base="none")}, tmp_path / "plain.pt")

    planned = []
    for name in ("flat.pt", "plain.pt"):
        with open_checkpoint(tmp_path / name) as checkpoint:
            plan = plan_lora(checkpoint, diffusers.LAYOUT, alpha=1)
        planned.append((plan.rank, [(name, plan.entry(name).shape) for name in plan.names]))
    assert planned[0] == planned[1]
    assert planned[0][0] == 4


@pytest.mark.parametrize(
    "shape",
    [(-4, -128), (2**63, 1), (10**2000,) * 3, (2,) * 65, (4.0, 128.0), "4 x 128", (True, 512)],
    ids=["negative", "2-to-63", "huge", "65-d", "floats", "text", "bool"],
)
def test_a_true_shape_that_cannot_be_is_none(shape: object, tmp_path: Path) -> None:
    torch.save(zero3(1, ds_shape=shape), tmp_path / "x.pt")
    error = error_of(tmp_path / "x.pt")

    assert (error.what, len(error.problems)) == ("the LoRA in this checkpoint cannot be exported as it is", 24)
    assert {(problem.found, problem.expected) for problem in error.problems} == {("(512,)", "two dimensions")}


# Something else


def test_a_base_model_is_told_from_a_lora(base: StateDict, tmp_path: Path) -> None:
    assert message_of({"module": base}, tmp_path) == no_lora(
        f"a base model without a LoRA ({len(base)} tensors)", EXPORT
    )
    transformer = only(base, TRANSFORMER, bare=True)
    found = f"a base model without a LoRA ({len(transformer)} tensors)"
    assert message_of(transformer, tmp_path) == no_lora(found, EXPORT)


@pytest.mark.parametrize(
    "key",
    [
        "transformer.transformer_blocks.0.attn2.to_q.lora_A.weight",
        "text_encoder.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
        "unet.down_blocks.0.attentions.0.lora.down.weight",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
    ],
)
def test_a_lora_of_another_model_is_named_by_a_key(key: str, tmp_path: Path) -> None:
    assert message_of({key: torch.zeros(4, 8)}, tmp_path) == no_lora(
        f"a LoRA whose keys are no known program's: {key} …"
    )


@pytest.mark.parametrize(
    ("key", "found", "hint"),
    [
        (
            "lycoris_transformer_blocks_0_attn1_to_q.lokr_w1",
            "a LyCORIS LoKr",
            "load it with lycoris (create_lycoris_from_weights, merge_to): cogtools does not convert these",
        ),
        (
            "base_model.model.transformer_blocks.0.ff.net.2.ia3_l",
            "an IA3 adapter",
            "load it with PEFT: cogtools does not convert these",
        ),
    ],
)
def test_another_adapter_than_a_lora_is_named_with_who_reads_it(
    key: str, found: str, hint: str, tmp_path: Path
) -> None:
    assert message_of({key: torch.zeros(4, 8)}, tmp_path) == no_lora(found, hint)


def test_an_optimizers_shard_is_sent_to_the_weights(tmp_path: Path) -> None:
    shard = {
        "optimizer_state_dict": {"zero_stage": 2, "fp32_flat_groups": [torch.zeros(8)]},
        "ds_config": {},
        "ds_version": "0.19.8",
    }
    name = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"

    found = "an optimizer's state (a zero_pp_rank file of DeepSpeed)"
    assert message_of(shard, tmp_path, name) == no_lora(
        found, "give the weights: the trainer saves them as mp_rank_00_model_states.pt, which is not in this folder"
    )
    (tmp_path / RANK_00).touch()
    assert message_of(shard, tmp_path, name) == no_lora(found, f"give the weights: {tmp_path / RANK_00}")


@pytest.mark.parametrize("prefix", ["", "transformer."], ids=["model", "pipeline"])
def test_a_base_model_in_diffusers_layout_is_told(prefix: str, tmp_path: Path) -> None:
    layer = f"{prefix}transformer_blocks.0.norm1.norm.weight"
    made = {layer: torch.zeros(128), f"{prefix}norm_final.weight": torch.zeros(128)}

    assert message_of(made, tmp_path) == no_lora(
        "a base model in diffusers' layout, without a LoRA "
        "(CogVideoX of no published size: 1 layers, hidden size 128, 2 tensors)"
    )
    assert message_of({layer: torch.zeros(128)}, tmp_path) == no_lora(
        "a base model in diffusers' layout, without a LoRA (1 tensor)"
    )


@pytest.mark.parametrize("bare", [False, True])
def test_a_vae_is_told(bare: bool, base: StateDict, tmp_path: Path) -> None:
    vae = only(base, VAE, bare=bare)

    assert message_of({"state_dict": vae}, tmp_path) == no_lora(f"a VAE ({len(vae)} tensors)", EXPORT)


@pytest.mark.parametrize("bare", [False, True])
def test_a_text_encoder_is_told_and_taken_for_no_vae(bare: bool, base: StateDict, tmp_path: Path) -> None:
    t5 = only(base, TEXT_ENCODER, bare=bare)

    assert message_of(t5, tmp_path) == no_lora(f"a text encoder ({len(t5)} tensors)", EXPORT)


def test_anything_else_is_told_by_its_first_key(tmp_path: Path) -> None:
    assert message_of({"conv.weight": torch.zeros(1), "b": 1}, tmp_path) == no_lora("1 tensor: conv.weight …")
    assert message_of({}, tmp_path) == no_lora("0 tensors")
