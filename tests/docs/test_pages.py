"""The README and the pages show what the commands really print, and agree with the code they speak of."""

import re
import shlex
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pytest

from cogtools.checkpoint import limits
from cogtools.checkpoint.formats.signatures import MAX_SAFETENSORS_HEADER_BYTES
from cogtools.verification import child
from tests.support import hostile, judge
from tests.support.command_line import ROOT, surroundings
from tests.support.damage import DAMAGES
from tools import cli_pages
from tools.demo import RANK, make_model_sample, make_sample

PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
EVERYTHING = " ".join(" ".join(TEXT.values()).split())
ELIDED = "…"


class Example(NamedTuple):
    """A command that a page shows, and what it shows of its output; a line of "…" stands for any lines."""

    command: str
    shown: str

    def fits(self, output: str) -> bool:
        """Whether a command printed what the page shows."""
        parts = re.split(rf"^{ELIDED}$", self.shown, flags=re.MULTILINE)
        return re.fullmatch(".*".join(map(re.escape, parts)), output.rstrip("\n"), re.DOTALL) is not None


def examples(text: str) -> list[Example]:
    found = []
    for block in re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for command, shown in re.findall(r"^\$ (cogtools .*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
            found.append(Example(command, shown.rstrip("\n")))
    return found


WITH_EXAMPLES = [name for name, text in TEXT.items() if examples(text)]


def test_the_readme_and_the_pages_show_commands() -> None:
    assert {"README.md", "docs/export.md", "docs/inspect.md", "docs/verify.md"} <= set(WITH_EXAMPLES)


@pytest.mark.parametrize(
    "page", [page if page == "README.md" else pytest.param(page, marks=pytest.mark.slow) for page in WITH_EXAMPLES]
)
def test_a_page_shows_what_its_commands_print(page: str, tmp_path: Path) -> None:
    """Run one after the other, as a reader does, in a folder that holds the demo's checkpoint."""
    make_sample(tmp_path / "ckpts" / "lora-disney")
    if "$ cogtools export-model ckpts/sft-disney" in TEXT[page]:
        make_model_sample(tmp_path / "ckpts" / "sft-disney")
    if "$ cogtools merge ckpts/lora-toy" in TEXT[page]:
        make_model_sample(tmp_path / "ckpts" / "lora-toy", rank=RANK)
    for example in examples(TEXT[page]):
        done = subprocess.run(
            ["sh", "-c", f"{shlex.quote(sys.executable)} -m {example.command}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            cwd=tmp_path,
            env=surroundings(COLUMNS="120"),
        )
        assert example.fits(done.stdout), f"$ {example.command}\n{done.stdout}"


def test_the_page_of_the_command_line_is_what_the_app_says() -> None:
    assert TEXT["docs/cli.md"] == cli_pages.page(), "run make docs"


@pytest.mark.parametrize("page", TEXT)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    targets = [target for target in re.findall(r"\]\(([^)#:]+)\)", TEXT[page]) if not target.startswith("http")]
    assert [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()] == []


def test_the_readme_is_a_face_and_not_a_manual() -> None:
    assert len(TEXT["README.md"].splitlines()) <= 220


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
    assert [row for name, value in stated.items() if (row := f"| {name} | {value} |") not in TEXT["SECURITY.md"]] == []


def test_the_readme_states_how_much_is_tested() -> None:
    rows = Counter(type(row).__name__ for row in chain(hostile.pickles(), hostile.files()))
    stated = f"{rows['HostilePickle']:,} hostile pickles and {rows['HostileFile']:,} hostile files and folders"
    assert stated in EVERYTHING


def test_the_readme_states_how_many_damages_are_found() -> None:
    silent = sum(damage.diffusers.says == "silent" for damage in DAMAGES)
    hidden = sum(damage.plain == "pass" for damage in DAMAGES)
    assert f"damaged in {len(DAMAGES)} ways" in EVERYTHING
    assert f"{silent} of them load without a word" in EVERYTHING
    doubted = sum(damage.plain == "warn" and damage.load == "fail" for damage in DAMAGES)
    assert f"`verify` finds every one, {hidden} of them only with `--against`" in EVERYTHING
    assert f"is in doubt about {doubted} until `--load` fails them" in EVERYTHING


def test_the_pages_state_how_many_settings_are_judged() -> None:
    assert f"`make judge` judges {len(judge.constructions())} settings" in EVERYTHING


def test_the_pages_state_the_limits_of_loading() -> None:
    limits_of_loading = (
        f"at most {child.TIME_LIMIT_SECONDS} seconds and, on Linux, in {child.MEMORY_LIMIT_BYTES >> 30} GiB"
    )
    assert limits_of_loading in EVERYTHING
