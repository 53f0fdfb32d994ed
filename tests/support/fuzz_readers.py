"""Fuzzing of all that reads files: what goes in, and that nothing but a CogtoolsError may come out.

`tests/test_fuzz.py` runs the targets on a few hundred mutations; `make fuzz` runs them under atheris, which is
guided by the code that an input reaches:

    python -m tests.support.fuzz_readers .fuzz --seconds 300     every target, two at a time, and a table of the results
    python -m tests.support.fuzz_readers .fuzz --target pickle   one target until it fails; libFuzzer's options work too

Seeds are made in `.fuzz/seeds/`, what is found on the way is kept in `.fuzz/corpus/`, and inputs that fail are
written to `.fuzz/failures/`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support import hostile
from tests.support.command_line import build_once
from tests.support.fuzz_commands import (
    COMMANDS,
    INSPECT,
    PARTS,
    VALUES,
    VERIFY,
    good_lora,
    inspect_file,
    stated,
    verify_file,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cogtools.checkpoint.dtypes import DType
    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.tensors import Storage

LIMITS = ("-timeout=20", "-rss_limit_mb=3000")
"""For one input: 20 seconds; for the process, which keeps a corpus: 3 GB."""

MAX_SEED_BYTES = 1 << 14
MAX_READ_BYTES = 1 << 20
"""How much of the tensors is read: what strides of 0 spread out may be endless."""

FOLDER_FILES = ("model.safetensors.index.json", "latest", "training_config.yaml", "model_index.json")
"""The small files that a folder is told by. The first byte of a folder's input says which of them the rest is."""


# What is done with an input


def read(checkpoint: Checkpoint) -> None:
    """Read the tensors' bytes, and plan the export."""
    from cogtools.checkpoint.gather import tensor_chunks

    left = MAX_READ_BYTES
    for entry in [*checkpoint.tensors.values(), *checkpoint.beside.values()]:
        for chunk in tensor_chunks(entry, chunk_bytes=1 << 16):
            left -= len(chunk)
            if left < 0:
                break
    plan(checkpoint)


def plan(checkpoint: Checkpoint) -> None:
    """Plan the export, with and without layers that are missing."""
    from cogtools.conversion.plan import plan_lora
    from cogtools.errors import CogtoolsError
    from cogtools.layouts import diffusers

    for allow_partial in (False, True):
        try:
            plan_lora(checkpoint, diffusers.LAYOUT, allow_partial=allow_partial)
        except CogtoolsError as error:
            told(error)


def told(error: Exception) -> None:
    """Render an error in both ways: that must not fail either."""
    from cogtools.errors import CogtoolsError

    if isinstance(error, CogtoolsError):
        json.dumps(error.to_dict())
    str(error)


def open_path(path: Path) -> None:
    """Open a file or folder as every command does."""
    from cogtools.checkpoint.opening import open_checkpoint
    from cogtools.errors import CogtoolsError

    try:
        with open_checkpoint(path) as checkpoint:
            read(checkpoint)
    except CogtoolsError as error:
        told(error)


def open_file(content: bytes, folder: Path) -> None:
    """Any checkpoint file: the content tells its format."""
    path = folder / "checkpoint.pt"
    path.write_bytes(content)
    open_path(path)


def open_pickle(content: bytes, folder: Path) -> None:
    """A pickle whose storages are whatever it says they are: no archive, no CRC-32 in the way."""
    from cogtools.checkpoint.files import FileRange, SourceFile
    from cogtools.checkpoint.index import index_pickle
    from cogtools.checkpoint.pickle.machine import MalformedPickleError, read_pickle
    from cogtools.checkpoint.pickle.torch_calls import malformed, torch_vocabulary
    from cogtools.checkpoint.tensors import Storage
    from cogtools.errors import CogtoolsError

    def open_storage(key: str, dtype: DType | None, numel: int) -> Storage:
        return Storage.at(key, FileRange(file, 0, numel * (dtype.itemsize if dtype else 1)))

    path = folder / "checkpoint.pt"
    path.write_bytes(bytes(4096))
    with SourceFile.open(path) as file:
        try:
            read(index_pickle(read_pickle(content, torch_vocabulary(open_storage)), file, "pickle"))
        except MalformedPickleError as error:
            told(malformed(path, error))
        except CogtoolsError as error:
            told(error)


def open_keys(content: bytes, folder: Path) -> None:
    """A plan for whatever keys, shapes and dtypes: lines of "key dtype size size …", and the rest as configuration."""
    from cogtools.checkpoint.dtypes import DTYPES
    from cogtools.checkpoint.files import FileRange, SourceFile
    from cogtools.checkpoint.index import Checkpoint
    from cogtools.checkpoint.tensors import Storage, TensorEntry, contiguous_strides

    table, _, config = content.partition(b"\0")
    path = folder / "checkpoint.pt"
    path.write_bytes(b"")
    (folder / "training_config.yaml").write_bytes(config)
    with SourceFile.open(path) as file:
        checkpoint = Checkpoint(path, "keys", [file], {})
        for line in table.decode("utf-8", "surrogateescape").split("\n"):
            key, *rest = line.split(" ")
            if not rest:
                checkpoint.not_tensors[key] = None
                continue
            dtype = DTYPES.get(rest[0], DTYPES["float32"])
            shape = tuple(int(size) for size in rest[1:] if re.fullmatch("[0-9]{1,18}", size))
            storage = Storage.at(key, FileRange(file, 0, 1 << 20))
            checkpoint.tensors[key] = TensorEntry(dtype, shape, contiguous_strides(shape), storage)
        plan(checkpoint)


def open_folder(content: bytes, folder: Path) -> None:
    """A trainer's folder, shards and a pipeline, one of whose small files is the input."""
    name = FOLDER_FILES[content[0] % len(FOLDER_FILES)] if content else FOLDER_FILES[0]
    for place in (folder / "1", folder / "transformer"):
        place.mkdir(exist_ok=True)
    for file in (folder / "1" / "mp_rank_00_model_states.pt", folder / "transformer" / "model.safetensors"):
        if not file.exists():
            file.write_bytes(seeds("file")["zip"])
    shard = folder / hostile.SHARDS[0]
    if not shard.exists():
        shard.write_bytes(seeds("safetensors")["good"])
    for other in FOLDER_FILES:
        (folder / other).unlink(missing_ok=True)
    (folder / name).write_bytes(content[1:])
    open_path(folder / name if name.endswith(".json") else folder)


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    "file": open_file,
    "pickle": open_pickle,
    "safetensors": open_file,
    "planner": open_keys,
    "folder": open_folder,
    "inspect": inspect_file,
    "verify": verify_file,
    "stated": stated,
}


# Seeds

LORA_SUFFIXES = [
    *(f"query_key_value.matrix_{factor}.{part}" for factor in "AB" for part in range(3)),
    "dense.matrix_A.0",
    "dense.matrix_B.0",
]
LORA_KEYS = [f"model.diffusion_model.transformer.layers.0.attention.{suffix}" for suffix in LORA_SUFFIXES]


def lora_pickle() -> bytes:
    """A checkpoint's pickle with a whole LoRA: one layer, rank 2, hidden size 4, all in one storage."""
    module = {
        key: hostile.tensor() if "matrix_A" in key else hostile.tensor(size=(4, 2), stride=(1, 4)) for key in LORA_KEYS
    }
    return hostile.checkpoint(module=module)


def _zeroed(archive: bytes) -> bytes:
    """The archive with every CRC-32 zero, so that what is changed in it is not refused for that."""
    for magic, place in ((b"PK\x03\x04", 14), (b"PK\x01\x02", 16)):
        start = archive.find(magic)
        while start >= 0:
            archive = archive[: start + place] + bytes(4) + archive[start + place + 4 :]
            start = archive.find(magic, start + 1)
    return archive


@cache
def seeds(target: str) -> dict[str, bytes]:
    """Inputs to begin with, by name: good ones, and those of the hostile corpus that are small."""
    found = {name: content for name, content in _seeds(target) if len(content) <= MAX_SEED_BYTES}
    return dict(sorted(found.items()))


def _seeds(target: str) -> Iterator[tuple[str, bytes]]:
    match target:
        case "file":
            yield "zip", hostile.torch_zip(lora_pickle())
            yield "zip-without-crc32", _zeroed(hostile.torch_zip(lora_pickle()))
            yield "legacy", hostile.legacy_file(checkpoint=hostile.legacy_checkpoint())
            for row in (*hostile.zips(), *hostile.legacy(), *hostile.strangers()):
                if isinstance(row.content, bytes):
                    yield row.id, row.content
        case "pickle":
            yield "lora", lora_pickle()
            for each in hostile.pickles():
                if isinstance(each.source, bytes):
                    yield each.id, each.source
        case "safetensors":
            one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
            yield "good", hostile.safetensors({"__metadata__": {"format": "pt"}, "a": one}, bytes(8))
            for row in hostile.safetensors_files():
                if isinstance(row.content, bytes):
                    yield row.id, row.content
        case "planner":
            lines = [f"{key} float32 {'2 4' if 'matrix_A' in key else '4 2'}" for key in LORA_KEYS]
            yield "lora", "\n".join(lines).encode()
            yield "config", "\n".join(lines).encode() + b"\0" + hostile.lora_config("r: 2\nlora_alpha: 1")
            yield "missing", "\n".join(lines[1:]).encode()
            yield "odd", "\n".join([*lines[1:], lines[0] + " 3", "module." + lines[0], "lora x y"]).encode()
        case "folder":
            yield from _folders()
        case "inspect":
            for number, (name, content) in enumerate(
                [pair for of in ("file", "safetensors", "pickle") for pair in seeds(of).items()]
            ):
                if name in ("lora", "good", "legacy", "zip-without-crc32") or number % 7 == 0:
                    for choice in range(len(INSPECT)):
                        yield f"{choice}-{name}", bytes([choice]) + content
        case "verify":
            for choice in range(len(VERIFY)):
                yield f"{choice}-good", bytes([choice]) + good_lora()
            for number, (name, content) in enumerate(seeds("safetensors").items()):
                yield name, bytes([number % len(VERIFY)]) + content
        case "stated":
            for choice, part in product(range(len(COMMANDS)), range(len(PARTS))):
                yield f"{choice}-{part}", bytes([choice, part])
            for value, part in product(range(len(VALUES)), range(len(PARTS))):
                yield f"{part}-with-{value}", bytes([value % len(COMMANDS), part, 7 * value % 31, 0, value % 4, value])


def _folders() -> Iterator[tuple[str, bytes]]:
    index = json.dumps({"weight_map": {"a": hostile.SHARDS[0]}}).encode()
    yield "index", b"\0" + index
    yield "latest", b"\1" + b"1"
    yield "config", b"\2" + hostile.lora_config("r: 2\nlora_alpha: 1\nlayer_range: [0]")
    yield "pipeline", b"\3" + json.dumps({"_class_name": "X", "transformer": ["diffusers", "Y"]}).encode()
    with tempfile.TemporaryDirectory() as scratch:
        for number, row in enumerate((*hostile.shard_indexes(), *hostile.run_folders())):
            place = Path(scratch, str(number))
            place.mkdir()
            folder = row.write(place)
            for position, name in enumerate(FOLDER_FILES):
                if (folder / name).is_file() and (folder / name).stat().st_size <= MAX_SEED_BYTES:
                    yield f"{row.id}-{name}", bytes([position]) + (folder / name).read_bytes()


# Under atheris


def fuzz(target: str, work: Path, options: list[str]) -> None:
    """Run one target under atheris, until it fails or the options end it. It does not return."""
    import atheris

    with atheris.instrument_imports(include=["cogtools"]):
        import cogtools.checkpoint.opening
        import cogtools.conversion.plan
        import cogtools.inspection.inspect
        import cogtools.render.inspect
        import cogtools.verification.against
        import cogtools.verification.verify  # noqa: F401 - imported for its effect
    build_once()
    corpus, start = work / "corpus" / target, work / "seeds" / target
    failures = work / "failures" / target
    for folder in (corpus, start, failures):
        folder.mkdir(parents=True, exist_ok=True)
    for name, content in seeds(target).items():
        (start / re.sub(r"\W", "-", name, flags=re.ASCII)[:100]).write_bytes(content)
    scratch = Path(tempfile.mkdtemp(prefix=f"fuzz-{target}-", dir=work))
    run = TARGETS[target]
    atheris.Setup(
        [sys.argv[0], f"-artifact_prefix={failures}/", *LIMITS, *options, str(corpus), str(start)],
        lambda content: run(content, scratch),
    )
    atheris.Fuzz()


def fuzz_all(work: Path, seconds: int) -> int:
    """Run every target, two at a time, for so many seconds in all; return how many failed."""
    each = max(seconds * 2 // len(TARGETS), 1)

    def one(target: str) -> tuple[str, int, int]:
        command = [sys.executable, "-m", "tests.support.fuzz_readers", str(work), "--target", target]
        log = work / f"{target}.log"
        with log.open("w") as output:
            done = subprocess.run(
                [*command, f"-max_total_time={each}", "-print_final_stats=1"], stdout=output, stderr=output, check=False
            )
        executed = re.findall(r"number_of_executed_units: (\d+)", log.read_text(errors="replace"))
        return target, int(executed[-1]) if executed else 0, done.returncode

    work.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(one, TARGETS))
    for target, executed, code in results:
        outcome = "nothing found" if code == 0 else f"FAILED: see {work / target}.log and {work / 'failures' / target}"
        sys.stdout.write(f"{target:<12} {executed:>10,} inputs  {outcome}\n")
    return sum(code != 0 for _, _, code in results)


def main() -> None:
    """Fuzz one target or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.fuzz_readers")
    parser.add_argument("work", type=Path, help="a folder for seeds, corpus and failures")
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=300, help="for all targets together (default: %(default)s)")
    given, options = parser.parse_known_args()
    if given.target:
        fuzz(given.target, given.work, options)
    sys.exit(1 if fuzz_all(given.work, given.seconds) else 0)


if __name__ == "__main__":
    main()
