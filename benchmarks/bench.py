"""Measure cogtools against the plain way, on full-size checkpoints: whole processes, in turn, in one run.

    python -m benchmarks.bench FOLDER [--rounds N]

The plain way (`benchmarks/plain_way.py`) is torch.load with mmap, renaming, and diffusers' own writer; to list, it is
torch.load with mmap and printing. Every process pays for its own start and imports, as a user does. What is printed
are medians and ratios of this run; times on another machine are others.
"""

import argparse
import os
import pty
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

COGTOOLS = str(Path(sys.executable).with_name("cogtools"))
PLAIN = [sys.executable, "-m", "benchmarks.plain_way"]

START = "import typer, rich.console, rich.table"
COPY = """
import os, sys
source, target = os.open(sys.argv[1], os.O_RDONLY), os.open(sys.argv[2], os.O_RDWR | os.O_CREAT | os.O_TRUNC)
position, end = 0, int(sys.argv[3]) if sys.argv[3:] else os.fstat(source).st_size
while position < end:
    position += os.copy_file_range(source, target, end - position, position)
os.fsync(target)
"""


MODEL_BYTES = 3_387_650_440
"""What a 2B's transformer takes in fp16: what is copied to compare with."""


@dataclass
class Case:
    """A command, and what was measured of it: seconds and bytes of peak memory, one of each per round."""

    label: str
    command: list[str]
    terminal: bool = False
    output: Path | None = None
    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    @property
    def time(self) -> float:
        """The median of its times, in seconds."""
        return statistics.median(self.seconds)

    @property
    def peak(self) -> float:
        """The median of its peak memory, in bytes."""
        return statistics.median(self.memory)


def run(case: Case) -> None:
    """Run the command once, its output going to a pipe or a terminal that is read to the end."""
    if case.output is not None:
        shutil.rmtree(case.output, ignore_errors=True)
        case.output.unlink(missing_ok=True)
        os.sync()  # what the case before has written is not this one's to write out
    reader, writer = pty.openpty() if case.terminal else os.pipe()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    drain = threading.Thread(target=_drain, args=(reader,))
    start = time.perf_counter()
    process = subprocess.Popen(case.command, stdout=writer, stderr=subprocess.DEVNULL, env=environment)
    os.close(writer)
    drain.start()
    _, status, usage = os.wait4(process.pid, 0)
    case.seconds.append(time.perf_counter() - start)
    case.memory.append(usage.ru_maxrss * 1024)
    process.returncode = os.waitstatus_to_exitcode(status)
    drain.join()
    os.close(reader)
    if process.returncode:
        raise SystemExit(f"{' '.join(case.command)} ended with {process.returncode}")


def _drain(reader: int) -> None:
    try:
        while os.read(reader, 1 << 16):
            pass
    except OSError:  # how a terminal says that its other side is closed
        pass


def cases(folder: Path) -> dict[str, Case]:
    """All commands, by a short name; the checkpoints are made if they are not there."""
    small, large, dense = folder / "2b.pt", folder / "2b-x4.pt", folder / "2b-dense.pt"
    for path, scale in ((small, 1), (large, 4), (dense, 1)):
        if not path.exists():
            # In a process of its own: what this one has in memory would count as its children's peak.
            words = [str(path), "--model", "2b", "--rank", "128", "--scale", str(scale)]
            words += ["--dense"] if path is dense else []
            subprocess.run([sys.executable, "-m", "benchmarks.full_size", *words], check=True)
    lora, comfyui = folder / "out" / "pytorch_lora_weights.safetensors", folder / "lora_comfyui.safetensors"
    export = [COGTOOLS, "export-lora", "--quiet"]
    return {
        "plain export": Case("export, the plain way", [*PLAIN, "export", str(small), str(folder / "plain")],
                             output=folder / "plain"),
        "export": Case("cogtools export-lora", [*export, str(small), str(folder / "out")], output=folder / "out"),
        "export x4": Case("  the same LoRA in a file 4 times as large", [*export, str(large), str(folder / "out")],
                          output=folder / "out"),
        "to comfyui": Case("  from diffusers' layout to ComfyUI's",
                           [*export, str(lora), str(comfyui), "--format", "comfyui"], output=comfyui),
        "from comfyui": Case("  and back", [*export, str(comfyui), str(folder / "back")], output=folder / "back"),
        "to sat": Case("  from diffusers' layout to a folder of SAT",
                       [*export, str(lora), str(folder / "sat"), "--format", "sat"], output=folder / "sat"),
        "start": Case("floor: start Python, import typer and rich", [sys.executable, "-c", START]),
        "copy": Case("floor: copy the LoRA's bytes, and sync", [sys.executable, "-c", COPY, str(lora),
                                                              str(folder / "copy")]),
        "plain list": Case("list names, the plain way", [*PLAIN, "list", str(small)]),
        "inspect": Case("cogtools inspect, piped", [COGTOOLS, "inspect", str(small)]),
        "inspect json": Case("cogtools inspect --json", [COGTOOLS, "inspect", "--json", str(small)]),
        "inspect table": Case("cogtools inspect, table on a terminal", [COGTOOLS, "inspect", str(small)],
                              terminal=True),
        "verify": Case("cogtools verify", [COGTOOLS, "verify", str(lora)]),
        "plain model": Case("export the whole model, the plain way",
                            [*PLAIN, "model", str(dense), str(folder / "plain-model")], output=folder / "plain-model"),
        "export model": Case("cogtools export-model",
                             [COGTOOLS, "export-model", str(dense), str(folder / "model"), "--quiet"],
                             output=folder / "model"),
        "merge": Case("cogtools merge: the LoRA into the whole model",
                      [COGTOOLS, "merge", str(dense), str(folder / "merged"), "--quiet"], output=folder / "merged"),
        "copy model": Case("floor: copy the model's bytes, and sync",
                           [sys.executable, "-c", COPY, str(dense), str(folder / "model-copy"), str(MODEL_BYTES)],
                           output=folder / "model-copy"),
    }  # fmt: skip


def table(results: dict[str, Case]) -> str:
    """The results, each beside what it is compared with."""
    rows = [["", "time", "memory", "time", "memory"]]
    exports = ("export", "export x4", "to comfyui", "from comfyui", "to sat")
    against = {**dict.fromkeys(exports, "plain export"), "export model": "plain model"}
    against |= dict.fromkeys(("inspect", "inspect json", "inspect table"), "plain list")
    for name, case in results.items():
        row = [case.label, f"{case.time:.3f} s", f"{case.peak / 1e6:.0f} MB", "", ""]
        if name in against:
            other = results[against[name]]
            row[3:] = [f"{other.time / case.time:.1f} times faster", f"1/{other.peak / case.peak:.0f}"]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main(arguments: Sequence[str]) -> None:
    """Make the checkpoints, measure, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="where checkpoints and results go: 20 GB of sparse files, 18 GB of others"
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each command runs")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    results = cases(options.folder)
    for number in range(options.rounds + 1):
        for case in results.values():
            run(case)
            if number == 0:  # the first round fills the page cache
                case.seconds.clear()
                case.memory.clear()
    print(f"2B, rank 128, {(options.folder / '2b.pt').stat().st_size / 1e9:.1f} GB; medians of {options.rounds} runs\n")
    print(table(results))
    print()
    for name, label in (("export model", "export-model"), ("merge", "merge")):
        pairs = zip(results[name].seconds, results["copy model"].seconds, strict=True)
        ratio = statistics.median(ours / copied for ours, copied in pairs)
        print(f"{label} takes {ratio:.2f} times as long as copying and syncing as many bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
