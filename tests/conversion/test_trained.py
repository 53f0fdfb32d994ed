"""What was trained besides the LoRA: the export, inspect and verify --against all say it."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from cogtools import export_lora, inspect_checkpoint, verify_lora
from tests.support.factories import TOY_2B, sat_checkpoint, sat_state_dict, save_run

PREFIX = "model.diffusion_model."
OTHERS = [
    *(f"{PREFIX}transformer.layers.{layer}.mlp.dense_h_to_4h.weight" for layer in range(3)),
    f"{PREFIX}mixins.patch_embed.proj.weight",
]


def trained(*others: str) -> list[OrderedDict[str, tuple[int, ...]]]:
    """DeepSpeed's list of what was trained: the LoRA, and more."""
    lora = [key for key in sat_state_dict(TOY_2B, 4) if "matrix_" in key]
    return [OrderedDict((key, (1,)) for key in [*lora, *others])]


def said(run: Path, folder: Path) -> list[list[str]]:
    """What each command says of it."""
    exported = export_lora(run, folder).notices
    lora = inspect_checkpoint(run).lora
    assert lora is not None
    every = exported, lora.export.notices, verify_lora(folder, against=run).notices
    return [[notice for notice in notices if "trained too" in notice] for notices in every]


ALONE = "not in the LoRA, which alone does not give what was trained"
LAYER = "transformer.layers.{}.mlp.dense_h_to_4h.weight"


@pytest.mark.parametrize(
    ("others", "text"),
    [
        (OTHERS, f"4 other tensors were trained too and are {ALONE}: "
                 f"'{PREFIX}{LAYER.format('0-2')}', '{PREFIX}mixins.patch_embed.proj.weight'."),
        (OTHERS[:1], f"1 other tensor was trained too and is {ALONE}: '{PREFIX}{LAYER.format(0)}'."),
    ],
)  # fmt: skip
def test_what_was_trained_besides_the_lora_is_said_by_all_commands(
    others: list[str], text: str, tmp_path: Path
) -> None:
    values: dict[str, Any] = {"param_shapes": trained(*others), "frozen_param_shapes": OrderedDict()}
    checkpoint = sat_checkpoint(sat_state_dict(TOY_2B, 4)) | values
    run = save_run(tmp_path / "run", checkpoint, rank=4, alpha=1)

    assert said(run, tmp_path / "out") == [[text]] * 3


@pytest.mark.parametrize(
    "values",
    [
        {"param_shapes": trained(), "frozen_param_shapes": OrderedDict()},
        {"param_shapes": trained(*OTHERS), "frozen_param_shapes": None},  # ZeRO 0 lists everything
        {"param_shapes": [None, {1: 2}], "frozen_param_shapes": {}},
        {"param_shapes": "x", "frozen_param_shapes": "y"},
    ],
    ids=["lora-only", "not-listed", "odd", "text"],
)
def test_nothing_is_said_where_the_file_does_not_tell(values: dict[str, Any], tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", sat_checkpoint(sat_state_dict(TOY_2B, 4)) | values, rank=4, alpha=1)

    assert said(run, tmp_path / "out") == [[], [], []]


def test_real_trainings_of_a_lora_trained_nothing_else(real_run: Path, tmp_path: Path) -> None:
    assert said(real_run, tmp_path / "out") == [[], [], []]
