import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from cogtools.layouts.diffusers import FILE_NAME
from tests.support.damage import (
    ADAPTER_KEY,
    DAMAGES,
    EXPRESSIONS,
    GOOD,
    TORCH_DTYPES,
    Damage,
    LoraFile,
    Outcome,
    caught_by,
    decode,
    encode,
    good_lora,
    markdown,
    read,
    told,
    write,
)
from tests.support.diffusers_alone import diffusers_alone

SEVERITY = ("pass", "warn", "fail", "error")


def named(damage: Damage) -> str:
    return damage.id


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / FILE_NAME
    write(path, good_lora())
    return path


@pytest.mark.parametrize("damage", DAMAGES, ids=named)
def test_diffusers_alone_does_with_a_damaged_file_what_the_table_says(
    damage: Damage, good: Path, tmp_path: Path
) -> None:
    damage.apply(good, tmp_path / FILE_NAME)

    assert (tmp_path / FILE_NAME).read_bytes() != good.read_bytes()
    assert diffusers_alone(tmp_path / FILE_NAME) == damage.diffusers


@pytest.mark.parametrize("variant", [*EXPRESSIONS, *GOOD], ids=named)
def test_diffusers_loads_a_good_variant_without_a_word(variant: Damage, good: Path, tmp_path: Path) -> None:
    variant.apply(good, tmp_path / FILE_NAME)

    assert variant.diffusers.says == "silent"
    assert diffusers_alone(tmp_path / FILE_NAME) == variant.diffusers


def test_a_log_level_does_not_hide_what_diffusers_says(good: Path, tmp_path: Path) -> None:
    (damage,) = (damage for damage in DAMAGES if damage.id == "prefix-lost")
    damage.apply(good, tmp_path / FILE_NAME)
    logger = logging.getLogger("diffusers")
    level = logger.level

    try:
        logger.setLevel(logging.CRITICAL)
        assert diffusers_alone(tmp_path / FILE_NAME) == damage.diffusers
        assert logger.level == logging.CRITICAL
    finally:
        logger.setLevel(level)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_a_good_file_of_another_dtype_can_be_damaged_in_the_same_ways(dtype: str, tmp_path: Path) -> None:
    good = tmp_path / FILE_NAME
    write(good, good_lora(layers=2, hidden=64, rank=8, alpha=2, dtype=dtype))

    unchanged = []
    for damage in DAMAGES:
        damage.apply(good, tmp_path / damage.id)
        if (tmp_path / damage.id).read_bytes() == good.read_bytes():
            unchanged.append(damage.id)

    assert unchanged == []


def test_ids_are_unique() -> None:
    ids = [damage.id for damage in (*DAMAGES, *EXPRESSIONS, *GOOD)]

    assert sorted(ids) == sorted(set(ids))


def test_an_option_of_verify_makes_no_verdict_milder_but_load_tells_what_an_expression_means() -> None:
    milder = [
        damage.id
        for damage in (*DAMAGES, *EXPRESSIONS, *GOOD)
        if SEVERITY.index(damage.plain) > min(SEVERITY.index(damage.against), SEVERITY.index(damage.load))
    ]

    assert milder == ["alpha-pattern-expression", "rank-pattern-expression", "targets-expression"]


def test_a_check_that_needs_an_option_is_the_one_that_fails() -> None:
    verdicts = {
        damage.id: (damage.plain, damage.against, damage.load)
        for damage in DAMAGES
        if damage.check in {"against", "against-scale"}
    }
    needed = {damage.id: ("pass", "fail", "pass") for damage in DAMAGES if damage.plain == "pass"}

    assert verdicts == needed


def test_what_diffusers_refuses_or_warns_of_does_not_pass_with_load() -> None:
    passed = [damage.id for damage in DAMAGES if damage.diffusers.says != "silent" and damage.load == "pass"]

    assert passed == []


@pytest.mark.parametrize(
    "damage",
    [damage for damage in DAMAGES if damage.check == "readable" and damage.diffusers.says == "error"],
    ids=named,
)
def test_a_file_that_is_called_unreadable_is_refused_by_safetensors(damage: Damage, good: Path, tmp_path: Path) -> None:
    damage.apply(good, tmp_path / FILE_NAME)

    with pytest.raises(SafetensorError):
        load_file(tmp_path / FILE_NAME)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_a_file_is_written_as_safetensors_reads_it(dtype: str, tmp_path: Path) -> None:
    file = good_lora(dtype=dtype)
    write(tmp_path / FILE_NAME, file)

    tensors = load_file(tmp_path / FILE_NAME)
    with safe_open(tmp_path / FILE_NAME, "pt") as opened:
        assert opened.metadata() == file.metadata
    assert {name: tensor.dtype for name, tensor in tensors.items()} == dict.fromkeys(file.tensors, TORCH_DTYPES[dtype])
    for name, entry in file.tensors.items():
        np.testing.assert_array_equal(tensors[name].float().numpy(), decode(entry))
    assert read(tmp_path / FILE_NAME) == file


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_values_are_rounded_as_torch_rounds_them(dtype: str) -> None:
    numbers = np.random.default_rng(1).normal(0, 1, 10_000).astype(np.float32)

    rounded = decode(encode(numbers, dtype))

    np.testing.assert_array_equal(rounded, torch.from_numpy(numbers).to(TORCH_DTYPES[dtype]).float().numpy())


def test_the_good_file_is_24_different_tensors_with_its_scale_stated() -> None:
    file: LoraFile = good_lora()

    assert len({entry.data for entry in file.tensors.values()}) == len(file.tensors) == 24
    assert (file.rank, file.alpha) == (4, 1)
    assert set(file.metadata) == {"format", "cogtools", ADAPTER_KEY}


def test_the_table_has_a_row_per_damage_in_markdown() -> None:
    lines = markdown().splitlines()

    assert lines[:3] == [
        "| damage | what diffusers alone does | caught by |",
        "| --- | --- | --- |",
        "| no bytes at all | `OSError` | not opened: exit code 2 |",
    ]
    assert len(lines) == 2 + len(DAMAGES)


@pytest.mark.parametrize(
    ("outcome", "text"),
    [
        (Outcome("silent"), "**silent**"),
        (Outcome("silent", taken=8, scaling=(1.0,)), "**silent**, 8 of 12 modules, scaling 1"),
        (Outcome("silent", scaling=(0.25, 1.0)), "**silent**, scaling 0.25 and 1"),
        (
            Outcome("warning", "peft", taken=11, wanting=1),
            "a warning (peft), 11 of 12 modules, 1 left unfilled",
        ),
        (Outcome("warning", "diffusers", taken=0, scaling=()), "a warning (diffusers), 0 of 12 modules"),
        (Outcome("error", "KeyError", taken=0, scaling=()), "`KeyError`"),
    ],
)
def test_an_outcome_is_told_in_a_few_words(outcome: Outcome, text: str) -> None:
    assert told(outcome) == text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("nan", "`finite`"),
        ("b-zero", "`untrained`, a warning"),
        ("bit-flipped", "`--against`: `against`"),
        ("alpha-is-rank", "`record`"),
        ("alpha-is-rank-bare", "`--against`: `against-scale`"),
        ("pissa", "`scale`, a warning; `--load`: `load`"),
        ("dropout", "`scale`"),
        ("layers-without-pattern", "`target_modules`"),
    ],
)
def test_the_check_is_named_with_what_it_needs(name: str, text: str) -> None:
    assert [caught_by(damage) for damage in DAMAGES if damage.id == name] == [text]
