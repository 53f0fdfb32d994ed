"""What the plain export notes of the first values of tensors, without NumPy and torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cogtools import export_lora
from cogtools.checkpoint.dtypes import FLOAT_FORMATS
from cogtools.conversion.first_values import FIRST_BYTES, First
from tests.support.factories import TOY_2B, sat_checkpoint, sat_state_dict, save_run

DTYPES = {name: getattr(torch, name) for name in FLOAT_FORMATS}


def first(values: torch.Tensor) -> First:
    data = values.view(torch.uint8).numpy().tobytes()
    return First("A", data, values.element_size(), FLOAT_FORMATS[str(values.dtype).removeprefix("torch.")])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_found(dtype: torch.dtype, value: float) -> None:
    values = torch.full((9,), torch.finfo(dtype).max, dtype=dtype)
    assert first(values).is_finite
    values[5] = value
    assert not first(values).is_finite


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_every_number_of_two_bytes_is_judged_as_torch_does(name: str) -> None:
    numbers = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.int16)).view(DTYPES[name])

    found = [first(number.reshape(1)) for number in numbers]

    assert [one.is_finite for one in found] == numbers.isfinite().tolist()
    assert [one.is_zero for one in found] == (numbers == 0).tolist()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_zeros_of_either_sign_are_zero_and_the_smallest_number_is_not(dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0] * 4, dtype=dtype)
    assert first(values).is_zero
    values[3] = torch.finfo(dtype).smallest_normal
    assert not first(values).is_zero


@pytest.mark.parametrize(
    ("values", "is_constant"), [([0.5] * 8, True), ([0.5] * 7 + [0.25], False), ([0.5], False), ([-2.0, -2.0], True)]
)
def test_one_value_repeated_is_constant(values: list[float], is_constant: bool) -> None:
    assert first(torch.tensor(values)).is_constant is is_constant


def fill(value: float) -> Callable[[torch.Tensor], object]:
    return lambda tensor: tensor.fill_(value)


NAN, ZERO, ONE = fill(float("nan")), fill(0.0), fill(1.0)
DIVERGED = "begin with NaN or infinity: the training diverged. An earlier iteration may be usable."


@pytest.mark.parametrize(
    ("spoil", "part", "notices"),
    [
        (NAN, "dense.matrix_B", [f"3 of 24 tensors {DIVERGED}"]),
        (NAN, "matrix_", [f"All 24 tensors {DIVERGED}"]),
        (ZERO, "matrix_B", ["All 12 lora_B begin with zeros: if the rest is zero too, this LoRA does nothing, as "
                            "before training."]),
        (ZERO, "layers.1.attention.dense.matrix_B", ["1 of 12 lora_B begin with zeros: if the rest is zero too, their "
                                                     "modules do nothing."]),
        (ONE, "layers.1.attention.dense.matrix_A", ["1 of 12 lora_A begin with one value repeated: they look "
                                                    "untrained."]),
        (ONE, "nothing", []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_export_notes_what_it_saw_by_number_of_tensors(
    spoil: Any, part: str, notices: list[str], dtype: str, tmp_path: Path
) -> None:
    state_dict = sat_state_dict(TOY_2B, 4, DTYPES[dtype])
    for key, tensor in state_dict.items():
        if "matrix_" in key and part in key:
            spoil(tensor)
    run = save_run(tmp_path / "run", sat_checkpoint(state_dict), rank=4, alpha=1)

    report = export_lora(run, tmp_path / "out")

    assert [notice for notice in report.notices if "begin with" in notice] == notices


def test_what_lies_behind_the_first_values_is_for_verify(tmp_path: Path) -> None:
    state_dict = sat_state_dict(TOY_2B, 16, torch.float32)
    key = next(key for key in state_dict if "matrix_A" in key)
    state_dict[key].flatten()[FIRST_BYTES // 4] = float("nan")
    run = save_run(tmp_path / "run", sat_checkpoint(state_dict), rank=16, alpha=1)

    report = export_lora(run, tmp_path / "out", verify=True)

    assert not any("begin with" in notice for notice in report.notices)
    assert report.verification is not None
    assert {check.name: check.status for check in report.verification.checks if check.status != "pass"} == {
        "finite": "fail"
    }
