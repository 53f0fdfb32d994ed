"""The base transformer's key map: both directions are one table, and every row of every tensor has its place."""

import inspect
from collections import Counter
from functools import cache

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from cogtools.layouts import diffusers as diffusers_layout
from cogtools.layouts import transformer
from cogtools.layouts.family import BY_SLUG, LINEARS, MODELS, Model, Module
from cogtools.layouts.key_map import Mapped, Run
from cogtools.layouts.transformer import ROWS, Row
from tests.support.factories import MODELS as SAT_MODELS
from tests.support.factories import TRANSFORMER, SatModel, Shape, module_shapes

PAIRS = list(zip(MODELS, SAT_MODELS, strict=True))
by_model = pytest.mark.parametrize(("model", "sat_model"), PAIRS, ids=[model.slug for model in MODELS])


def sat_shapes(model: SatModel, rank: int | None) -> dict[str, Shape]:
    """The transformer's keys of a checkpoint of the trainer, at the real size."""
    return {key: shape for key, shape in module_shapes(model, rank).items() if key.startswith(TRANSFORMER)}


def mapped(model: Model, sat_model: SatModel, rank: int | None = None) -> Mapped:
    """The map as an export uses it: positions are kept where they were trained."""
    found = transformer.to_diffusers(sat_shapes(sat_model, rank))
    return found if model.learned_positions else found.without(transformer.POSITIONS, transformer.POSITIONS_DROPPED)


def sizes(model: Model) -> dict[str, int]:
    width, height, frames = model.sample
    positions = 226 + ((frames - 1) // 4 + 1) * (width // 2) * (height // 2)
    return model.sizes | {
        "head": 64,
        "layers": model.layers,
        "positions": positions if model.learned_positions else 0,
    }


@cache
def on_meta_device(model: Model) -> dict[str, Shape]:
    """diffusers' class at the real size, without memory."""
    with torch.device("meta"):
        built = CogVideoXTransformer3DModel(**model.config)
    return {key: tuple(tensor.shape) for key, tensor in built.state_dict().items()}


@by_model
@pytest.mark.parametrize("rank", [None, 128], ids=["base", "with LoRA"])
def test_every_key_of_a_checkpoint_is_planned_or_dropped(model: Model, sat_model: SatModel, rank: int | None) -> None:
    found = mapped(model, sat_model, rank)
    planned = {run.key for runs in found.targets.values() for run in runs}
    assert planned | set(found.dropped) == set(sat_shapes(sat_model, rank))
    assert planned.isdisjoint(found.dropped)
    assert (found.unknown, found.incomplete, found.twice) == ((), {}, ())


@by_model
def test_every_row_of_every_planned_source_is_used_exactly_once(model: Model, sat_model: SatModel) -> None:
    found = mapped(model, sat_model)
    used = Counter(run for runs in found.targets.values() for run in runs)
    assert set(used.values()) == {1}
    by_source: dict[str, set[Run]] = {}
    for run in used:
        by_source.setdefault(run.key, set()).add(run)
    for key, runs in by_source.items():
        parts = next(iter(runs)).of
        assert runs == {Run(key, number, parts) for number in range(parts)}
        assert sat_shapes(sat_model, None)[key][0] % parts == 0


@by_model
def test_the_targets_are_the_keys_and_shapes_of_diffusers_class_in_its_order(model: Model, sat_model: SatModel) -> None:
    sources = sat_shapes(sat_model, None)
    found = {
        target: (sum(sources[run.key][0] // run.of for run in runs), *sources[runs[0].key][1:])
        for target, runs in mapped(model, sat_model).targets.items()
    }
    assert list(found.items()) == list(on_meta_device(model).items())


@pytest.mark.parametrize("model", MODELS, ids=[model.slug for model in MODELS])
def test_the_table_states_the_shapes_of_diffusers_class(model: Model) -> None:
    assert transformer.shapes(sizes(model), model.patch_embed[1:]) == on_meta_device(model)


def test_the_counts_are_those_of_the_real_models() -> None:
    counts = {
        model.slug: (
            len(sat_shapes(sat_model, None)),
            len(mapped(model, sat_model).targets),
            sum(len(runs) for runs in mapped(model, sat_model).targets.values()),
        )
        for model, sat_model in PAIRS
    }
    assert counts == {
        "2b": (557, 736, 856),
        "5b": (775, 1024, 1192),
        "5b-i2v": (776, 1025, 1193),
        "1.5-5b": (773, 1024, 1192),
        "1.5-5b-i2v": (777, 1028, 1196),
    }


@by_model
def test_there_and_back_is_the_identity(model: Model, sat_model: SatModel) -> None:
    there = mapped(model, sat_model)
    back = transformer.to_sat(there.targets)
    assert (back.unknown, back.incomplete, back.twice, back.dropped) == ((), {}, (), {})
    content: dict[str, list[object]] = {}  # of each target, its runs with what SAT's rows they are
    for target, runs in there.targets.items():
        content[target] = [(run.key.removeprefix(TRANSFORMER), run.number, run.of) for run in runs]
    for key, runs in back.targets.items():
        rows = []
        for run in runs:
            length = len(content[run.key]) // run.of
            rows += content[run.key][run.number * length : (run.number + 1) * length]
        assert rows == [(key, number, len(rows)) for number in range(len(rows))]
    assert {TRANSFORMER + key for key in back.targets} == set(sat_shapes(sat_model, None)) - set(there.dropped)


def test_the_rows_are_read_as_they_stand() -> None:
    keys = [
        "transformer.layers.7.attention.query_key_value.original.bias",
        "mixins.adaln_layer.adaLN_modulations.7.1.bias",
    ]
    assert transformer.to_diffusers(keys).targets == {
        "transformer_blocks.7.norm1.linear.bias": (Run(keys[1], 0, 4), Run(keys[1], 2, 4)),
        "transformer_blocks.7.attn1.to_q.bias": (Run(keys[0], 0, 3),),
        "transformer_blocks.7.attn1.to_k.bias": (Run(keys[0], 1, 3),),
        "transformer_blocks.7.attn1.to_v.bias": (Run(keys[0], 2, 3),),
        "transformer_blocks.7.norm2.linear.bias": (Run(keys[1], 1, 4), Run(keys[1], 3, 4)),
    }


def test_backwards_two_tensors_are_put_together_run_by_run() -> None:
    norm1, norm2 = "transformer_blocks.0.norm1.linear.weight", "transformer_blocks.0.norm2.linear.weight"
    assert transformer.to_sat([norm2, norm1]).targets == {
        "mixins.adaln_layer.adaLN_modulations.0.1.weight": (
            Run(norm1, 0, 2),
            Run(norm2, 0, 2),
            Run(norm1, 1, 2),
            Run(norm2, 1, 2),
        )
    }


def test_what_a_target_lacks_is_named() -> None:
    found = transformer.to_sat([f"transformer_blocks.0.attn1.to_{name}.bias" for name in "qk"])
    assert found.targets == {}
    assert found.incomplete == {
        "transformer.layers.0.attention.query_key_value.bias": ("transformer_blocks.0.attn1.to_v.bias",)
    }


@pytest.mark.parametrize(
    "key",
    [
        "transformer.layers.0.attention.query_key_value",
        "transformer.layers.01.attention.query_key_value.weight",
        "transformer.layers.1000.attention.query_key_value.weight",
        "transformer.layers.{}.attention.query_key_value.weight",
        "transformer.layers.0.attention.query_key_value.weights",
        "xtransformer.layers.0.attention.query_key_value.weight",
        "mixins.pos_embed.pos_embedding.weight",
        "model_ema.decay",
    ],
)
def test_a_key_that_no_row_has_is_unknown(key: str) -> None:
    assert transformer.to_diffusers([key]) == Mapped({}, {}, (key,), {}, ())


def test_two_keys_for_one_tensor_are_told() -> None:
    keys = ["time_embed.0.weight", "model.diffusion_model.time_embed.0.weight"]
    assert transformer.to_diffusers(keys).twice == (keys[1],)


def test_no_two_rows_have_one_name_and_the_runs_of_each_source_are_complete() -> None:
    assert max(Counter(row.diffusers for row in ROWS).values()) == 1
    by_source: dict[str, list[Row]] = {}
    for row in ROWS:
        by_source.setdefault(row.sat, []).append(row)
    for rows in by_source.values():
        assert {row.of for row in rows} == {sum(len(row.runs) for row in rows)}
        assert sorted(run for row in rows for run in row.runs) == list(range(rows[0].of))


def test_the_modules_that_loras_adapt_are_rows_of_the_same_sizes() -> None:
    rows = {row.diffusers: (row.inputs, row.outputs) for row in ROWS}
    for linear in LINEARS:
        path = diffusers_layout.module_path(Module(0 if linear.in_layers else None, linear.name))
        name = path.replace("transformer_blocks.0.", "transformer_blocks.{}.")
        assert rows[name] == (linear.inputs, linear.outputs)


@pytest.mark.parametrize("model", MODELS, ids=[model.slug for model in MODELS])
def test_the_shapes_of_a_config_are_those_of_the_class_that_it_builds(model: Model) -> None:
    assert transformer.shapes_of_config(model.config) == on_meta_device(model)


def test_fields_that_a_config_lacks_are_the_classes_defaults() -> None:
    defaults = inspect.signature(CogVideoXTransformer3DModel.__init__).parameters
    assert {name: defaults[name].default for name in transformer.DEFAULTS} == transformer.DEFAULTS
    with torch.device("meta"):
        built = CogVideoXTransformer3DModel(num_layers=1)
    expected = {key: tuple(tensor.shape) for key, tensor in built.state_dict().items()}
    assert transformer.shapes_of_config({"num_layers": 1}) == expected


@pytest.mark.parametrize(
    "change",
    [{"num_layers": 0}, {"num_layers": 10**6}, {"in_channels": "16"}, {"patch_size_t": 0}, {"ofs_embed_dim": True},
     {"sample_width": 1e3}, {"num_attention_heads": None}],
)  # fmt: skip
def test_a_config_whose_sizes_are_none_has_no_shapes(change: dict[str, object]) -> None:
    assert transformer.shapes_of_config(BY_SLUG["5b"].config | change) is None
