"""Run the command line in this process or in one of its own, and hold what --json prints against the schemas."""

import functools
import json
import os
import pty
import select
import subprocess
import sys
import termios
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest
import typer
from referencing import Registry, Resource

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT / "cogtools" / "render" / "schemas"
HEAVY = ("torch", "diffusers", "peft", "safetensors", "numpy", "transformers", "rich", "yaml", "matplotlib")
"""What takes long to import."""

_IMPORTS = """
import json, sys
from cogtools.cli import run
code = run(sys.argv[1:])
sys.stderr.write(json.dumps(sorted(sys.modules)))
sys.exit(code)
"""


class Result(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object that --json printed, which keeps to the schema of its command."""
        found = json.loads(self.out, parse_constant=_refuse)
        _validate(found)
        return found


def build_once() -> None:
    """Let typer build the command line once in this process: it takes longer than most commands, every time."""
    pytest.MonkeyPatch().setattr("typer.main.get_command", functools.cache(typer.main.get_command))


CommandLine = Callable[..., Result]
"""Takes the words of a command line: what the fixture `cogtools_cli` gives."""


def program(*words: str | Path) -> list[str]:
    """The command that starts the program in a process of its own."""
    return [sys.executable, "-m", "cogtools", *map(str, words)]


def surroundings(**environment: str) -> dict[str, str]:
    """The environment for such a process, in which it finds the package and the tests from any folder."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **environment}


def run_program(*words: str | Path, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> Result:
    """Run the program in a process of its own."""
    return _run(program(*words), cwd, environment)


def on_terminal(columns: int, *words: str | Path, rows: int = 50, code: int = 0, **environment: str) -> str:
    """What the program prints as its result on a terminal of this size.

    Its errors go to a pipe, so that no progress bar is on the same screen, and there have to be none.
    """
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (rows, columns))
    unset = {name: value for name, value in surroundings().items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    child = subprocess.Popen(
        program(*words),
        stdin=slave,
        stdout=slave,
        stderr=subprocess.PIPE,
        text=True,
        env={**unset, "TERM": "xterm-256color", **environment},
    )
    os.close(slave)
    parts = []
    while select.select([master], [], [], 60)[0]:
        try:
            part = os.read(master, 65536)
        except OSError:  # Linux: nobody has the other end any more
            break
        if not part:
            break
        parts.append(part)
    os.close(master)
    _, errors = child.communicate()
    assert (child.returncode, errors) == (code, "")
    return b"".join(parts).decode().replace("\r\n", "\n")


def run_python(code: str, *words: str | Path) -> Result:
    """Run Python code, which has to end well, in a process of its own."""
    done = _run([sys.executable, "-c", code, *map(str, words)])
    assert done.code == 0, done.err
    return done


def imported_by(*words: str | Path) -> set[str]:
    """Which of the heavy libraries are imported when a command line is run; it has to end well."""
    return set(HEAVY) & set(json.loads(run_python(_IMPORTS, *words).err.splitlines()[-1]))


def _run(command: list[str], cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> Result:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=cwd, env=surroundings(**(environment or {}))
    )
    return Result(done.returncode, done.stdout, done.stderr)


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def _validate(found: Any) -> None:
    schemas = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in SCHEMAS.glob("*.json")}
    registry: Registry[Any] = Registry().with_resources(
        (schema["$id"], Resource.from_contents(schema)) for schema in schemas.values()
    )
    schema = schemas[found["command"] or "error"]
    jsonschema.Draft202012Validator(schema, registry=registry).validate(found)
