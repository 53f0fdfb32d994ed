"""Many checkpoints at once: each into a folder of its own, whatever becomes of the others."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cogtools.batch import plan_batch
from cogtools.errors import OptionError
from cogtools.layouts.diffusers import FILE_NAME
from tests.command_line import CommandLine, Result
from tests.factories import TOY_2B, sat_checkpoint, sat_state_dict, save_run


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
        f"done     {tmp_path / 'out' / f'{name}-1000' / FILE_NAME}: 24 tensors, float16, 28.5 kB, scaling 1/4"
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

    def pool(processes: int, *rest: Any) -> Any:
        made.append(processes)
        return make_pool(processes, *rest)

    make_pool = multiprocessing.Pool
    monkeypatch.setattr(multiprocessing, "Pool", pool)
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
    failures = [line for line in result.err.splitlines() if line.startswith("failed ")]
    assert sorted(failures) == [
        f"failed   {broken}: the file is cut short: this zip archive has no directory at its end (found: 1,000 bytes)",
        f"failed   {tmp_path / 'nothing'}: there is no such file",
    ]


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
    assert "the output exists already" in result.err
    assert target.read_bytes() == content
    again = cogtools_cli("export-lora", *runs, tmp_path / "out", *options, "--overwrite")
    assert (again.code, again.out.splitlines()[-1]) == (0, "3 done, 0 skipped, 0 failed")


def test_two_for_one_place_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    sources = [str(run(tmp_path / name / "lora")) for name in "ab"]
    with pytest.raises(OptionError) as caught:
        plan_batch(sources, tmp_path / "out")
    assert caught.value.what == "two checkpoints would be written to one place"
    assert caught.value.file == str(tmp_path / "out" / "lora-1000" / FILE_NAME)
    assert caught.value.found == " and ".join(f"{source}/1000/mp_rank_00_model_states.pt" for source in sources)


def test_one_that_is_given_twice_is_exported_once(cogtools_cli: CommandLine, runs: list[Path], tmp_path: Path) -> None:
    result = cogtools_cli("export-lora", runs[0], runs[0] / "1000", tmp_path / "out")
    assert (result.code, result.out.splitlines()[-1]) == (0, "1 done, 0 skipped, 0 failed")


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


def test_a_single_folder_keeps_its_name_in_a_folder_with_a_slash(
    cogtools_cli: CommandLine, runs: list[Path], tmp_path: Path
) -> None:
    cogtools_cli("export-lora", runs[0], f"{tmp_path}/a/")
    cogtools_cli("export-lora", runs[0], f"{tmp_path}/b")
    cogtools_cli("export-lora", runs[0] / "1000" / "mp_rank_00_model_states.pt", f"{tmp_path}/c/")
    assert [written(tmp_path / name) for name in "abc"] == [[f"cat-1000/{FILE_NAME}"], [FILE_NAME], [FILE_NAME]]


def test_files_outside_of_a_run_are_named_after_themselves(tmp_path: Path) -> None:
    jobs = plan_batch([str(tmp_path / "fine.pt"), str(tmp_path / "tuned.pt")], tmp_path / "out")
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
    assert result.code == 0
    assert not (tmp_path / "out").exists()
