"""The plan says what a checkpoint's LoRA becomes, or everything that is wrong with it."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from cogtools.checkpoint.opening import open_checkpoint
from cogtools.conversion.options import ExportOptions
from cogtools.conversion.plan import LoraPlan, plan_lora, planned_tensors
from cogtools.errors import CheckpointError, ExportError, OptionError, Problem
from cogtools.formatting import fold_numbers
from cogtools.layouts import diffusers
from tests.support.factories import (
    COGVIDEOX_1_5_5B_I2V,
    COGVIDEOX_2B,
    COGVIDEOX_5B,
    MODELS,
    TOY_2B,
    SatModel,
    StateDict,
    is_lora,
    sat_checkpoint,
    sat_state_dict,
    save_run,
    with_module_prefix,
    without_prefix,
)

LAYERS = "model.diffusion_model.transformer.layers."
QKV = "attention.query_key_value."


def plan(path: Path, *, alpha: float | None = None, allow_partial: bool = False) -> LoraPlan:
    with open_checkpoint(path) as checkpoint:
        return plan_lora(checkpoint, diffusers.LAYOUT, alpha=alpha, allow_partial=allow_partial)


def alpha_of(found: LoraPlan) -> tuple[float | None, str]:
    """A plan's alpha, and who states it."""
    return found.scale.alpha, found.scale.source


def saved(path: Path, state: Mapping[str, object]) -> Path:
    torch.save({"module": dict(state)}, path)
    return path


def toy(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A toy LoRA of rank 4, with some of its keys changed; None takes one out."""
    state = dict(sat_state_dict(TOY_2B, 4))
    for key, value in changes.items():
        if value is None:
            del state[key]
        else:
            state[key] = value
    return state


def problems(path: Path, *, allow_partial: bool = False) -> list[Problem]:
    with pytest.raises(ExportError) as caught:
        plan(path, allow_partial=allow_partial)
    return list(caught.value.problems)


# What becomes of which key


def test_every_tensor_of_a_layer_goes_to_its_place(tmp_path: Path) -> None:
    planned = planned_tensors(plan(saved(tmp_path / "a.pt", toy())), ExportOptions())
    found = {tensor.key: tensor.source for tensor in planned if ".transformer_blocks.1." in tensor.key}
    target = "transformer.transformer_blocks.1.attn1."
    assert found == {
        f"{target}to_q.lora_A.weight": f"{LAYERS}1.{QKV}matrix_A.0",
        f"{target}to_k.lora_A.weight": f"{LAYERS}1.{QKV}matrix_A.1",
        f"{target}to_v.lora_A.weight": f"{LAYERS}1.{QKV}matrix_A.2",
        f"{target}to_out.0.lora_A.weight": f"{LAYERS}1.attention.dense.matrix_A.0",
        f"{target}to_q.lora_B.weight": f"{LAYERS}1.{QKV}matrix_B.0",
        f"{target}to_k.lora_B.weight": f"{LAYERS}1.{QKV}matrix_B.1",
        f"{target}to_v.lora_B.weight": f"{LAYERS}1.{QKV}matrix_B.2",
        f"{target}to_out.0.lora_B.weight": f"{LAYERS}1.attention.dense.matrix_B.0",
    }


def renamed(old: str, new: str) -> Callable[[StateDict], StateDict]:
    """Exchanges a part of every key."""
    return lambda module: OrderedDict((key.replace(old, new, 1), tensor) for key, tensor in module.items())


@pytest.mark.parametrize(
    "rename",
    [
        pytest.param(dict, id="as-the-trainer-writes-it"),
        pytest.param(with_module_prefix, id="module"),
        pytest.param(without_prefix, id="bare"),
        pytest.param(renamed("model.diffusion_model.", "diffusion_model."), id="diffusion_model"),
        pytest.param(renamed("model.diffusion_model.", "model."), id="model"),
        pytest.param(renamed("model.", "_forward_module.module._orig_mod.model."), id="wrappers-in-front"),
        pytest.param(renamed("diffusion_model.", "diffusion_model._orig_mod."), id="torch.compile"),
        pytest.param(renamed(".attention.", "._fsdp_wrapped_module.attention."), id="fsdp"),
        pytest.param(renamed(".query_key_value.", ".query_key_value.module."), id="module-inside"),
    ],
)
def test_what_wrappers_put_into_the_keys_does_not_matter(
    tmp_path: Path, rename: Callable[[StateDict], StateDict]
) -> None:
    expected = plan(saved(tmp_path / "a.pt", toy()))
    found = plan(saved(tmp_path / "b.pt", rename(sat_state_dict(TOY_2B, 4))))
    assert found.names == expected.names
    assert found.transformer == expected.transformer


@pytest.mark.parametrize(
    ("model", "name", "tensors"),
    [
        pytest.param(model, name, 8 * model.layers, id=name)
        for model, name in zip(
            MODELS,
            ["CogVideoX-2B", "CogVideoX-5B", "CogVideoX-5B-I2V", "CogVideoX1.5-5B", "CogVideoX1.5-5B-I2V"],
            strict=True,
        )
    ],
)
def test_base_weights_tell_the_model(tmp_path: Path, model: SatModel, name: str, tensors: int) -> None:
    found = plan(saved(tmp_path / "a.pt", sat_state_dict(model, 2, base="telling")))
    assert (found.transformer.name, len(found.names), found.rank) == (name, tensors, 2)


def test_an_ofs_embedding_tells_the_model_without_the_patch_embedding(tmp_path: Path) -> None:
    state = sat_state_dict(COGVIDEOX_1_5_5B_I2V, 1, base="telling")
    del state["model.diffusion_model.mixins.patch_embed.proj.weight"]
    assert plan(saved(tmp_path / "a.pt", state)).transformer.name == "CogVideoX1.5-5B-I2V"


def test_a_rank_above_the_hidden_size_is_a_rank_like_any_other(tmp_path: Path) -> None:
    found = plan(saved(tmp_path / "a.pt", sat_state_dict(TOY_2B, 200)))
    assert (found.rank, found.transformer.hidden, len(found.names)) == (200, 128, 24)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (COGVIDEOX_2B, "CogVideoX-2B"),
        (COGVIDEOX_5B, "CogVideoX 5B family (5b, 5b-i2v, 1.5-5b, 1.5-5b-i2v)"),
    ],
)
def test_without_base_weights_the_family_is_named(tmp_path: Path, model: SatModel, name: str) -> None:
    assert plan(saved(tmp_path / "a.pt", sat_state_dict(model, 1, base="none"))).transformer.name == name


def test_without_base_weights_an_unknown_size_has_the_layers_of_its_lora(tmp_path: Path) -> None:
    found = plan(saved(tmp_path / "a.pt", sat_state_dict(TOY_2B, 4, base="none")))
    assert found.layers == (0, 1, 2)
    assert found.notices[0] == (
        "Nothing tells how many layers the model has (hidden size 128, no base weights): "
        "taken to be 3, as the LoRA has."
    )


# What is wrong


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    state = toy(
        **{
            f"{LAYERS}0.{QKV}matrix_A.0": None,
            f"{LAYERS}0.{QKV}matrix_B.1": torch.zeros(4, 128, dtype=torch.float16),
            f"{LAYERS}1.{QKV}matrix_A.1": torch.zeros(4, 128),
            f"{LAYERS}1.mlp.dense_h_to_4h.matrix_A.0": torch.zeros(4, 128, dtype=torch.float16),
            "transformer.layers.2.attention.dense.matrix_A.0": torch.zeros(4, 128, dtype=torch.float16),
            f"{LAYERS}7.{QKV}matrix_A.0": torch.zeros(4, 128, dtype=torch.float16),
        }
    )
    assert problems(saved(tmp_path / "a.pt", state)) == [
        Problem(
            "unexpected",
            f"{LAYERS}1.mlp.dense_h_to_4h.matrix_A.0",
            expected="q, k, v or dense of an attention layer: SAT's LoRA adapts these, and only these are exported",
        ),
        Problem(
            "collision",
            "transformer.layers.2.attention.dense.matrix_A.0",
            found=f"the same tensor as {LAYERS}2.attention.dense.matrix_A.0",
        ),
        Problem("shape", f"{LAYERS}0.{QKV}matrix_B.1", "(4, 128)", "(128, 4)"),
        Problem("dtype", f"{LAYERS}1.{QKV}matrix_A.1", "float32", "float16"),
        Problem("missing", "layer 0: to_q lora_A"),
        Problem("unexpected", "layer 7: to_q lora_A", expected="layers 0-2"),
    ]


def test_a_lora_of_whole_numbers_is_an_error(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {key: tensor.int() for key, tensor in toy().items() if is_lora(key)})
    assert [(problem.kind, problem.found) for problem in problems(path)] == [("dtype", "int32")] * 24


def test_a_module_of_another_rank_is_an_error(tmp_path: Path) -> None:
    half = torch.zeros(128, 2, dtype=torch.float16)
    state = toy(**{f"{LAYERS}2.attention.dense.matrix_A.0": half.T, f"{LAYERS}2.attention.dense.matrix_B.0": half})
    assert problems(saved(tmp_path / "a.pt", state)) == [
        Problem("shape", f"{LAYERS}2.attention.dense.matrix_A.0", "(2, 128)", "(4, 128)"),
        Problem("shape", f"{LAYERS}2.attention.dense.matrix_B.0", "(128, 2)", "(128, 4)"),
    ]


def test_a_tensor_that_stands_for_a_call_is_an_error(tmp_path: Path) -> None:
    state = toy()
    key = f"{LAYERS}0.{QKV}matrix_A.0"
    path = saved(tmp_path / "a.pt", {**state, key: np.zeros((4, 128), dtype=np.float16)})
    assert problems(path) == [Problem("unreadable", key, found="something else than a plain tensor")]


def test_a_lora_without_any_plain_tensor_is_an_error_with_its_problems(tmp_path: Path) -> None:
    state = {key: np.zeros(tensor.shape) for key, tensor in sat_state_dict(TOY_2B, 4, base="none").items()}
    found = problems(saved(tmp_path / "a.pt", state))
    assert found == [Problem("unreadable", key, found="something else than a plain tensor") for key in state]


def test_a_lora_on_other_modules_only_is_an_error_with_its_problems(tmp_path: Path) -> None:
    key = f"{LAYERS}0.mlp.dense_h_to_4h.matrix_A.0"
    (problem,) = problems(saved(tmp_path / "a.pt", {key: torch.zeros(4, 128)}))
    assert (problem.kind, problem.subject) == ("unexpected", key)


def prefixed(prefix: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + key: tensor for key, tensor in state.items()}


@pytest.mark.parametrize("prefix", ["x.", "network.unet."])
def test_one_unknown_prefix_that_all_keys_share_is_accepted_with_a_note(tmp_path: Path, prefix: str) -> None:
    state = sat_state_dict(TOY_2B, 4, base="none")
    found = plan(saved(tmp_path / "a.pt", prefixed(prefix, state)), alpha=1)
    expected = plan(saved(tmp_path / "b.pt", state), alpha=1)
    assert (found.names, found.layers, found.rank) == (expected.names, expected.layers, expected.rank)
    assert {name: found.lora.tensors[name].key for name in found.names} == {
        name: prefix + expected.lora.tensors[name].key for name in expected.names
    }
    assert [notice for notice in found.notices if notice not in expected.notices] == [
        f"All keys of the LoRA have the prefix '{prefix}model.diffusion_model.', as no program is known to read them."
    ]


@pytest.mark.parametrize(
    ("most", "few"),
    [("", "x."), ("x.", "y."), ("x.", "")],
    ids=["some-unknown", "two-unknown", "most-unknown"],
)
def test_a_prefix_that_only_some_keys_have_is_a_problem_said_once(tmp_path: Path, most: str, few: str) -> None:
    state = sat_state_dict(TOY_2B, 4, base="none")
    last = {key: tensor for key, tensor in state.items() if ".layers.2." in key}
    rest = {key: tensor for key, tensor in state.items() if key not in last}
    path = saved(tmp_path / "a.pt", prefixed(most, rest) | prefixed(few, last))
    assert problems(path) == [
        Problem(
            "unexpected",
            few + next(iter(last)),
            f"the prefix '{few}model.diffusion_model.', 8 keys",
            f"'{most}model.diffusion_model.', as before the others",
            tuple(few + key for key in last),
        )
    ]


def test_a_tensor_larger_than_its_storage_is_an_error(tmp_path: Path) -> None:
    key = f"{LAYERS}0.{QKV}matrix_A.0"
    path = saved(tmp_path / "a.pt", toy(**{key: torch.ones(1, dtype=torch.float16).expand(4, 128)}))
    assert problems(path) == [Problem("shape", key, "(4, 128) in 2 bytes of storage")]


@pytest.mark.parametrize("suffix", ["layers.01.", "layers.1x.", "layers.-1.", "layers.٣.", "layers.1000."])
def test_a_layer_that_is_no_number_is_unexpected(tmp_path: Path, suffix: str) -> None:
    key = f"model.diffusion_model.transformer.{suffix}{QKV}matrix_A.0"
    (problem,) = problems(saved(tmp_path / "a.pt", toy(**{key: torch.zeros(4, 128, dtype=torch.float16)})))
    assert (problem.kind, problem.subject) == ("unexpected", key)


# Some layers only


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    return saved(tmp_path / "a.pt", sat_state_dict(TOY_2B, 4, layers=[0, 2]))


def test_a_lora_of_some_layers_stops_the_export(partial: Path) -> None:
    with pytest.raises(ExportError) as caught:
        plan(partial)
    assert str(caught.value) == (
        "the LoRA in this checkpoint cannot be exported as it is\n"
        f"  file:      {partial}\n"
        "  problem:   missing: layer 1: all tensors\n"
        "  try:       if only these layers were trained, export with --allow-partial"
    )


@pytest.mark.parametrize(
    ("changes", "allow_partial"),
    [
        pytest.param({f"{LAYERS}1.{QKV}matrix_{factor}.{part}": None for factor in "AB" for part in range(3)}
                     | {f"{LAYERS}2.attention.dense.matrix_{factor}.0": None for factor in "AB"}, False,
                     id="eight-missing-of-two-layers"),
        pytest.param({f"{LAYERS}0.{QKV}matrix_A.0": None}, True, id="given-already"),
    ],
)  # fmt: skip
def test_allow_partial_is_not_proposed_where_it_does_not_help(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], allow_partial: bool
) -> None:
    path = saved(tmp_path / "a.pt", toy(**changes))
    with pytest.raises(ExportError) as caught:
        plan(path, allow_partial=allow_partial)
    assert str(caught.value.hint) == f"cogtools inspect {path} --lora"


def test_a_lora_of_some_layers_is_accepted_when_asked_for(partial: Path) -> None:
    found = plan(partial, allow_partial=True)
    assert (found.layers, len(found.names), found.transformer.layers) == ((0, 2), 16, 3)
    assert found.notices[0] == "The LoRA adapts 2 of 3 layers: 0, 2 (--allow-partial)."


def test_a_broken_layer_is_an_error_also_when_some_layers_are_accepted(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", toy(**{f"{LAYERS}1.{QKV}matrix_A.0": None}))
    assert problems(path, allow_partial=True) == [Problem("missing", "layer 1: to_q lora_A")]


def test_a_layer_range_in_the_training_configuration_needs_no_flag(tmp_path: Path) -> None:
    checkpoint = sat_checkpoint(sat_state_dict(TOY_2B, 4, layers=[0, 2]))
    found = plan(save_run(tmp_path, checkpoint, rank=4, layer_range=[0, 2]))
    assert (found.layers, found.notices[0]) == (
        (0, 2),
        "The LoRA adapts 2 of 3 layers: 0, 2 (layer_range in training_config.yaml).",
    )


def test_layers_beyond_the_declared_range_are_unexpected(tmp_path: Path) -> None:
    path = save_run(tmp_path, sat_checkpoint(sat_state_dict(TOY_2B, 4)), rank=4, layer_range=[0, 1])
    assert problems(path) == [
        Problem("unexpected", "layer 2: all tensors", expected="layers 0-1 (layer_range in training_config.yaml)")
    ]
    assert plan(path, allow_partial=True).layers == (0, 1, 2)


def test_layers_that_the_declared_range_has_and_the_file_has_not_are_missing(tmp_path: Path) -> None:
    checkpoint = sat_checkpoint(sat_state_dict(TOY_2B, 4, layers=[0]))
    path = save_run(tmp_path, checkpoint, rank=4, layer_range=[0, 1, 2])
    with pytest.raises(ExportError) as caught:
        plan(path)
    assert caught.value.problems == (
        Problem("missing", "layers 1-2: all tensors", expected="layers 0-2 (layer_range in training_config.yaml)"),
    )
    assert str(caught.value.hint) == (
        "if only these layers were trained, export with --allow-partial, which sets layer_range aside"
    )


def test_a_layer_range_may_count_from_the_end(tmp_path: Path) -> None:
    checkpoint = sat_checkpoint(sat_state_dict(TOY_2B, 4, layers=[0, 2]))
    assert plan(save_run(tmp_path, checkpoint, rank=4, layer_range=[0, -1])).layers == (0, 2)


# The scale


@pytest.mark.parametrize(
    ("stated", "given", "alpha", "notices"),
    [
        pytest.param(None, None, (1, "default"), 1, id="nobody-says"),
        pytest.param(8, None, (8, "training_config.yaml"), 0, id="configuration"),
        pytest.param(0.5, None, (0.5, "training_config.yaml"), 0, id="configuration-no-integer"),
        pytest.param(8, 2.0, (2, "--alpha"), 1, id="option-goes-first"),
        pytest.param(8, 8.0, (8, "--alpha"), 0, id="both-say-the-same"),
        pytest.param(None, 0.25, (0.25, "--alpha"), 0, id="option"),
    ],
)
def test_alpha_comes_from_who_says_it(
    tmp_path: Path, stated: float | None, given: float | None, alpha: tuple[float, str], notices: int
) -> None:
    path = save_run(tmp_path, sat_checkpoint(sat_state_dict(TOY_2B, 4)), rank=4, alpha=stated)
    found = plan(path, alpha=given)
    assert (alpha_of(found), type(found.scale.alpha), found.scaling) == (alpha, type(alpha[0]), alpha[0] / 4)
    assert len(found.notices) == notices


def test_a_second_alpha_is_told(tmp_path: Path) -> None:
    path = save_run(tmp_path, sat_checkpoint(sat_state_dict(TOY_2B, 4)), rank=4, alpha=16)
    assert plan(path, alpha=2).notices == ("alpha is 2, as --alpha states; training_config.yaml states 16.",)


@pytest.mark.parametrize(
    ("old", "new", "notice"),
    [
        ("lora_alpha: 8", "lora_alpha: many", "`lora_alpha` in the training configuration is not valid ('many')"),
        (
            "lora_alpha: 8",
            "lora_alpha: 8\n<<: {}",
            "the training configuration cannot be read (it has a merge key (<<))",
        ),
    ],
    ids=["alpha", "file"],
)
def test_with_alpha_given_the_training_configuration_need_not_be_right(
    tmp_path: Path, old: str, new: str, notice: str
) -> None:
    path = save_run(tmp_path, sat_checkpoint(sat_state_dict(TOY_2B, 4)), rank=4, alpha=8)
    config = tmp_path / "training_config.yaml"
    text = config.read_text()
    line = next(line for line in text.splitlines() if old in line)
    indent = line[: len(line) - len(line.lstrip())]
    config.write_text(text.replace(line, line.replace(old, new.replace("\n", "\n" + indent))))
    with pytest.raises(CheckpointError):
        plan(path)
    found = plan(path, alpha=2)
    assert (alpha_of(found), found.notices) == ((2, "--alpha"), (f"{notice}: not used, as --alpha is given.",))


def test_the_layer_range_holds_beside_an_alpha_that_is_not_valid(tmp_path: Path) -> None:
    checkpoint = sat_checkpoint(sat_state_dict(TOY_2B, 4, layers=[0, 2]))
    path = save_run(tmp_path, checkpoint, rank=4, alpha=8, layer_range=[0, 2])
    config = tmp_path / "training_config.yaml"
    config.write_text(config.read_text().replace("lora_alpha: 8", "lora_alpha: many"))
    assert plan(path, alpha=2).layers == (0, 2)


def test_the_configuration_is_found_through_a_link(tmp_path: Path) -> None:
    path = save_run(tmp_path / "run", sat_checkpoint(sat_state_dict(TOY_2B, 4)), rank=4, alpha=8)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "best.pt").symlink_to(path)
    assert alpha_of(plan(tmp_path / "links" / "best.pt")) == (8, "training_config.yaml")


def test_without_a_training_configuration_the_default_is_said_to_be_a_guess(tmp_path: Path) -> None:
    assert plan(saved(tmp_path / "a.pt", toy())).notices == (
        "There is no training_config.yaml with a lora_alpha, so alpha is 1, SAT's default. "
        "If the training had another one, state it with --alpha.",
    )


@pytest.mark.parametrize("alpha", [0.0, -1.0, 1e300, float("nan"), float("inf")])
def test_an_alpha_that_cannot_be_is_refused(tmp_path: Path, alpha: float) -> None:
    with pytest.raises(OptionError, match="alpha must be a number above 0"):
        plan(saved(tmp_path / "a.pt", toy()), alpha=alpha)


def test_a_training_configuration_of_another_rank_is_an_error(tmp_path: Path) -> None:
    path = save_run(tmp_path, sat_checkpoint(sat_state_dict(TOY_2B, 4)), rank=8)
    config = tmp_path / "training_config.yaml"
    assert problems(path) == [Problem("rank", str(config), "r: 8", "r: 4, as the shapes say")]


@pytest.mark.parametrize(("numbers", "folded"), [([], ""), ([3], "3"), ([0, 1, 2], "0-2"), ([0, 2, 3, 7], "0, 2-3, 7")])
def test_numbers_fold_into_ranges(numbers: list[int], folded: str) -> None:
    assert fold_numbers(numbers) == folded
