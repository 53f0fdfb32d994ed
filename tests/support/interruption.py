"""Kill exports at random moments, and look at what is left.

    python -m tests.support.interruption [--rounds N] [--seed N]

After every kill the target has to be absent, as it was before, or new and whole; and a run that is left alone has to
clean up what the killed ones left.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from cogtools.conversion.output import leftovers
from cogtools.layouts.diffusers import FILE_NAME
from tests.support.command_line import program
from tests.support.factories import COGVIDEOX_2B, sat_checkpoint, sat_state_dict, save_run

OLD = b"what was there before"


def export(checkpoint: Path, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(program("export-lora", checkpoint, out, "--overwrite", "--quiet"))


def kill_exports(folder: Path, rounds: int, seed: int) -> Counter[str]:
    """Kill that many exports; how often the target was "absent", "old" and "new" afterwards.

    Asserts after each that the target is as it was before, or new and whole; and in the end, that one which is left
    alone writes the whole and removes what the killed ones left.
    """
    chance = random.Random(seed)
    state = sat_state_dict(COGVIDEOX_2B, 16, base="none")
    checkpoint = save_run(folder / "run", sat_checkpoint(state), rank=16)
    out = folder / "out"
    start = time.monotonic()
    assert export(checkpoint, out).wait() == 0
    whole_seconds = time.monotonic() - start
    target = out / FILE_NAME
    new = target.read_bytes()
    found: Counter[str] = Counter()
    for _ in range(rounds):
        target.unlink(missing_ok=True)
        if chance.random() < 0.5:
            target.write_bytes(OLD)
        before = target.read_bytes() if target.exists() else None
        process = export(checkpoint, out)
        # Later more often than sooner: it is the end that matters.
        time.sleep(whole_seconds * chance.uniform(0.3, 1.1))
        process.kill()
        process.wait()
        after = target.read_bytes() if target.exists() else None
        assert after in (before, new), f"{len(after or b'')} bytes, neither what was there nor what should be"
        found["absent" if after is None else "new" if after == new else "old"] += 1
        found["with a leftover"] += any(leftovers(target))
    assert export(checkpoint, out).wait() == 0
    assert target.read_bytes() == new
    assert list(leftovers(target)) == []
    return found


def main() -> None:
    """Run it in a temporary folder and tell what was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.interruption", description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = kill_exports(Path(folder), options.rounds, options.seed)
    sys.stdout.write(f"{options.rounds} exports killed; afterwards: {dict(found)}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
