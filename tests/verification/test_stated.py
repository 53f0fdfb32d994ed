"""What files state in fields of LoraConfig: `verify` passes nothing that the libraries run otherwise."""

from pathlib import Path
from typing import Any

import pytest

from cogtools import verify_lora
from cogtools.conversion.adapter_config import FIELDS, repeats_a_choice
from tests.support.judge import VALUES, Construction, constructions, judge, make

NOT_RIGHT_IN_A_HEADER: list[dict[str, Any]] = [
    {"alora_invocation_tokens": [1]}, {"kasa_config": {}}, {"monteclora_config": {}}, {"lora_dropout": 0.1},
    {"lora_dropout": 0.5}, {"lora_dropout": 1.0}, {"lora_dropout": 2}, {"lora_dropout": "0.5"},
    {"init_lora_weights": "olora"}, {"init_lora_weights": "pissa_niter_4"}, {"init_lora_weights": "corda"},
    {"init_lora_weights": "loftq"}, {"init_lora_weights": "kasa"}, {"init_lora_weights": 1}, {"init_lora_weights": "x"},
    {"bias": None}, {"bias": "x"}, {"layers_pattern": "transformer_blocks"}, {"layer_replication": [[0, 2]]},
    {"trainable_token_indices": [0]}, {"target_parameters": ["proj_out.weight"]}, {"use_bdlora": {}},
    {"arrow_config": {}}, {"runtime_config": {}}, {"megatron_config": {"a": 1}}, {"task_type": "x"},
]  # fmt: skip
NOT_RIGHT_IN_A_FOLDER: list[dict[str, Any]] = [
    {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"alora_invocation_tokens": [1]},
    {"kasa_config": {}}, {"bias": "x"}, {"task_type": "x"}, {"task_type": "CAUSAL_LM"}, {"use_bdlora": {}},
    {"arrow_config": {}}, {"lora_dropout": "0.5"}, {"trainable_token_indices": [0]}, {"layer_replication": [[0, 2]]},
    {"target_modules": ["to_q", "to_k", "to_v", "to_out.0"], "layers_to_transform": [0, 1, 2]},
]  # fmt: skip


@pytest.mark.parametrize(
    "construction",
    [*(Construction("header", fields) for fields in NOT_RIGHT_IN_A_HEADER),
     *(Construction("folder", fields) for fields in NOT_RIGHT_IN_A_FOLDER)],
    ids=lambda construction: construction.id,
)  # fmt: skip
def test_a_value_that_libraries_fail_on_or_run_otherwise_is_no_pass(construction: Construction, tmp_path: Path) -> None:
    report = verify_lora(make(construction, tmp_path), layers=3)

    assert report.verdict != "pass"


@pytest.mark.slow
@pytest.mark.parametrize("construction", constructions()[::30], ids=lambda construction: construction.id)
def test_verdicts_are_just(construction: Construction, tmp_path: Path) -> None:
    """A part of what `make judge` does."""
    judgement = judge(construction, tmp_path)

    assert judgement.is_just, judgement


def test_every_field_is_judged() -> None:
    # Those two are never handed on to the libraries.
    assert FIELDS.keys() - VALUES.keys() == {"megatron_config", "megatron_core"}
    assert len(constructions()) >= 200


@pytest.mark.parametrize(
    "expression",
    [
        r"(\w+\.?)+!", "(a|a)*", "(a+)+", "((a+))+", "([(]a+)+", "(?:a*)*", "(?P<n>a+)*", r"([\]]a+)+", "[]*)](b+)+",
        "[^]*)](b+)+", "(?x)(a+ )+", "(?#[)(a+)+", "(?i-x:(a+)+)", "(a?b?){9}", "(x{2})+",
    ],
)  # fmt: skip
def test_an_expression_that_repeats_what_has_choices_is_told(expression: str) -> None:
    assert repeats_a_choice(expression)


@pytest.mark.parametrize(
    "expression",
    [
        r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)", r".*\.attn1\..*", "[(a+)+]", r"\(a+\)+",
        "(a){2}", "^(?!.*norm).*attn", "(", "[",
        "(?i).*to_q", "(a+)?", "(?=a+)b", r"(transformer_blocks\.(1|2)\.)?attn1",
    ],
)  # fmt: skip
def test_an_expression_that_repeats_nothing_of_the_kind_is_let_through(expression: str) -> None:
    assert not repeats_a_choice(expression)
