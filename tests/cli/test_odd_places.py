"""Paths, files and systems that are unusual, but not wrong."""

import os
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file

import cogtools
from benchmarks import full_size
from cogtools.checkpoint import files as storage
from cogtools.conversion import output as writer
from cogtools.layouts.diffusers import FILE_NAME
from tests.support.command_line import program, run_program, surroundings
from tests.support.factories import TOY_2B, sat_state_dict

ODD_NAMES = {
    "spaces": b"my LoRA run",
    "quotes": b'it\'s "fine"',
    "newline": b"two\nlines",
    "escape": b"\x1b[31mred",
    "markup": b"[red]x",
    "not-utf-8": b"caf\xe9",
    "unicode": "猫のLoRA".encode(),
    "dash": b"-rf",
    "long": b"x" * 240,
}


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return dict(sat_state_dict(TOY_2B, 4, base="none"))


def saved(folder: Path, state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    with (folder / "a.pt").open("wb") as file:  # torch.save itself cannot write to a path that is not UTF-8
        torch.save(state, file)
    return folder / "a.pt"


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_names_like_others(tmp_path: Path, state: dict[str, torch.Tensor], name: str) -> None:
    folder = tmp_path / os.fsdecode(ODD_NAMES[name])
    command = program("export-lora", "--", saved(folder, state), folder / "out")
    done = subprocess.run(command, capture_output=True, check=False, env=surroundings())
    assert (done.returncode, b"\x1b" in done.stdout + done.stderr) == (0, False)
    assert len(load((folder / "out" / FILE_NAME).read_bytes())) == 24


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_error_about_an_odd_name_is_told_in_whole_lines(tmp_path: Path, name: str) -> None:
    folder = tmp_path / os.fsdecode(ODD_NAMES[name])
    done = run_program("export-lora", "--", folder, tmp_path / "out")
    assert (done.code, done.out) == (2, "")
    lines = done.err.splitlines()
    assert (len(lines), lines[0]) == (2, "error: there is no such file")


TOO_LONG = "x" * 300


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["export-lora", TOO_LONG, "out"], id="checkpoint"),
        pytest.param(["export-lora", "a.pt", f"{TOO_LONG}/out"], id="folder"),
        pytest.param(["export-lora", "a.pt", f"{TOO_LONG}.safetensors"], id="output"),
        pytest.param(["export-lora", TOO_LONG, "a.pt", "out"], id="one-of-many"),
        pytest.param(["verify", TOO_LONG], id="verify"),
        pytest.param(["inspect", TOO_LONG], id="inspect"),
    ],
)
def test_a_name_too_long_for_the_system_is_an_error_like_others(
    tmp_path: Path, state: dict[str, torch.Tensor], words: list[str]
) -> None:
    saved(tmp_path, state)
    done = run_program(*words, cwd=tmp_path)
    assert (done.code, "Traceback" in done.err, "File name too long" in done.err) == (2, False, True)


def test_a_terminal_that_knows_ascii_only_is_no_hindrance(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = saved(tmp_path / "猫", state)
    done = subprocess.run(
        program("export-lora", path, tmp_path / "猫" / "out"),
        capture_output=True,
        check=False,
        env=surroundings(PYTHONIOENCODING="ascii"),
    )
    assert done.returncode == 0
    assert rb"\u732b" in done.stdout


def test_a_source_that_may_only_be_read_is_enough(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = saved(tmp_path / "run", state)
    path.chmod(0o444)
    path.parent.chmod(0o555)
    try:
        assert cogtools.export_lora(path, tmp_path / "out").tensors == 24
    finally:
        path.parent.chmod(0o755)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(cogtools.CogtoolsError) as caught:
        cogtools.export_lora(tmp_path / "pipe", tmp_path / "out")
    assert (caught.value.what, caught.value.found) == ("this is not a regular file", "a pipe")


def test_standard_input_is_refused_too(tmp_path: Path) -> None:
    command = program("export-lora", "/dev/stdin", tmp_path / "out")
    done = subprocess.run(command, input=b"PK\x03\x04", capture_output=True, check=False, env=surroundings())
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, b"error: this is not a regular file")


def test_a_broken_link_is_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "link.pt").symlink_to(tmp_path / "nowhere.pt")
    with pytest.raises(cogtools.CogtoolsError, match="there is no such file"):
        cogtools.open_checkpoint(tmp_path / "link.pt")


def test_a_checkpoint_over_4_gib_is_read_like_others(tmp_path: Path) -> None:
    path = tmp_path / "large.pt"
    full_size.make(path, full_size.MODELS["2b"], 4, torch.float16, 1.5)
    if path.stat().st_blocks * 512 > 1 << 30:
        pytest.skip("the file system has no sparse files")
    assert path.stat().st_size > 1 << 32
    cogtools.export_lora(path, tmp_path)
    wanted = torch.load(path, mmap=True, weights_only=False, map_location="cpu")["module"]
    found = load_file(tmp_path / FILE_NAME)
    assert len(found) == 240
    key = "model.diffusion_model.transformer.layers.29.attention.dense.matrix_B.0"
    assert torch.equal(found["transformer.transformer_blocks.29.attn1.to_out.0.lora_B.weight"], wanted[key])


# What other systems lack, simulated


def test_a_system_without_positioned_reads_reads_the_same(
    tmp_path: Path, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "run", state)
    cogtools.export_lora(path, tmp_path / "a")
    monkeypatch.delattr(os, "pread")
    monkeypatch.delattr(os, "copy_file_range")
    cogtools.export_lora(path, tmp_path / "b")
    assert (tmp_path / "a" / FILE_NAME).read_bytes() == (tmp_path / "b" / FILE_NAME).read_bytes()


def test_without_positioned_reads_threads_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pread")
    (tmp_path / "file").write_bytes(bytes(range(200)))
    wrong: list[int] = []
    with storage.SourceFile.open(tmp_path / "file") as file:

        def read(offset: int) -> None:
            wrong.extend(offset for _ in range(300) if file.read(offset, 1) != bytes([offset]))

        threads = [threading.Thread(target=read, args=(offset,)) for offset in (3, 50, 150)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_system_without_file_locks_writes_the_same(
    tmp_path: Path, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "run", state)
    cogtools.export_lora(path, tmp_path / "a")
    monkeypatch.setattr(writer, "fcntl", None)
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.delattr(os, "statvfs")
    cogtools.export_lora(path, tmp_path / "b")
    assert (tmp_path / "a" / FILE_NAME).read_bytes() == (tmp_path / "b" / FILE_NAME).read_bytes()


def test_a_file_system_that_cannot_lock_leaves_leftovers_alone(
    tmp_path: Path, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path / "run", state)
    leftover = tmp_path / f".{FILE_NAME}.1-00000000.cogtools-tmp"
    leftover.write_bytes(b"half")

    def cannot(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", cannot)
    cogtools.export_lora(path, tmp_path)
    assert leftover.exists()
