"""The README shows what the commands really print, and names every command and option."""

import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

from cogtools import cli
from cogtools.checkpoint import limits
from cogtools.checkpoint.formats.signatures import MAX_SAFETENSORS_HEADER_BYTES
from cogtools.verification import child
from tests.support import hostile, judge
from tests.support.command_line import ROOT, surroundings
from tests.support.damage import DAMAGES
from tools.demo import make_sample

README = (ROOT / "README.md").read_text()
ELIDED = "…"


class Example(NamedTuple):
    """A command that the README shows, and what it shows of its output; a line of "…" stands for any lines."""

    command: str
    shown: str


def examples() -> list[Example]:
    found = []
    for block in re.findall(r"^```console\n(.*?)^```", README, re.DOTALL | re.MULTILINE):
        for command, shown in re.findall(r"^\$ (cogtools .*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
            found.append(Example(command, shown.rstrip("\n")))
    return found


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's checkpoint in it."""
    path = tmp_path_factory.mktemp("readme")
    make_sample(path / "ckpts" / "lora-disney")
    return path


def run(command: str, folder: Path) -> str:
    """What a command of the README prints."""
    done = subprocess.run(
        ["sh", "-c", f"{shlex.quote(sys.executable)} -m {command}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        cwd=folder,
        env=surroundings(COLUMNS="120"),
    )
    return done.stdout.rstrip("\n")


def paths_in(command: str) -> list[str]:
    """The words of a command that are not options."""
    return [word.rstrip("/") for word in shlex.split(command)[2:] if not word.startswith("-")]


def needed(example: Example) -> list[str]:
    """The commands of the README that write what this one reads."""
    writers = {paths_in(other.command)[-1]: other.command for other in examples() if "export-lora" in other.command}
    return [writers[path] for path in paths_in(example.command) if path in writers and writers[path] != example.command]


def test_the_readme_shows_commands() -> None:
    assert len(examples()) >= 3


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.command)
def test_the_readme_shows_what_a_command_prints(sample: Path, tmp_path: Path, example: Example) -> None:
    folder = tmp_path / "here"
    shutil.copytree(sample, folder)
    for command in needed(example):
        run(command, folder)
    printed = run(example.command, folder)
    pattern = ".*".join(re.escape(part) for part in re.split(rf"^{ELIDED}$", example.shown, flags=re.MULTILINE))
    assert re.fullmatch(pattern, printed, re.DOTALL), printed


def test_the_readme_shows_how_to_verify_what_it_exports() -> None:
    assert any(needed(example) for example in examples())


@pytest.mark.parametrize("command", [command.name for command in cli.app.registered_commands])
def test_the_readme_names_every_option(command: str) -> None:
    group = typer.main.get_command(cli.app)
    parameters = group.commands[command].params  # type: ignore[attr-defined] # typer's group is not typed as one
    names = {
        name
        for parameter in parameters
        if parameter.param_type_name == "option" and not parameter.hidden
        for name in parameter.opts
        if name.startswith("--") and name != "--help"
    }
    assert {name for name in names if f"`{name}" not in README} == set()


def mebibytes(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB"


def test_the_readme_states_the_limits_that_are_kept() -> None:
    stated = {
        "bytes of a pickle, unpacked": mebibytes(limits.MAX_PICKLE_BYTES),
        "bytes of a zip archive's directory": mebibytes(limits.MAX_DIRECTORY_BYTES),
        "bytes of a safetensors header, without its metadata": mebibytes(limits.MAX_HEADER_BYTES),
        "bytes of a safetensors header with its metadata": f"{MAX_SAFETENSORS_HEADER_BYTES // 10**6} MB",
        "bytes of an index of shards": mebibytes(limits.MAX_INDEX_BYTES),
        "bytes of `training_config.yaml`": f"{limits.MAX_TRAINING_CONFIG_BYTES >> 10} KiB",
        "tensors of a file, entries of a state dict": f"{limits.MAX_TENSORS:,}",
        "instructions of a pickle": f"{limits.MAX_INSTRUCTIONS:,}",
        "items that its calls may copy": f"{limits.MAX_COPIED_ITEMS:,}",
        "different names in it": f"{limits.MAX_NAMES:,}",
        "items in all keys that are tuples or very large numbers": f"{limits.MAX_CHOSEN_KEY_ITEMS:,}",
        "dimensions of a tensor": str(limits.MAX_DIMENSIONS),
    }
    assert [row for name, value in stated.items() if (row := f"| {name} | {value} |") not in README] == []


def test_the_readme_states_how_much_is_tested() -> None:
    rows = Counter(type(row).__name__ for row in chain(hostile.pickles(), hostile.files()))
    stated = f"{rows['HostilePickle']:,} hostile pickles and {rows['HostileFile']:,} hostile files and folders"
    assert stated in " ".join(README.split())


def test_the_readme_states_how_many_damages_are_found() -> None:
    silent = sum(damage.diffusers.says == "silent" for damage in DAMAGES)
    hidden = sum(damage.plain == "pass" for damage in DAMAGES)
    text = " ".join(README.split())
    assert f"damaged in {len(DAMAGES)} ways" in text
    assert f"{silent} of them load without a word" in text
    doubted = sum(damage.plain == "warn" and damage.load == "fail" for damage in DAMAGES)
    assert f"`verify` finds every one, {hidden} of them only with `--against`" in text
    assert f"is in doubt about {doubted} until `--load` fails them" in text


def test_the_readme_states_how_many_settings_are_judged() -> None:
    assert f"`make judge` judges {len(judge.constructions())} settings" in " ".join(README.split())


def test_the_readme_states_the_limits_of_loading() -> None:
    text = " ".join(README.split())
    assert f"at most {child.TIME_LIMIT_SECONDS} seconds and, on Linux, in {child.MEMORY_LIMIT_BYTES >> 30} GiB" in text
