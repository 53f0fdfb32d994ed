"""What was merged is held against what it was made of: exact where it is copied, within a unit where it is computed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cogtools
from cogtools.errors import OptionError
from cogtools.export.merge import merge
from cogtools.layouts.diffusers import FILE_NAME
from cogtools.verification.report import Check
from cogtools.verification.verify import verify_lora
from cogtools.verification.verify_model import verify_model
from tests.support.command_line import CommandLine
from tests.support.factories import TOY_2B
from tests.support.models import save_model_run, save_tokenizer
from tests.support.toy_loras import ToyLora, attention, every_module

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
TO_K = "transformer_blocks.1.attn1.to_k.weight"


def check(report: Any, name: str) -> Check:
    (found,) = [check for check in report.checks if check.name == name]
    return found  # type: ignore[no-any-return]


def edit(path: Path, **changes: Any) -> None:
    """Change tensors of a file with functions, and keep its header."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for key, change in changes.items():
        name = key.replace("__", ".")
        tensors[name] = change(tensors[name].clone())
    save_file(tensors, path, metadata=metadata)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_run(tmp_path_factory.mktemp("base") / "run", TOY_2B)


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A LoRA of every module, and one of the attention in fp16."""
    folder, ranks = tmp_path_factory.mktemp("loras"), every_module(3)
    first = ToyLora(ranks, dict.fromkeys(ranks, 1.5), seed=1, convolution=16)
    second = ToyLora(attention(5), dtype=torch.float16, seed=2)
    return first.save(folder / "first.safetensors"), second.save(folder / "second.safetensors")


# A model


@pytest.mark.parametrize("dtype", [None, "fp32", "bf16"])
@pytest.mark.parametrize("form", ["diffusers", "sat"])
def test_a_merged_model_is_its_base_and_its_loras(
    form: Any, dtype: Any, base: Path, loras: tuple[Path, Path], tmp_path: Path
) -> None:
    merge(base, *loras, out=tmp_path / "out", weights=(0.5, -2), format=form, dtype=dtype)
    report = verify_model(tmp_path / "out", against=[base, *loras])
    assert report.verdict == "pass"
    changed = 30 if form == "diffusers" else 21
    count = 88 if form == "diffusers" else 71
    assert check(report, "transformer against").seen == (
        f"{count} tensors are the base's, {changed} of them with 2 LoRAs added, within one unit in the last place"
    )


def test_a_checkpoints_own_lora_need_not_be_given(tmp_path: Path) -> None:
    run = save_model_run(tmp_path / "run", TOY_2B, rank=4)
    merge(run, out=tmp_path / "out")
    report = verify_model(tmp_path / "out", against=run)
    assert report.verdict == "pass"
    assert "12 of them with 1 LoRA added" in check(report, "transformer against").seen


def test_without_the_loras_it_says_what_is_not_compared(
    base: Path, loras: tuple[Path, Path], tmp_path: Path, cogtools_cli: CommandLine
) -> None:
    merge(base, *loras, out=tmp_path / "out")
    result = cogtools_cli("verify", tmp_path / "out", "--against", base, "--json")
    assert (result.code, result.json["report"]["verdict"]) == (0, "warn")
    report = verify_model(tmp_path / "out", against=base)
    assert check(report, "transformer against").status == "pass"
    loras_check = check(report, "transformer against loras")
    assert (loras_check.status, loras_check.seen) == (
        "warn",
        "30 weights not compared: any may have first.safetensors, second.safetensors merged into it",
    )
    edit(tmp_path / "out" / WEIGHTS, norm_final__bias=lambda tensor: tensor + 1)
    assert check(verify_model(tmp_path / "out", against=base), "transformer against").status == "fail"


def test_loras_in_another_order_are_told_by_their_names(
    base: Path, loras: tuple[Path, Path], tmp_path: Path, cogtools_cli: CommandLine
) -> None:
    merge(base, *loras, out=tmp_path / "out", weights=(0.5, 2))
    assert cogtools_cli("verify", tmp_path / "out", *reversed(loras), "--against", base).code == 0


def test_one_unit_in_the_last_place_passes_and_two_fail(base: Path, loras: tuple[Path, Path], tmp_path: Path) -> None:
    merge(base, *loras, out=tmp_path / "out")

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        """The largest value, by a unit away from zero: of small ones the rounding of the products counts too."""
        row, column = divmod(int(tensor.abs().argmax()), tensor.shape[1])
        tensor.view(torch.int16)[row, column] += 1
        return tensor

    for verdict in ("pass", "fail"):
        edit(tmp_path / "out" / WEIGHTS, transformer_blocks__1__attn1__to_k__weight=moved)
        report = verify_model(tmp_path / "out", against=[base, *loras])
        assert check(report, "transformer against").status == verdict
    (problem,) = check(report, "transformer against").problems
    assert problem.subject == TO_K


@pytest.mark.parametrize("wrong", ["weight", "lora", "nan"])
def test_what_was_not_merged_is_found(wrong: str, base: Path, loras: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = loras
    merge(base, first, second, out=tmp_path / "out", weights=(0.5, 1))
    against = [base, first, second]
    if wrong == "lora":
        other = ToyLora(attention(5), dtype=torch.float16, seed=9).save(tmp_path / "other.safetensors")
        against = [base, first, other]
    elif wrong == "nan":
        edit(
            tmp_path / "out" / WEIGHTS, transformer_blocks__1__attn1__to_k__weight=lambda tensor: tensor * float("nan")
        )
    else:
        path = tmp_path / "out" / WEIGHTS
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        record = json.loads(metadata["cogtools"])
        record["merged"][1]["weight"] = 1.01
        save_file(load_file(path), path, metadata={**metadata, "cogtools": json.dumps(record)})
    report = verify_model(tmp_path / "out", against=against)
    found = check(report, "transformer against")
    assert found.status == "fail"
    assert {problem.kind for problem in found.problems} == {"value"}


def test_as_many_loras_as_were_merged(base: Path, loras: tuple[Path, Path], tmp_path: Path) -> None:
    merge(base, *loras, out=tmp_path / "out")
    with pytest.raises(OptionError, match=r"it was made of 2 LoRAs: first\.safetensors, second\.safetensors"):
        verify_model(tmp_path / "out", against=[base, loras[0]])
    cogtools.export_model(base, tmp_path / "plain")
    with pytest.raises(OptionError, match="it was made of 0 LoRAs"):
        verify_model(tmp_path / "plain", against=[base, loras[0]])


@pytest.mark.parametrize("has_records", [True, False], ids=["cogtools'", "another program's"])
def test_a_merged_pipeline_is_held_against_the_pipeline(
    has_records: bool, base: Path, loras: tuple[Path, Path], tmp_path: Path
) -> None:
    save_tokenizer(tmp_path / "parts/tokenizer")
    (tmp_path / "parts/model_index.json").write_text("{}")
    cogtools.export_model(base, tmp_path / "pipeline", base=tmp_path / "parts")
    for path in [] if has_records else tmp_path.glob("pipeline/*/*.safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt"})
    merge(tmp_path / "pipeline", *loras, out=tmp_path / "out")
    against = [tmp_path / "pipeline", *loras]
    report = verify_model(tmp_path / "out", against=against)
    for part in ("transformer", "vae", "text_encoder"):
        assert check(report, f"{part} against").status == "pass"
    edit(tmp_path / "out/vae/diffusion_pytorch_model.safetensors", decoder__conv_in__conv__bias=lambda tensor: -tensor)
    assert check(verify_model(tmp_path / "out", against=against), "vae against").status == "fail"


def test_a_merged_model_loads(base: Path, loras: tuple[Path, Path], tmp_path: Path) -> None:
    merge(base, *loras, out=tmp_path / "out")
    assert check(verify_model(tmp_path / "out", load=True), "load").status == "pass"


# A LoRA


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "fp16"}, {"dtype": "bf16"}, {"rank": 4}, {"rank": 4, "dtype": "fp16"}]
)
@pytest.mark.parametrize("form", ["diffusers", "peft", "comfyui"])
def test_a_merged_lora_adds_what_its_loras_add(
    form: Any, options: dict[str, Any], loras: tuple[Path, Path], tmp_path: Path
) -> None:
    report = merge(*loras, out=tmp_path / "out", weights=(0.5, -2), format=form, **options)
    found = check(verify_lora(report.output, against=loras), "against")
    assert found.status == "pass"
    assert ("as near as rank 4 can come" in found.seen) == ("rank" in options)


@pytest.mark.parametrize("dtype", ["keep", "fp32", "bf16"])
def test_a_lora_that_was_cut_is_the_best_of_its_rank(dtype: Any, run_folder: Path, tmp_path: Path) -> None:
    cogtools.export_lora(run_folder, tmp_path, rank=2, dtype=dtype)
    assert check(verify_lora(tmp_path, against=run_folder), "against").status == "pass"
    key = "transformer__transformer_blocks__1__attn1__to_k__lora_B__weight"
    edit(tmp_path / FILE_NAME, **{key: lambda tensor: tensor * 1.05})
    found = check(verify_lora(tmp_path, against=run_folder), "against")
    assert found.status == "fail"
    assert [problem.subject for problem in found.problems] == ["layer 1: k"]
    assert found.hint is not None
    assert "--rank 2" in str(found.hint.command)


def test_a_merged_lora_that_is_another_one_is_found(
    loras: tuple[Path, Path], tmp_path: Path, cogtools_cli: CommandLine
) -> None:
    first, second = loras
    out = tmp_path / "out.safetensors"
    merge(first, second, out=out, weights=(1, 0.5))
    assert cogtools_cli("verify", out, second, "--against", first).code == 0
    edit(out, transformer__proj_out__lora_A__weight=lambda tensor: tensor * 1.001)
    result = cogtools_cli("verify", out, second, "--against", first, "--json")
    assert result.code == 1
    (against,) = [check for check in result.json["report"]["checks"] if check["name"] == "against"]
    assert [problem["subject"] for problem in against["problems"]] == ["proj_out"]
    assert against["hint"]["command"].startswith(f"cogtools merge {first} {second} {out} --weight 1.0 --weight 0.5")
    with pytest.raises(OptionError, match="it was made of 2 LoRAs"):
        verify_lora(out, against=first)


def test_several_files_go_with_a_merge_only(loras: tuple[Path, Path], cogtools_cli: CommandLine) -> None:
    with pytest.raises(OptionError, match="it was made of one checkpoint"):
        verify_lora(loras[0], against=list(loras))
    assert "verify takes one output" in cogtools_cli("verify", *loras).err


def test_a_batch_of_cut_loras_is_skipped_where_they_are_there_already(
    run_folder: Path, tmp_path: Path, cogtools_cli: CommandLine
) -> None:
    words = ["export-lora", run_folder, f"{tmp_path / 'out'}/", "--all", "--rank", "2"]
    assert "1 done, 0 skipped" in cogtools_cli(*words).out
    assert "0 done, 1 skipped" in cogtools_cli(*words).out
    assert "made with other options" in cogtools_cli(*words[:-1], "3").err
