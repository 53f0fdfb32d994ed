"""`verify --against SAVE_FOLDER` holds a file against the weights that the file's record names."""

import shutil
from pathlib import Path

import pytest
import torch

from cogtools import VerifyReport, export_lora, verify_lora
from tests.support.factories import TOY_2B, sat_checkpoint, sat_state_dict, save_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A save folder with the iterations 1000 and 2000, the latest, each with EMA weights; all different."""
    folder = tmp_path / "run"
    for place, (iteration, ema) in enumerate([(1000, False), (1000, True), (2000, False), (2000, True)]):
        checkpoint = sat_checkpoint(sat_state_dict(TOY_2B, 4, seed=place), iteration=iteration)
        if not place:
            save_run(folder, checkpoint, rank=4, alpha=1)
            continue
        inside = folder / f"{iteration}{'-ema' if ema else ''}"
        inside.mkdir()
        torch.save(checkpoint, inside / "mp_rank_00_model_states.pt")
    (folder / "latest").write_text("2000")
    return folder


def differences(report: VerifyReport) -> set[str]:
    return {check.name for check in report.checks if check.status == "fail"}


@pytest.mark.parametrize(("iteration", "ema"), [(1000, False), (1000, True), (2000, False), (2000, True)])
def test_the_recorded_weights_are_taken_and_it_is_said(iteration: int, ema: bool, run: Path, tmp_path: Path) -> None:
    export_lora(run, tmp_path / "out", iteration=iteration, ema=ema)

    report = verify_lora(tmp_path / "out", against=run)

    assert (differences(report), report.against) == (
        set(), run / f"{iteration}{'-ema' if ema else ''}" / "mp_rank_00_model_states.pt"
    )  # fmt: skip
    kind = "EMA" if ema else "plain"
    assert report.notices == (
        f"Held against the {kind} weights of iteration {iteration}, which the file's record names.",
    )


def test_what_the_user_asks_for_counts_more_than_the_record(run: Path, tmp_path: Path) -> None:
    export_lora(run, tmp_path / "out", iteration=1000)

    assert differences(verify_lora(tmp_path / "out", against=run, iteration=2000)) == {"against"}
    assert differences(verify_lora(tmp_path / "out", against=run, ema=True)) == {"against"}
    assert differences(verify_lora(tmp_path / "out", against=run / "2000")) == {"against"}
    assert differences(verify_lora(tmp_path / "out", against=run / "1000")) == set()


def test_weights_that_are_gone_are_a_difference_that_is_explained(run: Path, tmp_path: Path) -> None:
    export_lora(run, tmp_path / "out", iteration=1000)
    shutil.rmtree(run / "1000")

    report = verify_lora(tmp_path / "out", against=run)

    (against,) = [check for check in report.checks if check.name == "against"]
    assert against.status == "fail"
    assert str(against.hint).startswith("the file's record says iteration 1000, and this is iteration 2000")


def test_a_file_is_made_again_of_the_weights_that_it_was_made_of(run: Path, tmp_path: Path) -> None:
    export_lora(run, tmp_path / "out", iteration=1000, ema=True)
    file = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)

    (against,) = [check for check in verify_lora(file, against=run).checks if check.name == "against"]

    assert str(against.hint) == f"cogtools export-lora {run} --iteration 1000 --ema {file} --overwrite"


@pytest.mark.parametrize("given", [{"alpha": 2.0}, {"scaling": 0.5}], ids=["alpha", "scaling"])
def test_a_scale_given_by_hand_does_without_a_configuration_that_cannot_be_read(
    given: dict[str, float], run: Path, tmp_path: Path
) -> None:
    (run / "training_config.yaml").write_text("a: [")
    export_lora(run, tmp_path / "out", alpha=given.get("alpha"), scaling=given.get("scaling"))

    assert differences(verify_lora(tmp_path / "out", against=run)) == set()


def test_what_was_cut_to_a_lower_rank_is_held_against_the_checkpoint_at_once_too(run: Path, tmp_path: Path) -> None:
    report = export_lora(run, tmp_path / "out", rank=2, verify=True).verification

    assert report is not None
    assert (differences(report), report.against) == (set(), run / "2000/mp_rank_00_model_states.pt")
    assert "against" in {check.name for check in report.checks}
