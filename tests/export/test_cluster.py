"""A batch on a Dask cluster: a scheduler and two workers in processes of their own."""

import multiprocessing
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

import cogtools
from cogtools.conversion.options import ExportOptions
from cogtools.errors import KilledError, OptionError
from cogtools.export.batch import BatchItem, export_many, plan_batch
from cogtools.export.cluster import dask_executor
from tests.support.command_line import CommandLine
from tests.support.factories import TOY_2B
from tests.support.models import save_model_run
from tests.support.servers import Cluster, dask_cluster

FILE = "pytorch_lora_weights.safetensors"

pytestmark = [
    pytest.mark.slow,
    # What distributed and tornado leave behind when a connection ends.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    pytest.importorskip("distributed")
    with dask_cluster(tmp_path / "cluster") as running:
        yield running


@pytest.fixture
def runs(run_folder: Path, tmp_path: Path) -> list[str]:
    """Fifty save folders that are one."""
    return [str(shutil.copytree(run_folder, tmp_path / "runs" / f"lora-{number:02}")) for number in range(50)]


def test_a_worker_that_is_killed_costs_a_retry(cluster: Cluster, runs: list[str], tmp_path: Path) -> None:
    expected = cogtools.export_lora(runs[0], tmp_path / "expected").output.read_bytes()
    jobs = plan_batch(runs, tmp_path / "out", ExportOptions())
    items: list[BatchItem] = []
    with dask_executor(cluster.address) as executor:
        for item in export_many(jobs, ExportOptions(), executor):
            items.append(item)
            if len(items) == 10:
                cluster.workers[0].kill()
        assert [item.error for item in items if item.error is not None] == []
        assert len(items) == 50
        # A job that had ended when its worker died is done again, and finds its output.
        assert {item.status for item in items} <= {"done", "skipped"}
        outputs = sorted((tmp_path / "out").rglob("*"))
        assert [path for path in outputs if path.is_file()] == [
            tmp_path / "out" / f"lora-{number:02}-1000" / FILE for number in range(50)
        ]
        assert {path.read_bytes() for path in outputs if path.is_file()} == {expected}
        again = list(export_many(jobs, ExportOptions(), executor))
    assert {(item.status, item.reason) for item in again} == {("skipped", "exists already and verifies")}


class Deadly(str):
    """A text that ends the worker that it arrives in."""

    __slots__ = ()

    def __reduce__(self) -> tuple[object, ...]:
        return end_worker, ()


def end_worker() -> Deadly:
    """Neither the scheduler nor this process is one that `multiprocessing` has started, as a nanny starts workers."""
    if multiprocessing.parent_process() is not None:
        os._exit(1)
    return Deadly("deadly")


def test_a_job_that_no_worker_lives_through_fails_by_itself(runs: list[str], tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    jobs = plan_batch(runs[:8], tmp_path / "out", ExportOptions())
    jobs[3] = jobs[3]._replace(given=Deadly("deadly"))
    with dask_cluster(tmp_path / "cluster", nanny=True) as cluster, dask_executor(cluster.address) as executor:
        items = {item.checkpoint: item for item in export_many(jobs, ExportOptions(), executor)}
    failed = items.pop("deadly")
    assert failed.status == "failed"
    assert isinstance(failed.error, KilledError)
    assert failed.error.what == "the worker that exported it did not return a result"
    assert "KilledWorker" in str(failed.error.found)
    assert len(items) == 7
    assert {item.status for item in items.values()} <= {"done", "skipped"}


def test_a_job_that_fails_fails_alone(cluster: Cluster, runs: list[str], tmp_path: Path) -> None:
    broken = Path(runs[1], "1000", "mp_rank_00_model_states.pt")
    broken.write_bytes(b"PK\x03\x04" + bytes(100))
    jobs = plan_batch(runs[:3], tmp_path / "out", ExportOptions())
    with dask_executor(cluster.address) as executor:
        items = {item.checkpoint: item for item in export_many(jobs, ExportOptions(), executor)}
    assert [items[job.given].status for job in jobs] == ["done", "failed", "done"]
    error = items[jobs[1].given].error
    assert error is not None
    assert not isinstance(error, KilledError)
    assert error.file == str(broken)


def test_whoever_stops_the_batch_cancels_the_rest(cluster: Cluster, runs: list[str], tmp_path: Path) -> None:
    jobs = plan_batch(runs, tmp_path / "out", ExportOptions())
    with (
        dask_executor(cluster.address) as executor,
        closing(export_many(jobs, ExportOptions(), executor)) as items,
    ):
        assert next(items).status == "done"
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) < 50
    assert {path.name for path in written if not path.name.endswith(".cogtools-tmp")} == {FILE}


def test_the_command_line_takes_the_schedulers_address(
    cluster: Cluster, runs: list[str], tmp_path: Path, cogtools_cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"runs/{Path(run).name}" for run in runs[:4]]
    result = cogtools_cli("export-lora", *names, "out", "--dask", cluster.address)
    assert (result.code, "4 done, 0 skipped, 0 failed" in result.out) == (0, True)
    assert len(list((tmp_path / "out").rglob(FILE))) == 4


def test_whole_models_are_exported_on_a_cluster_too(
    cluster: Cluster, tmp_path: Path, cogtools_cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("cat", "dog")):
        save_model_run(tmp_path / "runs" / name, TOY_2B, seed=seed)
    words = ["export-model", "runs/cat", "runs/dog", "models", "--dask", cluster.address]
    first = cogtools_cli(*words)
    assert (first.code, first.out.splitlines()[-1]) == (0, "2 done, 0 skipped, 0 failed")
    assert cogtools.verify_model("models/dog-1000", against="runs/dog").verdict == "pass"
    assert cogtools_cli(*words).out.splitlines()[-1] == "0 done, 2 skipped, 0 failed"


def test_an_address_without_a_scheduler_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    from cogtools.export import cluster

    monkeypatch.setattr(cluster, "_CONNECT_SECONDS", "1s")
    with pytest.raises(OptionError, match="no Dask scheduler answers"), dask_executor("tcp://127.0.0.1:1"):
        pass
