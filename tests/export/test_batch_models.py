"""Whole models of many checkpoints at once: what is exported, skipped, put right and refused."""

import json
import shutil
from pathlib import Path

import pytest

import cogtools
from cogtools.conversion.options import ModelOptions
from cogtools.errors import OutputError
from cogtools.export.batch import BatchItem, export_many, plan_batch
from tests.support.command_line import CommandLine
from tests.support.factories import TOY_2B
from tests.support.models import save_model_run


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trainings of a toy 2B, and what an export of each alone writes."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("cat", "dog")):
        run = save_model_run(folder / "runs" / name, TOY_2B, seed=seed)
        cogtools.export_model(run, folder / "alone" / f"{name}-1000")
    return folder


@pytest.fixture
def runs(made: Path) -> list[str]:
    return [str(made / "runs" / name) for name in ("cat", "dog")]


def export(runs: list[str], out: Path, options: ModelOptions | None = None) -> list[BatchItem]:
    """All of them, one after the other in this process."""
    options = options or ModelOptions()
    return [item for run in runs for item in export_many(plan_batch([run], out, options), options)]


def test_each_gets_a_folder_that_is_what_it_gives_alone(
    made: Path, runs: list[str], tmp_path: Path, cogtools_cli: CommandLine
) -> None:
    result = cogtools_cli("export-model", *runs, tmp_path)

    assert result.code == 0, result.err
    assert result.out.splitlines()[-1] == "2 done, 0 skipped, 0 failed"
    assert files_in(tmp_path) == files_in(made / "alone")


def test_as_json_it_is_one_object_with_a_report_of_each(
    runs: list[str], tmp_path: Path, cogtools_cli: CommandLine
) -> None:
    result = cogtools_cli("export-model", *runs, str(tmp_path / "nothing"), tmp_path / "out", "--json")

    report = result.json["report"]
    assert (result.code, result.json["status"]) == (2, "error")
    assert [item["status"] for item in report["exports"]].count("done") == 2
    (failed,) = [item for item in report["exports"] if item["status"] == "failed"]
    assert failed["error"]["what"] == "there is no such file"


def test_a_dry_run_of_many_writes_nothing(runs: list[str], tmp_path: Path, cogtools_cli: CommandLine) -> None:
    result = cogtools_cli("export-model", *runs, tmp_path / "out", "--dry-run")

    assert result.out.splitlines()[-1] == "2 would be written, 0 skipped, 0 failed"
    assert not (tmp_path / "out").exists()


def test_what_is_there_and_verifies_is_skipped(made: Path, runs: list[str], tmp_path: Path) -> None:
    shutil.copytree(made / "alone", tmp_path / "out")
    before = files_in(tmp_path / "out")

    items = export(runs, tmp_path / "out")

    assert [(item.status, item.reason) for item in items] == [("skipped", "exists already and verifies")] * 2
    assert files_in(tmp_path / "out") == before


def test_what_a_run_that_was_ended_between_two_parts_left_is_completed(
    made: Path, runs: list[str], tmp_path: Path
) -> None:
    shutil.copytree(made / "alone", tmp_path / "out")
    shutil.rmtree(tmp_path / "out/cat-1000/text_encoder")
    shutil.rmtree(tmp_path / "out/dog-1000/scheduler")

    assert [item.status for item in export(runs, tmp_path / "out")] == ["done", "done"]
    assert files_in(tmp_path / "out") == files_in(made / "alone")


def test_what_is_there_of_another_checkpoint_is_not_replaced_unasked(
    made: Path, runs: list[str], tmp_path: Path
) -> None:
    shutil.copytree(made / "alone" / "dog-1000", tmp_path / "out/cat-1000")
    before = files_in(tmp_path / "out")

    (item,) = export(runs[:1], tmp_path / "out")

    assert (item.status, type(item.error)) == ("failed", OutputError)
    assert item.error is not None
    assert item.error.what == "the output exists already and does not verify"
    assert files_in(tmp_path / "out") == before
    (item,) = export(runs[:1], tmp_path / "out", ModelOptions(overwrite=True))
    assert item.status == "done"
    assert files_in(tmp_path / "out/cat-1000") == files_in(made / "alone/cat-1000")


def test_what_cogtools_did_not_write_is_never_replaced(made: Path, runs: list[str], tmp_path: Path) -> None:
    shutil.copytree(made / "alone" / "cat-1000", tmp_path / "out/cat-1000")
    (tmp_path / "out/cat-1000/transformer/cogtools.json").unlink()
    before = files_in(tmp_path / "out")

    for options in (ModelOptions(), ModelOptions(overwrite=True)):
        (item,) = export(runs[:1], tmp_path / "out", options)
        assert item.status == "failed"
        assert files_in(tmp_path / "out") == before


def test_models_of_diffusers_are_written_for_sat_side_by_side(
    made: Path, tmp_path: Path, cogtools_cli: CommandLine
) -> None:
    names = [made / "alone" / name for name in ("cat-1000", "dog-1000")]
    words = ["export-model", *names, tmp_path / "sat", "--format", "sat", "--model", "2b"]

    result = cogtools_cli(*words)

    assert result.code == 0, result.err
    assert sorted(path.name for path in (tmp_path / "sat").iterdir()) == ["cat-1000", "dog-1000"]
    manifest = json.loads((tmp_path / "sat/cat-1000/cogtools.json").read_text())
    assert set(manifest["files"]) == {"latest", "1/mp_rank_00_model_states.pt", "training_config.yaml"}
    assert cogtools_cli(*words).out.splitlines()[-1] == "0 done, 2 skipped, 0 failed"


def test_positions_that_go_with_other_sizes_are_no_reason_to_write_a_model_again(tmp_path: Path) -> None:
    run = save_model_run(tmp_path / "run", TOY_2B, config=False)
    items = [*export([str(run)], tmp_path / "out"), *export([str(run)], tmp_path / "out")]
    report = cogtools.verify_model(tmp_path / "out" / "run-1000", against=run)
    assert [check.name for check in report.checks if check.status == "fail"] == ["transformer positions"]
    assert [item.status for item in items] == ["done", "skipped"]


def test_a_single_model_goes_into_the_folder_itself(
    made: Path, runs: list[str], tmp_path: Path, cogtools_cli: CommandLine
) -> None:
    assert cogtools_cli("export-model", runs[0], f"{tmp_path}/out/").code == 0
    assert files_in(tmp_path / "out") == files_in(made / "alone" / "cat-1000")
