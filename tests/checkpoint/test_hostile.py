"""Whatever a file or folder says, opening it does nothing but read, in bounded time and memory, and tells what it says.

The corpus is in `tests/hostile/`, the watch in `tests/audit.py`; `tests/test_hostile_corpus.py` shows that the one
bites and the other sees.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import subprocess
import sys
import tempfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

import cogtools
from cogtools import cli
from cogtools.checkpoint.limits import MAX_INSTRUCTIONS
from cogtools.errors import CogtoolsError, ExportError
from cogtools.layouts import sat
from tests.support import hostile
from tests.support.audit import no_side_effects
from tests.support.command_line import surroundings
from tests.support.fuzz_readers import open_path, read
from tests.support.hostile import HostileFile, HostilePickle
from tests.support.loras import lora_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

linux_only = pytest.mark.skipif(
    sys.platform != "linux", reason="limits of memory, and its peak in kilobytes, are of Linux"
)


class Met(NamedTuple):
    """What came of opening a row and reading its tensors: the names that it was found to mention, or the error."""

    names: set[str] | None
    error: str | None


def meet(path: Path) -> Met:
    try:
        with cogtools.open_checkpoint(path) as checkpoint:
            read(checkpoint)
            return Met({str(name) for name in checkpoint.foreign}, None)
    except CogtoolsError as error:
        return Met(None, str(error))


def wrong(row: HostilePickle | HostileFile, met: Met) -> str | None:
    """What is not as the row expects it."""
    if met.names is None:
        return f"refused: {met.error}" if row.expect == "open" else None
    if row.expect == "refuse":
        return "opened"
    missing = set(row.names) - met.names
    return f"does not name {sorted(missing)}" if missing else None


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Have everything imported that reading imports when it is first needed."""
    import_all(tmp_path_factory.mktemp("warm"))


def import_all(folder: Path) -> None:
    tempfile.gettempdir()
    for row in hostile.run_folders():
        if row.id == "config-rank-of-another-run":
            open_path(row.write(folder))
    path = folder / "transposed.pt"
    path.write_bytes(hostile.torch_zip(hostile.checkpoint(module={hostile.KEY: hostile.tensor(stride=(1, 2))})))
    open_path(path)


def small_pickles() -> Iterator[HostilePickle]:
    return (row for row in hostile.pickles() if isinstance(row.source, bytes))


@pytest.mark.usefixtures("warm")
def test_a_hostile_pickle_does_nothing_and_is_told(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    found: dict[str, object] = {}
    for row in small_pickles():
        path.write_bytes(hostile.torch_zip(row.pickle))
        with no_side_effects(inside=tmp_path) as events:
            what = wrong(row, meet(path))
        if what is not None or events:
            found[row.id] = what, events
    assert found == {}


@pytest.mark.usefixtures("warm")
def test_a_hostile_file_or_folder_does_nothing_and_is_told(tmp_path: Path) -> None:
    found: dict[str, object] = {}
    for number, row in enumerate(row for row in hostile.files() if not is_bomb(row)):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = row.write(folder)
        # A folder must not lead out of itself; a file may lie where a link says.
        inside = path.absolute() if path.is_dir() else None
        with no_side_effects(inside=inside) as events:
            what = wrong(row, meet(path))
        if what is not None or events:
            found[row.id] = what, events
    assert found == {}


def test_what_a_refused_pickle_names_is_in_the_error(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    silent = []
    for row in hostile.opcodes():
        path.write_bytes(hostile.torch_zip(row.pickle))
        error = meet(path).error
        if error is not None and not all(name in error for name in row.names):
            silent.append((row.id, error))
    assert silent == []


# Bombs

MEGABYTE = 1 << 20
OVERHEAD_BYTES = 32 * MEGABYTE
PEAK_PER_BYTE = 128
"""The memory that reading takes: at most so many bytes per byte of the file, unpacked, and `OVERHEAD_BYTES`."""
TIMES_THE_YARDSTICK = 40
"""The processor time that reading takes: at most so many times what Python's own unpickler takes for as many bytes, and
a megabyte at least, on the same machine and under the same load (`yardstick`). The worst takes 12 times."""


def deflated(pickled: bytes) -> bytes:
    """A checkpoint whose pickle is packed: PyTorch never does that."""
    compressor = zlib.compressobj(9, wbits=-15)
    packed = compressor.compress(pickled) + compressor.flush()
    headers = {"method": 8, "size": len(pickled), "packed": len(packed), "crc": zlib.crc32(pickled)}
    members = hostile.members(pickled)
    members["data.pkl"] = hostile.Member(members["data.pkl"].name, packed, headers, headers)
    return hostile.zip_file(members.values())


def packed_floods() -> Iterator[tuple[str, bytes]]:
    """Millions of instructions, packed into a few kilobytes."""
    for name, code in {
        "one-tuples": b"(" + b"N\x85" * (MAX_INSTRUCTIONS // 2 - 16) + b"t",
        "memo-entries": b"N" + b"\x94" * (MAX_INSTRUCTIONS - 16),
    }.items():
        yield f"packed-flood-of-{name}", hostile.stream(code)


def is_bomb(row: HostileFile) -> bool:
    words = ("bomb", "many", "megabyte", "deep", "digits", "colliding", "long")
    return any(word in row.id for word in words)


def yardstick() -> float:
    """The seconds of processor time that the standard library's unpickler in Python takes for a megabyte just now."""
    pickled = hostile.stream(b"N0" * (MEGABYTE // 16) + b"N")  # pushed and popped again: it takes no memory
    start = time.process_time()
    pickle._Unpickler(io.BytesIO(pickled)).load()
    return (time.process_time() - start) * MEGABYTE / len(pickled)


Row = HostilePickle | HostileFile


def bomb_rows() -> list[Row]:
    """Every bomb, not yet built."""
    packed = [HostilePickle(name, code, expect="either") for name, code in packed_floods()]
    return [*hostile.bombs(), *packed, *(row for row in hostile.files() if is_bomb(row))]


class Bomb(NamedTuple):
    """What is meant to exhaust its reader; `size_bytes` is that of the file or of the pickle unpacked."""

    id: str
    path: str
    size_bytes: int


def built(number: int, folder: Path) -> Bomb:
    """The bomb of that number, written."""
    row = bomb_rows()[number]
    if isinstance(row, HostileFile):
        place = folder / str(number)
        place.mkdir()
        path = row.write(place)
        return Bomb(row.id, str(path), sum(part.lstat().st_size for part in place.rglob("*")))
    path = folder / "checkpoint.pt"
    pickled = row.pickle
    packed = row.id.startswith("packed-")
    path.write_bytes(deflated(pickled) if packed else hostile.torch_zip(pickled))
    return Bomb(row.id, str(path), len(pickled) if packed else path.stat().st_size)


class Defused(NamedTuple):
    """What came of opening a bomb: processor time in yardsticks, peak memory and size in bytes, and what is wrong."""

    times: float
    peak_bytes: int
    size_bytes: int
    wrong: object


def defused(number: int, bomb: Bomb, yardstick_seconds: float) -> Defused:
    """Open a bomb within limits; one that takes more than twice the time allowed is ended."""
    import resource

    limit = math.ceil(2 * TIMES_THE_YARDSTICK * yardstick_seconds * max(bomb.size_bytes / MEGABYTE, 1))
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with no_side_effects() as events:
        met = meet(Path(bomb.path))
    seconds = time.process_time() - start
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))  # building the row again is not what is measured
    found = wrong(bomb_rows()[number], met)
    return Defused(seconds / yardstick_seconds, peak, bomb.size_bytes, found or events)


def in_a_fork(deed: Callable[[], object]) -> Any:
    """What a deed gives, through JSON; None if it dies of it."""
    ready, answer = os.pipe()
    if os.fork() == 0:
        try:
            with os.fdopen(answer, "w") as pipe:
                json.dump(deed(), pipe)
        finally:
            os._exit(0)
    os.close(answer)
    with os.fdopen(ready) as pipe:
        given = pipe.read()
    os.wait()
    return json.loads(given) if given else None


def defuse(folder: str, share: int) -> None:
    """Open every other bomb in a fork of its own, within limits, and print what came of it, as JSON.

    The bombs are built in forks too: what their making left free in this process would be memory that is not counted.
    """
    import_all(Path(folder))
    taken = {}
    for number in range(share, in_a_fork(lambda: len(bomb_rows())), 2):
        bomb = Bomb(*in_a_fork(partial(built, number, Path(folder))))
        seconds = in_a_fork(yardstick)
        taken[bomb.id] = in_a_fork(partial(defused, number, bomb, seconds))
    sys.stdout.write(json.dumps(taken))


@pytest.mark.slow
@linux_only
def test_a_bomb_is_read_in_bounded_time_and_memory(tmp_path: Path) -> None:
    code = "import sys; from tests.checkpoint.test_hostile import defuse; defuse(sys.argv[1], int(sys.argv[2]))"

    def child(share: int) -> str:
        folder = tmp_path / str(share)
        folder.mkdir()
        command = [sys.executable, "-c", code, str(folder), str(share)]
        return subprocess.check_output(command, text=True, timeout=1200, env=surroundings())

    with ThreadPoolExecutor() as pool:
        first, second = map(json.loads, pool.map(child, range(2)))
    taken = {identifier: found and Defused(*found) for identifier, found in (first | second).items()}
    died = [identifier for identifier, found in taken.items() if found is None]
    opened = {identifier: found for identifier, found in taken.items() if found is not None}
    unlike = {identifier: found.wrong for identifier, found in opened.items() if found.wrong}
    large = {
        identifier: f"{found.peak_bytes / MEGABYTE:.0f} MB for {found.size_bytes / MEGABYTE:.1f}"
        for identifier, found in opened.items()
        if found.peak_bytes > OVERHEAD_BYTES + PEAK_PER_BYTE * found.size_bytes
    }
    slow = {
        identifier: f"{found.times:.1f} times the yardstick for {found.size_bytes / MEGABYTE:.1f} MB"
        for identifier, found in opened.items()
        if found.times > TIMES_THE_YARDSTICK * max(found.size_bytes / MEGABYTE, 1)
    }
    assert (died, unlike, large, slow) == ([], {}, {}, {})
    assert len(taken) > 100


# A good LoRA in bad company

LORA = [str(sat.LAYOUT.key(name)) for name in lora_keys((0,))]


def lora(payload: object = None, *, among: dict[str, object] | None = None, left_out: Iterable[str] = ()) -> bytes:
    """A checkpoint with a whole LoRA of one layer, rank 2 and hidden size 4."""
    module = {
        key: hostile.tensor() if "matrix_A" in key else hostile.tensor(size=(4, 2), stride=(2, 1))
        for key in LORA
        if key not in left_out
    }
    return hostile.torch_zip(hostile.checkpoint(payload, module=module | (among or {})))


COMPANY: dict[str, Callable[[], bytes]] = {
    "beside": lambda: lora(hostile.SHELL),
    "among-the-weights": lambda: lora(among={"evil": hostile.SHELL}),
    "as-a-key": lambda: lora(among={hostile.SHELL: None}),  # type: ignore[dict-item]
    "as-hooks": lambda: lora(among={"evil": hostile.tensor(hooks=hostile.SHELL)}),
}


@pytest.mark.parametrize("company", COMPANY)
def test_a_lora_in_bad_company_is_exported_as_without_it(
    company: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outputs = []
    for name, content in (("good", lora()), ("bad", COMPANY[company]())):
        folder = tmp_path / name
        folder.mkdir()
        checkpoint = folder / "checkpoint.pt"
        checkpoint.write_bytes(content)
        cogtools.export_lora(checkpoint, folder / "out", dry_run=True)  # imports
        with no_side_effects() as events:
            cogtools.export_lora(checkpoint, folder / "out", dry_run=True)
        assert events == []
        cogtools.export_lora(checkpoint, folder / "out.safetensors")
        outputs.append((folder / "out.safetensors").read_bytes())
    assert outputs[0] == outputs[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "good"]


def test_a_call_in_the_place_of_a_tensor_is_refused_by_its_key(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(lora(among={LORA[0]: hostile.SHELL}))
    with pytest.raises(ExportError) as caught:
        cogtools.export_lora(path, tmp_path / "out")
    assert [str(problem) for problem in caught.value.problems if problem.kind == "unreadable"] == [
        f"unreadable: {LORA[0]} (found something else than a plain tensor)"
    ]
    assert not (tmp_path / "out").exists()


# What is printed


@pytest.mark.parametrize("name", [name for name in hostile.DECEPTIVE if name != "megabyte"])
def test_a_deceptive_key_is_printed_inert(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    deceptive = hostile.DECEPTIVE[name]
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(lora(among={f"{deceptive}.lora_A": hostile.tensor()}))

    code = cli.run(["export-lora", str(path), str(tmp_path / "out")])

    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in deceptive)
    assert err.split("\n") == [
        "error: the LoRA in this checkpoint cannot be exported as it is",
        f"  file:      {path}",
        f"  problem:   unexpected: {shown}.lora_A (expected q, k, v or dense of an attention layer: SAT's LoRA adapts "
        "these, and only these are exported)",
        f"  try:       cogtools inspect {path} --lora",
        "",
    ]
