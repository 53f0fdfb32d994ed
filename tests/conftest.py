"""What the tests share."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cogtools import cli
from tests.support.command_line import CommandLine, Result, build_once
from tests.support.factories import TOY_2B, sat_checkpoint, sat_state_dict, save_run

build_once()


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of checkpoints that the real trainer wrote."""
    folder = os.environ.get("COGTOOLS_REAL_CHECKPOINTS")
    if folder is None:
        pytest.skip("COGTOOLS_REAL_CHECKPOINTS does not name the folder of checkpoints that the real trainer wrote")
    return Path(folder)


@pytest.fixture(scope="session")
def truth() -> Path:
    """The folder of what SAT's own models computed."""
    folder = os.environ.get("COGTOOLS_MODEL_TRUTH")
    if folder is None:
        pytest.skip("COGTOOLS_MODEL_TRUTH does not name the folder of what SAT's own models computed")
    return Path(folder)


@pytest.fixture(params=["2b-fp16", "2b-fp32", "5b-bf16", "2b-bf16-legacy", "2b-bf16-numpy1", "2b-bf16-plain"])
def real_run(real: Path, request: pytest.FixtureRequest) -> Path:
    """Each save folder of the real trainer with a complete LoRA: 3 layers, rank 4, alpha 1."""
    name: str = request.param
    return real / name


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trainer's save folder with a toy LoRA of rank 4, which tests copy."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    save_run(folder, sat_checkpoint(sat_state_dict(TOY_2B, 4)), rank=4)
    return folder


@pytest.fixture
def run_folder(saved_run: Path, tmp_path: Path) -> Path:
    """A trainer's save folder with a toy LoRA of rank 4."""
    return Path(shutil.copytree(saved_run, tmp_path / "run"))


@pytest.fixture
def cogtools_cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """Run a command line in this process."""
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def run(*words: str | Path) -> Result:
        code = cli.run([str(word) for word in words])
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def open_files() -> Callable[[], int]:
    """Count the files that this process has open."""
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        pytest.skip("counts open files in /proc")
    return lambda: len(list(folder.iterdir()))
