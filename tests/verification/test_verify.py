"""`verify` held against the table of damaged files, against real exports, and against what others write."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cogtools import VerifyReport, export_lora, verify_lora
from cogtools.conversion.options import Cast, Scale
from cogtools.errors import CheckpointError, Hint, OptionError, Problem
from cogtools.layouts.diffusers import FILE_NAME
from cogtools.layouts.family import MODELS, LoraKey, Transformer
from cogtools.layouts.folded import fold_names
from cogtools.render.json_object import report_json
from cogtools.verification.load_child import _which
from cogtools.verification.report import Check
from tests.support import factories
from tests.support.damage import (
    DAMAGES,
    EXPRESSIONS,
    GOOD,
    PLAIN_CHECKS,
    PREFIX,
    PROJECTIONS,
    Damage,
    LoraFile,
    alter,
    by_file,
    cast,
    double_rank,
    drop,
    encode,
    forget,
    good_lora,
    key,
    kohya_names,
    put,
    read,
    sat_names,
    save_as_checkpoint,
    state,
    unrecord,
    write,
)
from tests.support.loras import lora_keys


def named(damage: Damage) -> str:
    return damage.id


def check(report: VerifyReport, name: str) -> Check:
    (found,) = [check for check in report.checks if check.name == name]
    return found


def wrong(report: VerifyReport) -> dict[str, str]:
    """The checks that did not pass, and their status."""
    return {check.name: check.status for check in report.checks if check.status in ("warn", "fail")}


def told(report: VerifyReport, name: str) -> list[str]:
    """What a check lists."""
    return [str(problem) for problem in check(report, name).problems]


@dataclass(frozen=True)
class Source:
    """The good file, and the checkpoint whose LoRA it is."""

    file: Path
    checkpoint: Path


def write_training_config(folder: Path, **lora: object) -> None:
    """Write the part of the trainer's configuration that is about the LoRA; JSON is YAML."""
    content: object = lora
    for name in ("params", "lora_config", "modules", "params", "network_config", "model"):
        content = {name: content}
    (folder / "training_config.yaml").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("good")
    write(folder / FILE_NAME, good_lora())
    write_training_config(folder, r=4)
    return Source(folder / FILE_NAME, save_as_checkpoint(good_lora(), folder / "mp_rank_00_model_states.pt"))


# --- the table of damaged files -------------------------------------------------------------------

Options = Callable[[Source], dict[str, Any]]
MODES: dict[str, Options] = {
    "plain": lambda _: {},
    "against": lambda good: {"against": good.checkpoint},
    "load": lambda _: {"load": True},
}


@pytest.mark.parametrize("mode", ["plain", "against", pytest.param("load", marks=pytest.mark.slow)])
@pytest.mark.parametrize("damage", [*DAMAGES, *EXPRESSIONS, *GOOD], ids=named)
def test_a_file_gets_the_verdict_of_the_table_by_the_check_it_names(
    damage: Damage, mode: str, good: Source, tmp_path: Path
) -> None:
    damage.apply(good.file, tmp_path / FILE_NAME)
    expected = {"plain": damage.plain, "against": damage.against, "load": damage.load}[mode]
    options = MODES[mode](good)

    if expected == "error":
        with pytest.raises(CheckpointError):
            verify_lora(tmp_path, layers=3, **options)
        return
    report = verify_lora(tmp_path, layers=3, **options)

    assert report.verdict == expected, wrong(report)
    if expected == "pass":
        assert wrong(report) == {}
    elif damage.check is not None:
        severity = damage.plain if damage.plain != "pass" else "fail"
        assert wrong(report).get(damage.check) == severity
        if mode == "load" and damage.plain == "warn" and damage.load == "fail":  # what decides
            assert wrong(report)["load"] == "fail"
        assert all(check.hint for check in report.checks if check.status in ("warn", "fail") and check.name != "load")


def test_every_check_catches_a_row_of_the_table() -> None:
    assert {damage.check for damage in DAMAGES} == {*PLAIN_CHECKS, "against", "against-scale"}
    assert any(damage.plain == "warn" and damage.load == "fail" for damage in DAMAGES)


def test_a_good_file_passes_all_checks(good: Source) -> None:
    report = verify_lora(good.file, against=good.checkpoint, load=True)

    assert [(check.name, check.status) for check in report.checks] == [
        (name, "pass") for name in (*PLAIN_CHECKS, "against", "against-scale", "load")
    ]
    assert [reader.loads for reader in report.readers].count("yes") == 3  # new and old diffusers, kijai's wrapper
    assert replace(report, checks=(), libraries={}, readers=()) == VerifyReport(
        path=good.file,
        layout="diffusers",
        reader="diffusers",
        model="CogVideoX of no published size: 3 layers, hidden size 128",
        layers=(0, 1, 2),
        tensors=24,
        rank=(4,),
        dtype=("float16",),
        scaling=(0.25,),
        size_bytes=good.file.stat().st_size,
        readers=(),
        against=good.checkpoint,
        libraries={},
        strict=False,
        checks=(),
        notices=(),
        verdict="pass",
    )
    assert set(report.libraries) == {"diffusers", "peft"}


# --- what a check says ----------------------------------------------------------------------------


def variant(good: Source, folder: Path, *edits: Callable[[LoraFile], object]) -> Path:
    by_file(*edits)(good.file, folder / FILE_NAME)
    return folder / FILE_NAME


def test_missing_tensors_are_named_together_by_layer() -> None:
    every = lora_keys(range(20))
    missing = [
        name
        for name in every
        if name
        in {LoraKey(layer, "v", "B") for layer in (12, 13, 14)} | {LoraKey(3, "out", "A"), LoraKey(3, "out", "B")}
        or name.layer in (7, 9)
    ]

    assert fold_names(missing) == [
        "layer 3: to_out.0 lora_A and lora_B",
        "layers 7, 9: all tensors",
        "layers 12-14: to_v lora_B",
    ]


def test_names_of_another_program_are_called_that(good: Source, tmp_path: Path) -> None:
    (damage,) = (damage for damage in DAMAGES if damage.id == "prefix-peft")
    damage.apply(good.file, tmp_path / FILE_NAME)

    report = verify_lora(tmp_path)

    assert check(report, "names").seen == "these are PEFT's names: diffusers would load none of them"
    assert told(report, "names") == [
        "unexpected: base_model.model.transformer_blocks.0.attn1.to_k.lora_A.weight (found PEFT's names, 24 keys, "
        "expected transformer.transformer_blocks.0.attn1.to_k.lora_A.weight)"
    ]
    assert wrong(report) == {"names": "fail"}


def test_names_of_videox_fun_are_called_that_and_their_alphas_are_counted(good: Source, tmp_path: Path) -> None:
    report = verify_lora(variant(good, tmp_path, kohya_names))

    found = check(report, "names")
    assert found.seen == "these are VideoX-Fun's names: diffusers would load none of them"
    assert told(report, "names") == [
        "unexpected: lora_unet__transformer_blocks_0_attn1_to_k.lora_down.weight (found VideoX-Fun's names, 24 keys, "
        "expected transformer.transformer_blocks.0.attn1.to_k.lora_A.weight)",
        "unexpected: lora_unet__transformer_blocks_0_attn1_to_q.alpha (found 12 tensors that hold an alpha, "
        "expected keys such as transformer.transformer_blocks.0.attn1.to_q.lora_A.weight)",
    ]
    assert [len(problem.keys) for problem in found.problems] == [24, 12]
    hint = f"load it with VideoX-Fun; for diffusers: cogtools export-lora {tmp_path}/{FILE_NAME} OUT_DIR"
    assert str(found.hint) == hint


def test_keys_that_differ_in_layer_and_module_only_are_one_problem(good: Source, tmp_path: Path) -> None:
    def add_text_encoder(file: LoraFile) -> None:
        file.tensors |= {
            "text_encoder." + name.removeprefix(PREFIX): entry for name, entry in list(file.tensors.items())
        }

    report = verify_lora(variant(good, tmp_path, add_text_encoder))

    assert told(report, "names") == [
        "unexpected: text_encoder.transformer_blocks.0.attn1.to_k.lora_A.weight (found 24 keys alike, "
        "expected keys such as transformer.transformer_blocks.0.attn1.to_q.lora_A.weight)"
    ]


def test_sats_names_are_for_export_lora(good: Source, tmp_path: Path) -> None:
    file = variant(good, tmp_path, sat_names)

    hint = f"for diffusers: cogtools export-lora {file} OUT_DIR"
    assert str(check(verify_lora(file), "names").hint) == hint


def test_a_file_without_a_lora_is_for_inspect(tmp_path: Path) -> None:
    write(
        tmp_path / "vae file.safetensors",
        LoraFile({"decoder.conv_in.weight": good_lora().tensors[key(0, "to_q", "A")]}),
    )

    report = verify_lora(tmp_path)

    hint = f"to see what the file holds: cogtools inspect '{tmp_path}/vae file.safetensors'"
    assert [str(check(report, name).hint) for name in ("names", "complete")] == [hint, hint]


def test_a_rank_is_that_of_tensors_whose_shape_fits(good: Source, tmp_path: Path) -> None:
    report = verify_lora(variant(good, tmp_path, alter(lambda values: values.T, key(1, "to_q", "A"))))

    assert (report.rank, set(wrong(report))) == ((4,), {"shapes"})


def test_zeros_of_either_sign_are_one_value(good: Source, tmp_path: Path) -> None:
    def mixed_zeros(values: Any) -> Any:
        zeros = values * 0
        zeros.flat[::2] = -0.0
        return zeros

    report = verify_lora(variant(good, tmp_path, alter(mixed_zeros, key(1, "to_q", "A"))))

    assert [problem.subject for problem in check(report, "constant").problems] == [key(1, "to_q", "A")]


def test_a_dtype_that_all_tensors_have_in_place_of_another_is_said_once(good: Source, tmp_path: Path) -> None:
    report = verify_lora(variant(good, tmp_path, cast("F32"), unrecord), against=good.checkpoint)

    assert told(report, "against") == [
        "dtype: layers 0-2: all tensors (found float32, expected float16, since the file states no cast)"
    ]
    assert len(check(report, "against").problems[0].keys) == 24


def test_a_difference_is_named_by_key_position_and_both_values(tmp_path: Path) -> None:
    name = key(2, "to_k", "B")
    values = torch.tensor([[0.5] * 4] * 128, dtype=torch.float16).numpy().astype("float32")
    checkpoint = good_lora()
    checkpoint.tensors[name] = encode(values, "F16")
    values[70, 3] = 0.75
    values[71, 0] = -0.5
    file = good_lora()
    file.tensors[name] = encode(values, "F16")
    write(tmp_path / FILE_NAME, file)

    report = verify_lora(tmp_path, against=save_as_checkpoint(checkpoint, tmp_path / "checkpoint.pt"))

    assert check(report, "against").seen == "1 of 24 tensors differ from the checkpoint's"
    assert told(report, "against") == [f"value: {name} (found 0.75 at [70, 3] (2 of 512 values differ), expected 0.5)"]


def test_what_is_left_out_of_the_checkpoint_is_named(good: Source, tmp_path: Path) -> None:
    (damage,) = (damage for damage in DAMAGES if damage.id == "half-restated")
    damage.apply(good.file, tmp_path / FILE_NAME)

    report = verify_lora(tmp_path, against=good.checkpoint)

    assert check(report, "against").seen == "8 of the checkpoint's 24 tensors missing"
    assert told(report, "against") == ["missing: layer 1: all tensors"]
    assert check(report, "against").problems[0].keys == tuple(
        key(1, projection, part) for projection in PROJECTIONS for part in "AB"
    )


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize(("value", "text"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")])
def test_a_value_that_is_not_finite_is_found_in_every_dtype(
    dtype: str, value: float, text: str, tmp_path: Path
) -> None:
    name = key(1, "to_q", "A")
    file = good_lora(dtype=dtype)
    largest = {"F16": 65504.0, "BF16": 3.3895e38, "F32": 3.4028e38}[dtype]
    alter(put(largest), key(0, "to_q", "A"))(file)  # the largest number is a finite one
    alter(put(value), name)(file)
    write(tmp_path / FILE_NAME, file)

    assert told(verify_lora(tmp_path), "finite") == [f"not finite: {name} (found {text} at [0, 0] (1 of 512 values))"]


def test_the_effective_scaling_is_that_of_rank_stabilised_lora_where_stated(good: Source, tmp_path: Path) -> None:
    report = verify_lora(variant(good, tmp_path, state(use_rslora=True), unrecord))

    assert (report.scaling, check(report, "scale").seen) == ((0.5,), "scaling 0.5: alpha 1 / sqrt(rank) 4")


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("r", 0, "0"),
        ("r", "4", '"4"'),
        ("r", True, "true"),
        ("lora_alpha", -1, "-1"),
        ("lora_alpha", None, "null"),
        ("rank_pattern", {"to_q": 0}, '{"to_q": 0}'),
        ("rank_pattern", [8], "[8]"),
        ("alpha_pattern", {"to_q": "16"}, '{"to_q": "16"}'),
        ("use_dora", True, "true"),
        ("lora_bias", True, "true"),
    ],
)
def test_a_stated_value_that_cannot_be_is_a_failure(
    field: str, value: object, found: str, good: Source, tmp_path: Path
) -> None:
    report = verify_lora(variant(good, tmp_path, state(**{field: value})))

    problems = [(problem.kind, problem.subject, problem.found) for problem in check(report, "scale").problems]
    assert (check(report, "scale").status, problems) == ("fail", [("invalid", field, found)])


def test_a_record_that_the_file_does_not_bear_out_is_told_with_both(good: Source, tmp_path: Path) -> None:
    report = verify_lora(variant(good, tmp_path, state(lora_alpha=4), cast("BF16")))

    assert wrong(report) == {"record": "fail"}
    assert check(report, "record").seen == (
        "exported with alpha 1 (scale: metadata), rank 4, float16; the file was changed since"
    )
    assert told(report, "record") == [
        "scale: the stated scale (found scaling 1 in 12 modules, expected scaling 0.25)",
        "dtype: the dtype (found bfloat16, expected float16)",
    ]


def test_a_rank_that_is_not_the_recorded_one_is_told(good: Source, tmp_path: Path) -> None:
    report = verify_lora(variant(good, tmp_path, double_rank))

    assert wrong(report) == {"record": "fail"}
    assert told(report, "record") == ["rank: the rank (found 8, expected 4)"]


@pytest.mark.parametrize(
    "pattern", [{"rank_pattern": {"to_q": 8, "to_k": 4}}, {"alpha_pattern": {"to_q": 16}}], ids=["rank", "alpha"]
)
def test_several_scalings_that_are_stated_are_no_doubt(pattern: dict[str, Any], tmp_path: Path) -> None:
    save_with_diffusers(adapted_transformer(**pattern), tmp_path, metadata=True)

    report = verify_lora(tmp_path, layers=LAYERS, strict=True)

    assert wrong(report) == {}
    assert len(report.scaling) == 2


@pytest.mark.parametrize("name", ["alpha_pattern", "rank_pattern"])
def test_what_an_expression_means_only_load_tells(name: str, good: Source, tmp_path: Path) -> None:
    file = variant(good, tmp_path, state(**{name: {r".*\.to_q": 1 if name == "alpha_pattern" else 4}}))

    plain, loaded = verify_lora(file), verify_lora(file, load=True, strict=True)

    assert (plain.scaling, loaded.scaling, wrong(loaded)) == ((), (0.25,), {})
    assert check(plain, "scale").seen == "scaling unknown"
    assert str(check(plain, "scale").hint) == f"cogtools verify {file} --load"
    assert set(wrong(plain).values()) == {"warn"}


def test_a_pattern_for_no_module_is_told(good: Source, tmp_path: Path) -> None:
    report = verify_lora(variant(good, tmp_path, state(rank_pattern={"to_x": 4})))

    assert told(report, "scale") == ["unexpected: to_x (found in rank_pattern, expected a module of the file)"]


def test_more_patterns_than_modules_are_not_evaluated(good: Source, tmp_path: Path) -> None:
    report = verify_lora(variant(good, tmp_path, state(alpha_pattern={f"x{number}": 1 for number in range(1001)})))

    assert told(report, "scale") == ["unreadable: alpha_pattern (found 1,001 keys, expected at most 1,000)"]


def test_strict_takes_a_warning_for_a_failure(good: Source, tmp_path: Path) -> None:
    (damage,) = (damage for damage in DAMAGES if damage.id == "metadata-lost")
    damage.apply(good.file, tmp_path / FILE_NAME)

    assert verify_lora(tmp_path, layers=3).verdict == "warn"
    assert verify_lora(tmp_path, layers=3, strict=True).verdict == "fail"


def test_only_layers_to_transform_are_asked_for_where_stated(good: Source, tmp_path: Path) -> None:
    def keep_two_layers(file: LoraFile) -> None:
        file.tensors = {name: entry for name, entry in file.tensors.items() if ".1.attn1." not in name}

    suffixes = ["to_q", "to_k", "to_v", "to_out.0"]
    stated = variant(
        good,
        tmp_path,
        keep_two_layers,
        state(target_modules=suffixes, layers_to_transform=[0, 2], layers_pattern="transformer_blocks"),
    )

    report = verify_lora(stated, load=True)

    assert (report.verdict, report.layers) == ("pass", (0, 2))


# --- which model it is ----------------------------------------------------------------------------


def header_only(folder: Path, *, layers: int, hidden: int, rank: int = 1) -> Path:
    """A LoRA of a published model's size, its values small numbers, its scale not stated."""
    file = good_lora(layers=layers, hidden=hidden, rank=rank)
    file.metadata = {}
    write(folder / FILE_NAME, file)
    return folder


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.slug)
def test_every_published_model_is_asked_for_all_its_tensors(model: Any, tmp_path: Path) -> None:
    header_only(tmp_path, layers=model.layers, hidden=model.hidden)
    count = model.layers * 8

    told_by_user = check(verify_lora(tmp_path, model=model.slug), "complete")
    recognised = check(verify_lora(tmp_path), "complete")

    assert told_by_user.seen == f"{count} of {count} tensors of {model.name}, as --model says"
    assert (recognised.status, recognised.seen.split(" tensors")[0]) == ("pass", f"{count} of {count}")


def test_a_published_model_is_known_by_its_hidden_size_when_layers_are_missing(tmp_path: Path) -> None:
    report = verify_lora(header_only(tmp_path, layers=28, hidden=1920))

    assert check(report, "complete").seen == "224 of 240 tensors of CogVideoX-2B, as its hidden size says"
    assert told(report, "complete") == ["missing: layers 28-29: all tensors"]


def test_a_lora_of_another_model_does_not_fit(tmp_path: Path) -> None:
    report = verify_lora(header_only(tmp_path, layers=2, hidden=1920), model="5b")

    assert wrong(report)["shapes"] == "fail"
    assert sum(len(problem.keys) for problem in check(report, "shapes").problems) == 16
    assert told(report, "shapes") == [
        "shape: layers 0-1: to_q lora_A, to_k lora_A, to_v lora_A, to_out.0 lora_A "
        "(found (1, 1920), expected (rank, 3072))",
        "shape: layers 0-1: to_q lora_B, to_k lora_B, to_v lora_B, to_out.0 lora_B "
        "(found (1920, 1), expected (3072, rank))",
    ]


def test_a_file_that_nothing_tells_the_model_of_is_a_warning(tmp_path: Path) -> None:
    report = verify_lora(header_only(tmp_path, layers=2, hidden=128))

    assert wrong(report) == {"complete": "warn", "scale": "warn"}
    assert check(report, "complete").seen.endswith("nothing tells how many layers the model has: taken to be 2")
    assert str(check(report, "complete").hint) == "state it with --model or --layers"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"model": "3b"}, "there is no such model"),
        ({"layers": 0}, "no transformer has so many layers"),
        ({"model": "2b", "layers": 3}, "--model and --layers both say how many layers there are"),
        ({"ema": True}, "--iteration and --ema say which weights of a checkpoint are meant, and there is none"),
        ({"iteration": 0}, "--iteration and --ema say which weights of a checkpoint are meant, and there is none"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], what: str, good: Source) -> None:
    with pytest.raises(OptionError) as error:
        verify_lora(good.file, **options)

    assert error.value.what == what


# --- files that mean harm -------------------------------------------------------------------------


def record(**fields: object) -> Callable[[LoraFile], object]:
    def edit(file: LoraFile) -> None:
        file.metadata["cogtools"] = json.dumps(fields)

    return edit


@pytest.mark.parametrize("layers", [10**12, -1, 0, "30", 3.0, True, None, [3]])
def test_a_record_with_an_impossible_number_of_layers_is_not_believed(
    layers: object, good: Source, tmp_path: Path
) -> None:
    report = verify_lora(variant(good, tmp_path, record(transformer_layers=layers, hidden_size=layers, models=7)))

    assert check(report, "complete").seen == (
        "24 of 24 tensors of CogVideoX of no published size: 3 layers, hidden size 128, as target_modules says"
    )


def test_a_recorded_dtype_that_is_none_is_not_believed(good: Source, tmp_path: Path) -> None:
    given = record(alpha=1, rank=4, scale="fold", source_dtype="x" * 1000, dtype="float16\x1b[2J")

    report = verify_lora(variant(good, tmp_path, given, state(lora_alpha=4)), layers=3)

    assert check(report, "record").seen == "alpha 1 (scale: fold), rank 4, as exported"


@pytest.mark.parametrize("text", ["", "[", "[1]", "7", "[" * 100_000])
def test_a_record_that_is_no_object_is_not_believed(text: str, good: Source, tmp_path: Path) -> None:
    def edit(file: LoraFile) -> None:
        file.metadata["cogtools"] = text

    assert verify_lora(variant(good, tmp_path, edit), layers=3).verdict == "pass"


@pytest.mark.parametrize("pattern", [r"(\w+\s?)+!", "(", "to_q" * 100])
def test_a_pattern_that_could_run_for_ever_is_not_evaluated(pattern: str, good: Source, tmp_path: Path) -> None:
    report = verify_lora(variant(good, tmp_path, state(alpha_pattern={pattern: 4})))

    assert wrong(report) == {"scale": "warn"}


@pytest.mark.parametrize(
    "pattern",
    ["transformer_blocks.1.attn1.to_q", "^transformer_blocks.1.attn1.to_q", r"transformer_blocks\.1\.attn1\.to_q"],
)
def test_a_pattern_means_the_modules_that_peft_takes_it_for(pattern: str, good: Source, tmp_path: Path) -> None:
    report = verify_lora(variant(good, tmp_path, state(alpha_pattern={pattern: 4}), unrecord), load=True)

    assert (report.scaling, wrong(report)) == ((0.25, 1.0), {})
    assert check(report, "scale").seen == "scaling 0.25, 1"


HUGE = 10**400


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("lora_alpha", "invalid: lora_alpha (found a number of 401 digits, expected a number above 0)"),
        ("r", "invalid: r (found a number of 401 digits, expected a whole number, 1 or more)"),
    ],
)
def test_a_number_too_large_to_be_meant_is_a_failure(name: str, problem: str, good: Source, tmp_path: Path) -> None:
    report = verify_lora(variant(good, tmp_path, state(**{name: HUGE})), against=good.checkpoint)

    assert told(report, "scale") == [problem]
    assert report.scaling == ()


@pytest.mark.parametrize("alpha", [HUGE, 1e308, float("inf"), float("nan"), 5e-324, -1, 0])
def test_a_recorded_alpha_that_is_not_meant_is_not_believed(alpha: float, good: Source, tmp_path: Path) -> None:
    given = record(alpha=alpha, alpha_source="--alpha", rank=4, scale="fold", source_dtype="float16", dtype="float16")

    report = verify_lora(variant(good, tmp_path, given), against=good.checkpoint)

    assert report_json("verify", "wrong", report)
    assert check(report, "record").seen == "rank 4, float16, as exported"


def test_json_has_no_number_that_json_does_not_know() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        report_json("verify", "ok", {"scaling": float("inf")})


def test_a_file_of_another_name_is_not_given_to_diffusers_to_unpickle(good: Source, tmp_path: Path) -> None:
    (tmp_path / "lora.bin").write_bytes(good.file.read_bytes())

    report = verify_lora(tmp_path / "lora.bin", load=True)

    assert wrong(report) == {"load": "fail"}
    assert check(report, "load").seen == (
        "diffusers reads safetensors only from a file named .safetensors, not lora.bin"
    )


# --- which file is meant --------------------------------------------------------------------------


def test_the_only_safetensors_file_of_a_folder_is_the_one(good: Source, tmp_path: Path) -> None:
    (tmp_path / "disney.safetensors").write_bytes(good.file.read_bytes())

    assert verify_lora(tmp_path, load=True).path == tmp_path / "disney.safetensors"


def test_a_folder_of_several_files_is_no_answer(good: Source, tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(good.file.read_bytes())

    with pytest.raises(CheckpointError) as error:
        verify_lora(tmp_path)

    assert str(error.value) == (
        "there are several safetensors files in this folder\n"
        f"  file:      {tmp_path}\n"
        "  found:     a.safetensors, b.safetensors\n"
        "  expected:  pytorch_lora_weights.safetensors or adapter_model.safetensors\n"
        "  try:       name the file itself"
    )


def test_of_a_folder_of_loras_each_is_verified_by_itself(good: Source, tmp_path: Path) -> None:
    for name in ("lora-disney-1000", "lora-disney-2000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / FILE_NAME).write_bytes(good.file.read_bytes())

    with pytest.raises(CheckpointError) as error:
        verify_lora(tmp_path)

    assert str(error.value) == (
        "there is no output in this folder, but in folders in it: they are verified one by one\n"
        f"  file:      {tmp_path}\n"
        "  found:     lora-disney-1000, lora-disney-2000\n"
        f"  try:       cogtools verify {tmp_path}/lora-disney-1000"
    )


def test_of_a_folder_of_models_each_is_verified_by_itself(tmp_path: Path) -> None:
    (tmp_path / "sft-disney-1000" / "transformer").mkdir(parents=True)

    with pytest.raises(CheckpointError) as error:
        verify_lora(tmp_path)

    assert error.value.found == "sft-disney-1000"
    assert error.value.hint == Hint(command=f"cogtools verify {tmp_path}/sft-disney-1000")


@pytest.mark.parametrize("name", ["missing", "missing/lora.safetensors"])
def test_what_is_not_there_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such file"):
        verify_lora(tmp_path / name, load=True)


def test_an_empty_folder_and_a_checkpoint_are_errors_with_a_hint(good: Source, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no LoRA file in this folder"):
        verify_lora(tmp_path)
    with pytest.raises(CheckpointError, match="this is a checkpoint, not an exported LoRA") as error:
        verify_lora(good.checkpoint)
    assert (
        str(error.value.hint)
        == f"export it, then verify what was written: cogtools export-lora {good.checkpoint} OUT_DIR"
    )


def test_a_lora_that_torch_saved_is_to_be_saved_as_safetensors(tmp_path: Path) -> None:
    file = good_lora()
    torch.save({name: torch.zeros(entry.shape) for name, entry in file.tensors.items()}, tmp_path / "lora.bin")

    with pytest.raises(CheckpointError) as error:
        verify_lora(tmp_path / "lora.bin")

    assert str(error.value) == (
        "this is a LoRA with diffusers' names that torch.save wrote\n"
        f"  file:      {tmp_path}/lora.bin\n"
        "  found:     torch.save (zip)\n"
        "  expected:  a safetensors file: to load this one, diffusers would unpickle it, which can run code\n"
        f"  try:       write it as safetensors: cogtools export-lora {tmp_path}/lora.bin OUT_DIR"
    )


def test_a_checkpoint_without_a_lora_is_for_inspect(tmp_path: Path) -> None:
    torch.save({"decoder.conv_in.weight": torch.zeros(2)}, tmp_path / "vae.pt")

    with pytest.raises(CheckpointError, match="this is a checkpoint, not an exported LoRA") as error:
        verify_lora(tmp_path / "vae.pt")

    assert str(error.value.hint) == f"to see what it holds: cogtools inspect {tmp_path}/vae.pt"


def test_a_missing_checkpoint_is_told_before_any_value_is_read(good: Source, tmp_path: Path) -> None:
    read_bytes: list[int] = []

    with pytest.raises(CheckpointError, match="there is no such file"):
        verify_lora(good.file, against=tmp_path / "missing.pt", progress=lambda done, _: read_bytes.append(done))

    assert read_bytes == []


# --- what export-lora writes ----------------------------------------------------------------------

LAYERS = 3
SCALES: tuple[Scale, ...] = ("metadata", "fold")
CASTS: tuple[Cast, ...] = ("keep", "fp32", "fp16", "bf16")


@pytest.fixture(scope="module", params=["float16", "bfloat16", "float32"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A save folder of the trainer, alpha 3, rank 4: a scaling that is no power of two."""
    folder: Path = tmp_path_factory.mktemp(request.param) / "run"
    toy = factories.toy(factories.COGVIDEOX_2B)
    plain, ema = (
        factories.sat_checkpoint(factories.sat_state_dict(toy, 4, getattr(torch, request.param), seed=seed))
        for seed in (0, 1)
    )
    factories.save_run(folder, plain, ema=ema, rank=4, alpha=3)
    return folder


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", CASTS)
def test_what_the_exporter_writes_is_verified_whatever_the_scale_and_dtype(
    scale: Scale, dtype: Cast, run: Path, tmp_path: Path
) -> None:
    export_lora(run, tmp_path, scale=scale, dtype=dtype)

    report = verify_lora(tmp_path, against=run, load=True)

    assert wrong(report) == {}
    assert report.scaling == (1.0 if scale == "fold" else 0.75,)
    assert check(report, "complete").seen.endswith(", as the exporter's record says")


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", CASTS)
@pytest.mark.parametrize("factor", ["A", "B"])
def test_a_value_that_is_one_step_off_is_found_whatever_the_scale_and_dtype(
    scale: Scale, dtype: Cast, factor: str, run: Path, tmp_path: Path
) -> None:
    export_lora(run, tmp_path, scale=scale, dtype=dtype)
    file = read(tmp_path / FILE_NAME)
    name = key(1, "to_v", factor)
    entry = file.tensors[name]
    itemsize = {"F16": 2, "BF16": 2, "F32": 4}[entry.dtype]
    data = bytearray(entry.data)
    data[5 * itemsize] ^= 2  # two units in the last place, of value 5
    file.tensors[name] = replace(entry, data=bytes(data))
    write(tmp_path / FILE_NAME, file)

    report = verify_lora(tmp_path, against=run)

    assert wrong(report) == {"against": "fail"}
    (text,) = told(report, "against")
    place = f"[{5 // entry.shape[1]}, {5 % entry.shape[1]}]"
    assert text.startswith(f"value: {name} (found ")
    assert f" at {place} (1 of 512 values differ), expected " in text


def test_ema_weights_are_not_the_plain_ones(run: Path, tmp_path: Path) -> None:
    export_lora(run, tmp_path, ema=True)

    assert wrong(verify_lora(tmp_path, against=run, iteration=1000)) == {"against": "fail"}
    assert wrong(verify_lora(tmp_path, against=run, ema=True, iteration=1000)) == {}


def test_a_scale_left_out_on_purpose_is_a_warning_that_says_the_weight(run: Path, tmp_path: Path) -> None:
    export_lora(run, tmp_path, scale="none")

    report = verify_lora(tmp_path, against=run)

    assert wrong(report) == {"scale": "warn", "against-scale": "warn"}
    assert check(report, "against-scale").seen == "left out, as the file's record says: load it at weight 0.75"


def test_an_alpha_given_by_hand_is_told_where_the_training_says_another(run: Path, tmp_path: Path) -> None:
    export_lora(run, tmp_path / "same", alpha=3)
    export_lora(run, tmp_path / "other", alpha=8)

    assert wrong(verify_lora(tmp_path / "same", against=run)) == {}
    report = verify_lora(tmp_path / "other", against=run)
    assert wrong(report) == {"against-scale": "warn"}
    assert check(report, "against-scale").seen == (
        "scaling 2: alpha 8 (given by --alpha, as the file's record says) / rank 4; "
        "but training_config.yaml says alpha 3"
    )


@pytest.fixture
def run_of(tmp_path: Path) -> Callable[..., Path]:
    """Makes the trainer's save folder of a toy, rank 4, with or without an alpha in its configuration."""

    def make(**options: Any) -> Path:
        state_dict = factories.sat_state_dict(factories.toy(factories.COGVIDEOX_2B), 4)
        factories.save_run(tmp_path / "run", factories.sat_checkpoint(state_dict), rank=4, **options)
        return tmp_path / "run"

    return make


def test_an_alpha_given_by_hand_is_told_where_the_training_used_the_default(
    run_of: Callable[..., Path], tmp_path: Path
) -> None:
    run = run_of()
    export_lora(run, tmp_path / "out", alpha=8)

    report = verify_lora(tmp_path / "out", against=run)

    assert wrong(report) == {"against-scale": "warn"}
    assert check(report, "against-scale").seen == (
        "scaling 2: alpha 8 (given by --alpha, as the file's record says) / rank 4; "
        "but training_config.yaml sets no lora_alpha, so the training used 1, SAT's default"
    )
    assert str(check(report, "against-scale").hint) == "if training_config.yaml is right, export again without --alpha"


def test_an_alpha_given_by_hand_does_without_a_configuration_that_cannot_be_read(
    run_of: Callable[..., Path], tmp_path: Path
) -> None:
    run = run_of()
    (run / "training_config.yaml").write_text("model: [")
    export_lora(run, tmp_path / "out", alpha=8)

    assert wrong(verify_lora(tmp_path / "out", against=run)) == {}


@pytest.mark.parametrize("scale", SCALES)
def test_an_alpha_whose_configuration_is_not_beside_the_checkpoint_is_a_warning(
    scale: Scale, run_of: Callable[..., Path], tmp_path: Path
) -> None:
    run = run_of(alpha=3)
    export_lora(run, tmp_path / "out", scale=scale)
    (run / "training_config.yaml").unlink()

    report = verify_lora(tmp_path / "out", against=run)

    assert wrong(report) == {"against-scale": "warn"}
    assert check(report, "against-scale").seen == (
        "scaling 0.75; the training's alpha is not known without a training_config.yaml beside the checkpoint, "
        "the file's record says 3 (from training_config.yaml)"
    )


def test_an_alpha_given_by_hand_is_believed_where_there_is_no_configuration(
    run_of: Callable[..., Path], tmp_path: Path
) -> None:
    run = run_of()
    (run / "training_config.yaml").unlink()
    export_lora(run, tmp_path / "out", alpha=8)

    assert wrong(verify_lora(tmp_path / "out", against=run)) == {}


def test_a_lost_scale_is_a_failure_where_there_is_no_configuration(run_of: Callable[..., Path], tmp_path: Path) -> None:
    run = run_of()
    (run / "training_config.yaml").unlink()
    export_lora(run, tmp_path / "out")
    by_file(forget)(tmp_path / "out" / FILE_NAME, tmp_path / FILE_NAME)

    report = verify_lora(tmp_path / FILE_NAME, layers=LAYERS, against=run)

    assert wrong(report) == {"scale": "warn", "against-scale": "fail"}
    assert check(report, "against-scale").seen == (
        "scaling 1, where the training's is 0.25: alpha 1 (SAT's default) / rank 4"
    )


def test_a_file_of_the_ema_weights_is_told_where_to_look(run: Path, tmp_path: Path) -> None:
    export_lora(run, tmp_path, ema=True)

    report = verify_lora(tmp_path, against=run, iteration=1000)

    assert str(check(report, "against").hint) == (
        "the training has EMA weights too: "
        f"cogtools verify {tmp_path}/{FILE_NAME} --against {run} --iteration 1000 --ema"
    )
    assert report.notices == ("Took the plain weights of iteration 1000. Its EMA weights are in 1000-ema beside them.",)


def test_a_file_of_another_iteration_is_told_which(run_of: Callable[..., Path], tmp_path: Path) -> None:
    run = run_of()
    export_lora(run, tmp_path / "out")
    state_dict = factories.sat_state_dict(factories.toy(factories.COGVIDEOX_2B), 4, seed=7)
    (run / "2000").mkdir()
    torch.save(factories.sat_checkpoint(state_dict, iteration=2000), run / "2000" / "mp_rank_00_model_states.pt")
    (run / "latest").write_text("2000")

    report = verify_lora(tmp_path / "out", against=run, iteration=2000)

    assert str(check(report, "against").hint) == (
        "the file's record says iteration 1000, and this is iteration 2000: "
        f"cogtools verify {tmp_path}/out/{FILE_NAME} --against {run} --iteration 1000"
    )


def test_a_damaged_export_is_made_again_as_it_was_made(run_of: Callable[..., Path], tmp_path: Path) -> None:
    run = run_of()
    export_lora(run, tmp_path / "out", alpha=3, scale="fold", dtype="fp32", iteration=1000)
    by_file(drop(key(1, "to_q", "B")))(tmp_path / "out" / FILE_NAME, tmp_path / FILE_NAME)

    report = verify_lora(tmp_path / FILE_NAME, against=run, iteration=1000)

    assert str(check(report, "pairs").hint) == (
        f"cogtools export-lora {run} --iteration 1000 {tmp_path}/{FILE_NAME} "
        "--alpha 3 --scale fold --dtype fp32 --overwrite"
    )


@pytest.mark.parametrize(
    ("transformer", "text"),
    [
        (Transformer(30, 1920, MODELS[:1]), "CogVideoX-2B"),
        (Transformer(42, 3072, MODELS[1:]), "CogVideoX-5B (all of the 5B family have the same ones)"),
        (Transformer(42, 3072, MODELS[2:3]), "CogVideoX-5B-I2V"),
        (Transformer(3, 128, ()), "a CogVideoX-2B with 3 layers of hidden size 128"),
    ],
)
def test_the_transformer_that_a_file_is_loaded_into_is_told(transformer: Transformer, text: str) -> None:
    assert _which(transformer) == text


def test_a_partial_lora_is_verified_as_one(tmp_path: Path) -> None:
    toy = factories.toy(factories.COGVIDEOX_2B)
    state_dict = factories.sat_state_dict(toy, 4, layers=[0, 2])
    checkpoint = factories.save_run(
        tmp_path / "run", factories.sat_checkpoint(state_dict), rank=4, alpha=1, layer_range=[0, 2]
    )
    export_lora(checkpoint, tmp_path / "out")

    report = verify_lora(tmp_path / "out", against=checkpoint, load=True)

    assert wrong(report) == {}
    assert "target_modules states layers 0, 2: all tensors" in check(report, "complete").seen


def test_the_export_of_every_real_checkpoint_is_verified(real_run: Path, tmp_path: Path) -> None:
    export_lora(real_run, tmp_path)

    report = verify_lora(tmp_path, against=real_run, load=True)

    assert wrong(report) == {}
    assert (report.tensors, report.rank, report.scaling) == (24, (4,), (0.25,))


# --- what diffusers and PEFT write ----------------------------------------------------------------


def bare_transformer() -> Any:
    """A toy CogVideoX."""
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=2, num_layers=LAYERS, time_embed_dim=32, text_embed_dim=32, sample_width=8,
        sample_height=8, sample_frames=9, max_text_seq_length=16,
    )  # fmt: skip


def adapted_transformer(**config: Any) -> Any:
    """A toy CogVideoX with a LoRA that PEFT made, all of it random."""
    from peft import LoraConfig

    transformer = bare_transformer()
    suffixes = ["to_q", "to_k", "to_v", "to_out.0"]
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": suffixes, "init_lora_weights": False}
    transformer.add_adapter(LoraConfig(**(defaults | config)))
    return transformer


def save_with_diffusers(transformer: Any, folder: Path, *, metadata: bool) -> None:
    from diffusers.loaders.lora_pipeline import CogVideoXLoraLoaderMixin
    from peft import get_peft_model_state_dict

    adapter = transformer.peft_config["default"].to_dict() if metadata else None
    CogVideoXLoraLoaderMixin.save_lora_weights(
        str(folder),
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=adapter,
    )


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        ({}, 24),
        ({"target_modules": ["to_q", "to_v"]}, 12),
        ({"layers_to_transform": [0, 2], "layers_pattern": "transformer_blocks"}, 16),
        ({"rank_pattern": {"transformer_blocks.1.attn1.to_q": 8},
          "alpha_pattern": {"transformer_blocks.1.attn1.to_q": 16}}, 24),
    ],
    ids=["all", "two-projections", "two-layers", "another-rank"],
)  # fmt: skip
def test_what_diffusers_saves_is_verified(config: dict[str, Any], tensors: int, tmp_path: Path) -> None:
    save_with_diffusers(adapted_transformer(**config), tmp_path, metadata=True)

    report = verify_lora(tmp_path, layers=LAYERS, load=True)

    assert wrong(report) == {}
    assert (report.tensors, report.scaling) == (tensors, (2.0,))


@pytest.mark.parametrize(
    ("expression", "tensors", "doubts"),
    [
        (r"transformer_blocks\.[01]\.attn1\.(to_q|to_k|to_v|to_out\.0)", 16, {"complete", "target_modules"}),
        (r".*\.attn1\.(to_q|to_k|to_v|to_out\.0)", 24, {"target_modules"}),
    ],
    ids=["two-layers", "all-layers"],
)
def test_modules_that_an_expression_names_are_a_doubt_until_they_are_loaded(
    expression: str, tensors: int, doubts: set[str], tmp_path: Path
) -> None:
    save_with_diffusers(adapted_transformer(target_modules=expression), tmp_path, metadata=True)

    plain = verify_lora(tmp_path, layers=LAYERS)
    loaded = verify_lora(tmp_path, layers=LAYERS, load=True, strict=True)

    assert wrong(plain) == dict.fromkeys(doubts, "warn")
    assert wrong(loaded) == {}
    assert check(loaded, "complete").seen.startswith(f"{tensors} of {tensors} tensors of ")
    assert check(loaded, "target_modules").seen == f"a regular expression that PEFT matches with {tensors // 2} modules"


def test_modules_that_are_excluded_are_not_missing(tmp_path: Path) -> None:
    excluded = [f"transformer_blocks.1.attn1.{name}" for name in PROJECTIONS]
    save_with_diffusers(adapted_transformer(exclude_modules=excluded), tmp_path, metadata=True)

    report = verify_lora(tmp_path, layers=LAYERS, load=True)

    # PEFT misses modules to exclude: diffusers tells it those that the file has.
    assert wrong(report) == {"load": "warn"}
    assert check(report, "complete").seen.startswith("16 of 16 tensors of ")


def test_modules_that_an_expression_excludes_are_a_doubt(tmp_path: Path) -> None:
    save_with_diffusers(adapted_transformer(exclude_modules=r".*\.1\.attn1\..*"), tmp_path, metadata=True)

    assert wrong(verify_lora(tmp_path, layers=LAYERS)) == {"complete": "warn", "target_modules": "warn"}
    assert wrong(verify_lora(tmp_path, layers=LAYERS, load=True)) == {"load": "warn"}


def test_the_state_dict_of_a_peft_model_that_diffusers_saved_is_called_that(tmp_path: Path) -> None:
    from diffusers.loaders.lora_pipeline import CogVideoXLoraLoaderMixin
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    model = get_peft_model(bare_transformer(), LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    CogVideoXLoraLoaderMixin.save_lora_weights(str(tmp_path), get_peft_model_state_dict(model))

    report = verify_lora(tmp_path, layers=LAYERS)

    assert check(report, "names").seen == (
        "these are diffusers' names after diffusers' and PEFT's prefixes: diffusers would load none of them"
    )


def test_what_diffusers_saves_without_a_scale_is_a_warning(tmp_path: Path) -> None:
    save_with_diffusers(adapted_transformer(), tmp_path, metadata=False)

    report = verify_lora(tmp_path, layers=LAYERS, load=True)

    assert wrong(report) == {"scale": "warn"}
    assert check(report, "scale").seen == "not stated: diffusers runs it at scaling 1"


@pytest.fixture
def peft_folder(tmp_path: Path) -> Path:
    """The good file as PEFT's folder, without the record of an export."""
    file = good_lora()
    unrecord(file)
    adapter = {name.removeprefix(PREFIX): value for name, value in file.adapter.items()}
    file.tensors = {"base_model.model." + name.removeprefix(PREFIX): entry for name, entry in file.tensors.items()}
    del file.metadata["lora_adapter_metadata"]
    write(tmp_path / "adapter_model.safetensors", file)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **adapter}))
    return tmp_path


def test_a_peft_folder_is_verified_by_its_own_names(peft_folder: Path, good: Source) -> None:
    report = verify_lora(peft_folder, against=good.checkpoint, load=True)

    assert wrong(report) == {}
    assert (report.layout, report.scaling) == ("peft", (0.25,))


def test_a_peft_folder_without_its_configuration_states_no_scale(peft_folder: Path) -> None:
    (peft_folder / "adapter_config.json").unlink()

    report = verify_lora(peft_folder, layers=LAYERS)

    assert wrong(report) == {"scale": "fail"}


@pytest.mark.parametrize(
    ("peft_type", "problem"),
    [
        (None, "missing: peft_type (expected LORA)"),
        ("LOHA", 'invalid: peft_type (found "LOHA", expected LORA)'),
        ("lora", 'invalid: peft_type (found "lora", expected LORA)'),
    ],
)
def test_an_adapter_of_another_type_is_a_failure(peft_type: str | None, problem: str, peft_folder: Path) -> None:
    path = peft_folder / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["peft_type"]
    path.write_text(json.dumps(config | ({} if peft_type is None else {"peft_type": peft_type})))

    report = verify_lora(peft_folder)

    assert wrong(report) == {"scale": "fail"}
    assert told(report, "scale") == [problem]
    assert str(check(report, "scale").hint) == "make it again with the program that wrote it; PEFT is to load it"


def test_a_file_that_peft_does_not_find_is_a_failure(peft_folder: Path) -> None:
    (peft_folder / "adapter_model.safetensors").rename(peft_folder / "disney.safetensors")

    report = verify_lora(peft_folder)

    assert wrong(report) == {"names": "fail"}
    assert check(report, "names").seen == "the file is not called adapter_model.safetensors"
    assert told(report, "names") == [
        "unexpected: disney.safetensors (expected adapter_model.safetensors: PEFT reads no other file)"
    ]


def test_diffusers_names_in_a_peft_folder_are_called_that(peft_folder: Path, good: Source) -> None:
    (peft_folder / "adapter_model.safetensors").write_bytes(good.file.read_bytes())

    report = verify_lora(peft_folder, load=True)

    assert check(report, "names").seen == "these are diffusers' names: PEFT would load none of them"
    assert wrong(report) == {"names": "fail", "load": "fail"}


def test_a_peft_configuration_of_any_length_is_not_read(peft_folder: Path) -> None:
    (peft_folder / "adapter_config.json").write_text(" " * (1 << 21))

    found = check(verify_lora(peft_folder), "scale")
    problem = Problem("unreadable", "adapter_config.json", "2,097,152 bytes", "at most 1,048,576")
    assert (found.status, found.problems) == ("fail", (problem,))
