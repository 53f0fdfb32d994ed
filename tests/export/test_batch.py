"""Many checkpoints at once: each into a folder of its own, whatever becomes of the others."""

import hashlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cogtools.checkpoint.index import Checkpoint
from cogtools.conversion.options import ExportOptions
from cogtools.errors import OptionError
from cogtools.export.batch import BatchItem, batch_report, export_many, plan_batch
from cogtools.export.export import ExportReport, export_checkpoint
from cogtools.export.workers import WorkerPool
from cogtools.layouts.diffusers import FILE_NAME
from tests.support.command_line import CommandLine, Result, surroundings
from tests.support.factories import TOY_2B, sat_checkpoint, sat_state_dict, save_run


def run(folder: Path, *, seed: int = 0, iteration: int = 1000, ema: bool = False) -> Path:
    checkpoint = sat_checkpoint(sat_state_dict(TOY_2B, 4, base="none", seed=seed))
    save_run(folder, checkpoint, rank=4, iteration=iteration, ema=checkpoint if ema else None)
    return folder


def written(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def exports(result: Result) -> list[Any]:
    """What --json says of each checkpoint, in the order of the checkpoints: they end in any order."""
    return sorted(result.json["report"]["exports"], key=lambda item: str(item["checkpoint"]))


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [run(tmp_path / "ckpts" / name, seed=seed) for seed, name in enumerate(("cat", "dog", "eel"))]


def test_each_gets_a_folder_of_its_own(cogtools_cli: CommandLine, runs: list[Path], tmp_path: Path) -> None:
    result = cogtools_cli("export-lora", *runs, tmp_path / "out")
    assert result.code == 0
    assert written(tmp_path / "out") == [f"{name}-1000/{FILE_NAME}" for name in ("cat", "dog", "eel")]
    lines = result.out.splitlines()
    assert sorted(lines[:3]) == [
        f"done     {tmp_path / 'out' / f'{name}-1000' / FILE_NAME}: 24 tensors, float16, 28.6 kB, scaling 1/4"
        for name in ("cat", "dog", "eel")
    ]
    assert lines[3:] == ["3 done, 0 skipped, 0 failed"]
    key = "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"
    values = [load_file(tmp_path / "out" / f"{name}-1000" / FILE_NAME)[key] for name in ("cat", "dog", "eel")]
    assert not torch.equal(values[0], values[1])
    assert not torch.equal(values[1], values[2])


@pytest.mark.parametrize(("processors", "pools"), [(1, []), (2, [2]), (8, [3])])
def test_as_many_are_exported_side_by_side_as_there_are_processors(
    cogtools_cli: CommandLine,
    runs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    processors: int,
    pools: list[int],
) -> None:
    made = []

    def pool(processes: int) -> WorkerPool:
        made.append(processes)
        return WorkerPool(processes)

    monkeypatch.setattr("cogtools.export.workers.WorkerPool", pool)
    monkeypatch.setattr("os.cpu_count", lambda: processors)
    result = cogtools_cli("export-lora", *runs, tmp_path / "out")
    assert (result.code, written(tmp_path / "out")) == (0, [f"{run.name}-1000/{FILE_NAME}" for run in runs])
    assert made == pools


def test_one_that_fails_does_not_stop_the_others(cogtools_cli: CommandLine, runs: list[Path], tmp_path: Path) -> None:
    broken = runs[1] / "1000" / "mp_rank_00_model_states.pt"
    broken.write_bytes(broken.read_bytes()[:1000])
    result = cogtools_cli("export-lora", *runs, tmp_path / "nothing", tmp_path / "out")
    assert result.code == 2
    assert written(tmp_path / "out") == [f"{name}-1000/{FILE_NAME}" for name in ("cat", "eel")]
    assert result.out.splitlines()[-1] == "2 done, 0 skipped, 2 failed"
    failures = [line for line in result.err.splitlines() if line.startswith(("failed ", "         try: "))]
    assert sorted(failures) == [
        "         try: copy or download it again; a checkpoint that is still being written looks like this too",
        f"failed   {broken}: the file is cut short: this zip archive has no directory at its end (found: 1,000 bytes)",
        f"failed   {tmp_path / 'nothing'}: there is no such file",
    ]


def test_a_failure_names_the_first_problem_and_what_helps(
    cogtools_cli: CommandLine, runs: list[Path], tmp_path: Path
) -> None:
    state = sat_state_dict(TOY_2B, 4, base="none")
    del state["model.diffusion_model.transformer.layers.0.attention.dense.matrix_B.0"]
    del state["model.diffusion_model.transformer.layers.2.attention.dense.matrix_B.0"]
    del state["model.diffusion_model.transformer.layers.2.attention.dense.matrix_A.0"]
    torch.save(dict(state), tmp_path / "odd.pt")
    result = cogtools_cli("export-lora", *runs[:1], tmp_path / "odd.pt", tmp_path / "out")
    assert result.code == 2
    assert result.err.startswith(
        f"failed   {tmp_path / 'odd.pt'}: the LoRA in this checkpoint cannot be exported as it is "
        "(missing: layer 0: to_out.0 lora_B and 1 more)\n"
        f"         try: cogtools inspect {tmp_path / 'odd.pt'} --lora\n"
    )


def test_what_is_there_and_verifies_is_skipped(cogtools_cli: CommandLine, runs: list[Path], tmp_path: Path) -> None:
    cogtools_cli("export-lora", *runs[:2], tmp_path / "out")
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in written(tmp_path / "out")}
    result = cogtools_cli("export-lora", *runs, tmp_path / "out")
    assert (result.code, result.out.splitlines()[-1]) == (0, "1 done, 2 skipped, 0 failed")
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in before.items())


@pytest.mark.parametrize("damage", ["cut", "bit", "other-options"])
def test_what_is_there_and_is_not_right_is_told_and_kept(
    cogtools_cli: CommandLine, runs: list[Path], tmp_path: Path, damage: str
) -> None:
    cogtools_cli("export-lora", *runs, tmp_path / "out")
    target = tmp_path / "out" / "dog-1000" / FILE_NAME
    content = bytearray(target.read_bytes())
    if damage == "cut":
        del content[-10:]
    elif damage == "bit":
        content[-10] ^= 1
    target.write_bytes(content)
    options = ["--alpha", "8"] if damage == "other-options" else []
    result = cogtools_cli("export-lora", *runs, tmp_path / "out", *options)
    failed = 3 if options else 1
    assert (result.code, result.out.splitlines()[-1]) == (2, f"0 done, {3 - failed} skipped, {failed} failed")
    what = {"cut": "does not verify", "bit": "does not verify", "other-options": "was made with other options"}
    errors = [line for line in result.err.splitlines() if line.startswith("failed ")]
    assert len(errors) == failed
    assert all(f"the output exists already and {what[damage]} (found: " in error for error in errors)
    assert result.err.count("         try: replace it with --overwrite") == failed
    assert target.read_bytes() == content
    again = cogtools_cli("export-lora", *runs, tmp_path / "out", *options, "--overwrite")
    assert (again.code, again.out.splitlines()[-1]) == (0, "3 done, 0 skipped, 0 failed")


@pytest.mark.parametrize(
    "options", [["--scale", "none"], ["--scale", "fold"], ["--dtype", "fp32"], ["--alpha", "8"]], ids=" ".join
)
def test_what_was_made_with_options_is_skipped_with_them(
    cogtools_cli: CommandLine, runs: list[Path], tmp_path: Path, options: list[str]
) -> None:
    for expected in ("3 done, 0 skipped, 0 failed", "0 done, 3 skipped, 0 failed"):
        assert cogtools_cli("export-lora", *runs, tmp_path / "out", *options).out.splitlines()[-1] == expected
    assert cogtools_cli("export-lora", *runs, tmp_path / "out").out.splitlines()[-1] == "0 done, 0 skipped, 3 failed"


def test_what_another_release_made_of_a_file_of_another_name_is_skipped(
    cogtools_cli: CommandLine, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("cogtools.export.export.__version__", "0.0.1")
        cogtools_cli("export-lora", *runs, tmp_path / "out")
    for folder in runs:
        path = folder / "1000" / "mp_rank_00_model_states.pt"
        path.rename(path.with_name("pytorch_model.bin"))
    result = cogtools_cli("export-lora", *runs, tmp_path / "out")
    assert (result.code, result.out.splitlines()[-1]) == (0, "0 done, 3 skipped, 0 failed")


def test_a_checkpoint_is_planned_once_to_see_that_nothing_is_to_do(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ExportOptions()
    jobs = plan_batch([str(runs[0])], tmp_path / "out", ExportOptions())
    assert [item.status for item in export_many(jobs, options)] == ["done"]
    opened: list[object] = []

    def enter(self: Checkpoint) -> Checkpoint:
        opened.append(self.path)
        return self

    monkeypatch.setattr(Checkpoint, "__enter__", enter)
    assert [item.status for item in export_many(jobs, options)] == ["skipped"]
    assert opened.count(runs[0] / "1000" / "mp_rank_00_model_states.pt") == 1


def test_two_for_one_place_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    sources = [str(run(tmp_path / name / "lora")) for name in "ab"]
    with pytest.raises(OptionError) as caught:
        plan_batch(sources, tmp_path / "out", ExportOptions())
    assert caught.value.what == "two checkpoints would be written to one place"
    assert caught.value.file == str(tmp_path / "out" / "lora-1000" / FILE_NAME)
    assert caught.value.found == " and ".join(f"{source}/1000/mp_rank_00_model_states.pt" for source in sources)


@pytest.mark.parametrize(("one", "other"), [("Run", "run"), ("caf\u00e9", "CAFE\u0301")])
def test_two_outputs_whose_names_differ_by_case_only_are_refused(tmp_path: Path, one: str, other: str) -> None:
    sources = [str(run(tmp_path / folder / name)) for folder, name in (("a", one), ("b", other))]
    with pytest.raises(OptionError) as caught:
        plan_batch(sources, tmp_path / "out", ExportOptions())
    assert caught.value.what == "two outputs have names that are the same on file systems that ignore case"
    assert caught.value.file == str(tmp_path / "out" / f"{other}-1000" / FILE_NAME)
    assert caught.value.found == " and ".join(f"{source}/1000/mp_rank_00_model_states.pt" for source in sources)


@pytest.mark.parametrize("there", [["Run-1000"], ["run-1000"], ["Run-1000", "run-1000"]])
def test_two_output_folders_of_which_one_is_there_may_differ_by_case_only(tmp_path: Path, there: list[str]) -> None:
    sources = [str(run(tmp_path / folder / name)) for folder, name in (("a", "Run"), ("b", "run"))]
    for name in there:
        (tmp_path / "out" / name).mkdir(parents=True)
    if (tmp_path / "out" / "RUN-1000").exists():
        pytest.skip("this file system ignores case")
    jobs = plan_batch(sources, tmp_path / "out", ExportOptions())
    assert [job.output for job in jobs] == [tmp_path / "out" / f"{name}-1000" / FILE_NAME for name in ("Run", "run")]


def test_two_output_folders_that_are_one_by_a_link_are_refused(tmp_path: Path, runs: list[Path]) -> None:
    (tmp_path / "out" / "cat-1000").mkdir(parents=True)
    (tmp_path / "out" / "dog-1000").symlink_to("cat-1000")
    with pytest.raises(OptionError, match="two checkpoints would be written to one place"):
        plan_batch([str(runs[0]), str(runs[1])], tmp_path / "out", ExportOptions())


def test_one_that_is_given_twice_is_exported_once(cogtools_cli: CommandLine, runs: list[Path], tmp_path: Path) -> None:
    again = tmp_path / "out" / ".." / "ckpts" / "cat"
    (tmp_path / "out").mkdir()
    result = cogtools_cli("export-lora", runs[0], runs[0] / "1000", again, tmp_path / "out")
    assert (result.code, result.out.splitlines()[-1]) == (0, "1 done, 0 skipped, 0 failed")


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["a/pytorch_model.bin", "b/pytorch_model.bin"], ["a", "b"]),
        (["a/mp_rank_00_model_states.pt", "b/z3_rank_00_model_states.pt"], ["a", "b"]),
        (["a/model.safetensors.index.json", "b/diffusion_pytorch_model.safetensors"], ["a", "b"]),
        (["x.safetensors.pt", "a/y.pt"], ["x.safetensors", "y"]),
        (["run/1000/../1000/mp_rank_00_model_states.pt"], ["run-1000"]),
        (["run/1000/../x.pt", "run/1000/../pytorch_model.bin"], ["x", "run"]),
    ],
)
def test_outputs_are_named_so_that_they_are_told_apart(files: list[str], names: list[str], tmp_path: Path) -> None:
    run(tmp_path / "run")
    jobs = plan_batch([str(tmp_path / file) for file in files], tmp_path / "out", ExportOptions())
    assert [job.output for job in jobs] == [tmp_path / "out" / name / FILE_NAME for name in names]


def test_a_save_folder_above_the_current_one_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run(tmp_path / "run") / "1000")
    (job,) = plan_batch([".."], tmp_path / "out", ExportOptions())
    assert job.output == tmp_path / "out" / "run-1000" / FILE_NAME
    (job,) = plan_batch(["."], tmp_path / "out", ExportOptions())
    assert job.output == tmp_path / "out" / "run-1000" / FILE_NAME


def test_a_folder_in_the_place_of_an_output_fails_that_one_only(
    cogtools_cli: CommandLine, runs: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "out" / "cat-1000" / FILE_NAME).mkdir(parents=True)
    result = cogtools_cli("export-lora", *runs, tmp_path / "out")
    assert (result.code, result.out.splitlines()[-1]) == (2, "2 done, 0 skipped, 1 failed")
    assert "the output would replace a folder" in result.err


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], ["run-20"]),
        (["--ema"], ["run-20-ema"]),
        (["--iteration", "10"], ["run-10"]),
        (["--all"], ["run-10", "run-20"]),
        (["--all", "--ema"], ["run-10-ema", "run-20-ema"]),
    ],
)
def test_the_iterations_of_a_save_folder_can_be_chosen(
    cogtools_cli: CommandLine, tmp_path: Path, options: list[str], names: list[str]
) -> None:
    for iteration in (10, 20):
        run(tmp_path / "run", iteration=iteration, ema=True)
    assert cogtools_cli("export-lora", tmp_path / "run", f"{tmp_path}/out/", *options).code == 0
    assert written(tmp_path / "out") == [f"{name}/{FILE_NAME}" for name in names]


def test_a_broken_iteration_does_not_stop_the_others(cogtools_cli: CommandLine, tmp_path: Path) -> None:
    for iteration in (10, 20):
        run(tmp_path / "run", iteration=iteration)
    (tmp_path / "run" / "15").mkdir()
    for name in "ab":
        (tmp_path / "run" / "15" / f"{name}.pt").touch()
    result = cogtools_cli("export-lora", tmp_path / "run", tmp_path / "out", "--all")
    assert (result.code, written(tmp_path / "out")) == (2, [f"run-10/{FILE_NAME}", f"run-20/{FILE_NAME}"])
    assert result.err.startswith(
        f"failed   {tmp_path / 'run' / '15'}: this folder holds several checkpoints (found: a.pt, b.pt)\n"
    )


def test_a_save_folder_is_listed_once_however_many_iterations_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for iteration in range(1, 301):
        (tmp_path / "run" / str(iteration)).mkdir(parents=True)
        (tmp_path / "run" / str(iteration) / "mp_rank_00_model_states.pt").touch()
    listed: Counter[str] = Counter()

    def counting(list_folder: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def list_and_count(folder: Any = ".") -> Any:
            listed[os.fspath(folder)] += 1
            return list_folder(folder)

        return list_and_count

    monkeypatch.setattr("os.listdir", counting(os.listdir))
    monkeypatch.setattr("os.scandir", counting(os.scandir))
    jobs = plan_batch([str(tmp_path / "run")], tmp_path / "out", ExportOptions(), every=True)
    assert [job.output for job in jobs] == [
        tmp_path / "out" / f"run-{iteration}" / FILE_NAME for iteration in range(1, 301)
    ]
    assert listed[str(tmp_path / "run")] == 1
    assert listed.total() < 5 * 300


def test_all_iterations_are_found_in_the_folder_around_a_training(cogtools_cli: CommandLine, tmp_path: Path) -> None:
    for iteration in (10, 20):
        run(tmp_path / "ckpts" / "run", iteration=iteration)
    assert cogtools_cli("export-lora", tmp_path / "ckpts", tmp_path / "out", "--all").code == 0
    assert written(tmp_path / "out") == [f"run-10/{FILE_NAME}", f"run-20/{FILE_NAME}"]


def test_all_iterations_and_one_contradict_each_other(cogtools_cli: CommandLine, runs: list[Path]) -> None:
    result = cogtools_cli("export-lora", runs[0], "out", "--all", "--iteration", "1000")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: --all takes every iteration: --iteration does not go with it\n")


def test_the_folder_for_the_outputs_is_no_source(
    cogtools_cli: CommandLine, runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs[0].parent)
    for expected in ("3 done, 1 skipped, 0 failed", "0 done, 4 skipped, 0 failed"):
        Path("out").mkdir(exist_ok=True)
        result = cogtools_cli("export-lora", "cat/", "dog/", "eel/", "out/", "out/")
        assert result.code == 0
        assert result.out.splitlines()[0] == "skipped  out/: this is the output folder"
        assert result.out.splitlines()[-1] == expected


@pytest.mark.parametrize("out", ["lora.safetensors", "a-file"])
def test_several_checkpoints_need_a_folder(
    cogtools_cli: CommandLine, runs: list[Path], out: str, tmp_path: Path
) -> None:
    (tmp_path / "a-file").touch()
    result = cogtools_cli("export-lora", *runs, tmp_path / out)
    assert (result.code, result.err) == (
        2,
        "error: the last argument is the output folder, but this is a file\n"
        f"  file:      {tmp_path / out}\n"
        "  try:       name a folder as the last argument\n",
    )


@pytest.mark.parametrize("last", ["", "1000"], ids=["save-folder", "iteration"])
def test_a_forgotten_output_is_noticed(cogtools_cli: CommandLine, runs: list[Path], last: str) -> None:
    result = cogtools_cli("export-lora", *runs[:2], runs[2] / last)
    assert (result.code, written(runs[2])) == (2, written(runs[0]))
    assert result.err == (
        "error: the last argument is the output folder, but this folder holds a training\n"
        f"  file:      {runs[2] / last}\n"
        f"  found:     {runs[2] / '1000' / 'mp_rank_00_model_states.pt'}\n"
        "  expected:  CHECKPOINT... OUT_DIR\n"
        "  try:       name the folder to write to as the last argument\n"
    )


def test_outputs_that_are_named_as_numbers_are_no_trainers(cogtools_cli: CommandLine, tmp_path: Path) -> None:
    for name in ("1000.pt", "2000.pt"):
        torch.save(sat_state_dict(TOY_2B, 4), tmp_path / name)
    for expected in ("2 done, 0 skipped, 0 failed", "0 done, 2 skipped, 0 failed"):
        result = cogtools_cli("export-lora", tmp_path / "1000.pt", tmp_path / "2000.pt", tmp_path / "out")
        assert result.out.splitlines()[-1] == expected


def test_a_single_folder_keeps_its_name_in_a_folder_with_a_slash(
    cogtools_cli: CommandLine, runs: list[Path], tmp_path: Path
) -> None:
    cogtools_cli("export-lora", runs[0], f"{tmp_path}/a/")
    cogtools_cli("export-lora", runs[0], f"{tmp_path}/b")
    cogtools_cli("export-lora", runs[0] / "1000" / "mp_rank_00_model_states.pt", f"{tmp_path}/c/")
    assert [written(tmp_path / name) for name in "abc"] == [[f"cat-1000/{FILE_NAME}"], [FILE_NAME], [FILE_NAME]]


def test_files_outside_of_a_run_are_named_after_themselves(tmp_path: Path) -> None:
    jobs = plan_batch([str(tmp_path / "fine.pt"), str(tmp_path / "tuned.pt")], tmp_path / "out", ExportOptions())
    assert [job.output for job in jobs] == [tmp_path / "out" / name / FILE_NAME for name in ("fine", "tuned")]


def test_json_is_one_object_for_all(cogtools_cli: CommandLine, runs: list[Path], tmp_path: Path) -> None:
    result = cogtools_cli("export-lora", *runs, tmp_path / "nothing", tmp_path / "out", "--json")
    assert (result.code, result.err) == (2, "")
    report = result.json["report"]
    assert (report["done"], report["skipped"], report["failed"]) == (3, 0, 1)
    assert [(item["checkpoint"], item["status"]) for item in exports(result)] == [
        *((f"{run}/1000/mp_rank_00_model_states.pt", "done") for run in runs),
        (str(tmp_path / "nothing"), "failed"),
    ]


def test_a_dry_run_writes_nothing(cogtools_cli: CommandLine, runs: list[Path], tmp_path: Path) -> None:
    result = cogtools_cli("export-lora", *runs, tmp_path / "out", "--dry-run", "--json")
    assert [(item["output"], item["report"]["tensors"], item["report"]["written"]) for item in exports(result)] == [
        (str(tmp_path / "out" / f"{name}-1000" / FILE_NAME), 24, False) for name in ("cat", "dog", "eel")
    ]
    result = cogtools_cli("export-lora", *runs, tmp_path / "out", "--dry-run")
    assert result.code == 0
    assert all(line.startswith("would write ") for line in result.out.splitlines()[:3])
    assert result.out.splitlines()[3:] == ["3 would be written, 0 skipped, 0 failed"]
    assert not (tmp_path / "out").exists()


def test_sha256_is_told_of_each(cogtools_cli: CommandLine, runs: list[Path], tmp_path: Path) -> None:
    result = cogtools_cli("export-lora", *runs, tmp_path / "out", "--sha256")
    digests = {hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() for name in written(tmp_path / "out")}
    assert {line.rpartition(", sha256 ")[2] for line in result.out.splitlines()[:3]} == digests


def test_notices_of_one_have_its_name_and_notices_of_all_are_said_once(
    cogtools_cli: CommandLine, runs: list[Path], tmp_path: Path
) -> None:
    with_ema = run(tmp_path / "ckpts" / "fox", ema=True)
    notes = cogtools_cli("export-lora", *runs, with_ema, tmp_path / "out").err.splitlines()
    assert [note for note in notes if "SAT's default" in note] == [
        "note: training_config.yaml sets no lora_alpha, so alpha is 1, SAT's default."
    ]
    assert notes[-1] == (
        f"note: {with_ema / '1000' / 'mp_rank_00_model_states.pt'}: "
        "Took the plain weights of iteration 1000. Its EMA weights are in 1000-ema beside them."
    )


# Printing


@pytest.mark.parametrize("redirection", [">/dev/full", ">&-"])
@pytest.mark.parametrize("option", ["", "--json", "--overwrite"])
def test_exports_go_on_when_nothing_can_be_printed(
    runs: list[Path], tmp_path: Path, redirection: str, option: str
) -> None:
    words = " ".join(map(str, [*runs, tmp_path / "out", option]))
    command = ["sh", "-c", f"{sys.executable} -m cogtools export-lora {words} {redirection}"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, env=surroundings())
    assert written(tmp_path / "out") == [f"{name}-1000/{FILE_NAME}" for name in ("cat", "dog", "eel")]
    errors = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert (done.returncode, len(errors)) == (2, 1)
    assert errors[0].startswith("error: the result cannot be printed: ")


def test_an_empty_argument_is_an_error(cogtools_cli: CommandLine, runs: list[Path]) -> None:
    for words in (["", "out"], [runs[0], ""], [runs[0], runs[1], ""], ["--sat_pt_path", runs[0], ""]):
        result = cogtools_cli("export-lora", *words)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith("error: an argument of export-lora is empty\n")


# Executors


def outcome(items: Iterator[BatchItem]) -> dict[str, str]:
    return {Path(item.checkpoint).parts[-3]: item.status for item in items}


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: ThreadPoolExecutor(2), id="threads"),
        pytest.param(lambda: ProcessPoolExecutor(2, multiprocessing.get_context("fork")), id="processes"),
        pytest.param(lambda: WorkerPool(2), id="workers"),
        pytest.param(lambda: None, id="default"),
    ],
)
def test_any_executor_can_carry_out_the_exports(
    make: Callable[[], Executor | None], runs: list[Path], tmp_path: Path
) -> None:
    broken = runs[1] / "1000" / "mp_rank_00_model_states.pt"
    broken.write_bytes(broken.read_bytes()[:1000])
    options = ExportOptions()
    jobs = plan_batch([*map(str, runs), str(tmp_path / "nothing")], tmp_path / "out", options)
    executor = make()
    items = {item.checkpoint: item for item in export_many(jobs, options, executor)}
    if executor is not None:
        executor.shutdown()
    assert {name: item.status for name, item in items.items()} == {
        str(runs[0] / "1000" / "mp_rank_00_model_states.pt"): "done",
        str(broken): "failed",
        str(runs[2] / "1000" / "mp_rank_00_model_states.pt"): "done",
        str(tmp_path / "nothing"): "failed",
    }
    error = items[str(broken)].error
    assert error is not None
    assert (error.kind, error.file, error.found) == ("checkpoint", str(broken), "1,000 bytes")
    assert written(tmp_path / "out") == [f"{name}-1000/{FILE_NAME}" for name in ("cat", "eel")]


def test_jobs_and_results_can_be_sent_to_other_machines(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    sources = [*map(str, runs), str(tmp_path / "empty"), str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    jobs = plan_batch(sources, tmp_path / "out", ExportOptions())
    copies = pickle.loads(pickle.dumps(jobs))
    assert [repr(copy) for copy in copies] == [repr(job) for job in jobs]
    items = list(export_many(copies, ExportOptions()))
    assert Counter(item.status for item in items) == {"done": 3, "failed": 1, "skipped": 1}
    assert [repr(copy) for copy in pickle.loads(pickle.dumps(items))] == [repr(item) for item in items]


def test_a_worker_that_an_executor_loses_fails_its_job_with_a_clear_error(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(checkpoint: Path, *words: Any, **options: Any) -> ExportReport:
        os.kill(os.getpid(), signal.SIGKILL)
        return export_checkpoint(checkpoint, *words, **options)

    monkeypatch.setattr("cogtools.export.batch_lora.export_checkpoint", export)
    jobs = plan_batch([*map(str, runs)], tmp_path / "out", ExportOptions())
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as executor:
        items = list(export_many(jobs, ExportOptions(), executor))
    assert [item.status for item in items] == ["failed"] * 3
    for item in items:
        assert item.error is not None
        assert item.error.to_dict() == {
            "kind": "killed",
            "what": "the worker that exported it did not return a result",
            "file": item.checkpoint,
            "found": "BrokenProcessPool: A process in the process pool was terminated abruptly while the future was "
            "running or pending.",
            "expected": None,
            "hint": {
                "advice": "run the same command again: outputs that exist and verify are skipped",
                "command": None,
            },
            "problems": [],
        }


class Slow(Executor):
    """Carries out the first job when that is submitted, and none of the others; takes a limited number."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.futures: list[Future[Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        if len(self.futures) == self.most:
            raise RuntimeError("cannot schedule new futures")
        future: Future[Any] = Future()
        self.futures.append(future)
        if len(self.futures) == 1:
            future.set_result(fn(*args, **kwargs))
        return future


def test_ending_the_iteration_cancels_what_has_not_begun(runs: list[Path], tmp_path: Path) -> None:
    executor = Slow(most=3)
    items = export_many(plan_batch([*map(str, runs)], tmp_path / "out", ExportOptions()), ExportOptions(), executor)
    assert next(items).status == "done"
    items.close()
    assert [future.cancelled() for future in executor.futures] == [False, True, True]


def test_an_executor_that_takes_no_more_jobs_fails_the_rest(runs: list[Path], tmp_path: Path) -> None:
    jobs = plan_batch([*map(str, runs)], tmp_path / "out", ExportOptions())
    items = list(export_many(jobs, ExportOptions(), Slow(most=1)))
    assert Counter(item.status for item in items) == {"done": 1, "failed": 2}
    found = {item.error.found for item in items if item.error is not None}
    assert found == {"RuntimeError: cannot schedule new futures"}


def test_where_no_process_can_be_started_the_exports_run_in_this_one(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("os.fork", refuse)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    jobs = plan_batch([*map(str, runs)], tmp_path / "out", ExportOptions())
    assert outcome(export_many(jobs, ExportOptions())) == {"cat": "done", "dog": "done", "eel": "done"}


# What ends a job from outside


@pytest.mark.parametrize(
    ("end", "what", "found"),
    [
        pytest.param(
            lambda: os.kill(os.getpid(), signal.SIGKILL),
            "the process was killed, perhaps because memory ran out",
            "signal 9 (SIGKILL)",
            id="killed",
        ),
        pytest.param(lambda: os._exit(3), "the process was killed, perhaps because memory ran out",
                     "exit code 3", id="exit"),
        pytest.param(lambda: [].pop(), "it failed unexpectedly", "IndexError: pop from empty list", id="bug"),
        pytest.param(lambda: bytearray(1 << 60), "not enough memory", "MemoryError", id="memory"),
        pytest.param(lambda: os.read(1 << 20, 1), "the system reports an error: Bad file descriptor", None,
                     id="system"),
    ],
)  # fmt: skip
def test_what_ends_one_job_leaves_the_others(
    end: Callable[[], object], what: str, found: str, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(checkpoint: Path, *words: Any, **options: Any) -> ExportReport:
        if "dog" in str(checkpoint):
            end()
        return export_checkpoint(checkpoint, *words, **options)

    monkeypatch.setattr("cogtools.export.batch_lora.export_checkpoint", export)
    options = ExportOptions()
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    jobs = plan_batch([*map(str, runs), str(run(tmp_path / "fox"))], tmp_path / "out", ExportOptions())
    items = {item.checkpoint.split("/")[-3]: item for item in export_many(jobs, options)}
    assert {name: item.status for name, item in items.items()} == {
        "cat": "done", "dog": "failed", "eel": "done", "fox": "done"
    }  # fmt: skip
    error = items["dog"].error
    assert error is not None
    assert (error.what, error.found) == (what, found)
    assert written(tmp_path / "out") == [f"{name}-1000/{FILE_NAME}" for name in ("cat", "eel", "fox")]
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("items", "status"),
    [
        ([("done", "pass"), ("skipped", None)], "ok"),
        ([("done", "pass"), ("done", "fail")], "wrong"),
        ([("done", "fail"), ("failed", None)], "error"),
    ],
    ids=["all-well", "one-wrong", "one-failed"],
)
def test_the_status_of_a_batch_is_the_worst_of_all(items: list[tuple[Any, str | None]], status: str) -> None:
    def report(verdict: str | None) -> Any:
        return SimpleNamespace(verification=SimpleNamespace(verdict=verdict))

    assert batch_report([BatchItem("a", None, done, report(verdict)) for done, verdict in items]).status == status
