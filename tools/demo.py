"""The demo: make a sample checkpoint in the trainer's layout, then run the commands on it as a user would.

    python -m tools.demo COGTOOLS FOLDER

The sample is CogVideoX-2B's: 30 layers, hidden size 1920, the LoRA at rank 4, and those base weights that are small.
"""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from tests.support.factories import COGVIDEOX_2B, TOY_2B, sat_checkpoint, sat_state_dict, save_run
from tests.support.models import save_model_run

RANK = 4


def make_sample(folder: Path) -> Path:
    """Write a trainer's save folder; the path of the checkpoint in it."""
    state = sat_state_dict(COGVIDEOX_2B, RANK, torch.float16, base="telling")
    return save_run(folder, sat_checkpoint(state), rank=RANK)


def make_model_sample(folder: Path, rank: int | None = None) -> Path:
    """Write a save folder of a whole model, with its VAE and text encoder, at toy size; with a LoRA of this rank."""
    return save_model_run(folder, TOY_2B, rank=rank)


def main(cogtools: str, folder: Path) -> None:
    """Run the demo in a folder, which is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print("A sample checkpoint, as the SAT trainer writes it:", flush=True)
    checkpoint = make_sample(folder / "lora-disney")
    print(f"  {checkpoint}, {checkpoint.stat().st_size / 1e6:.1f} MB", flush=True)
    out = folder / "out"
    for words in (
        ["export-lora", str(checkpoint), f"{out}/"],
        ["verify", f"{out}/", "--against", str(checkpoint)],
        ["inspect", str(checkpoint), "--lora", "--tree"],
    ):
        print(f"\n$ {shlex.join(['cogtools', *words])}", flush=True)
        subprocess.run([cogtools, *words], check=True)
    print(f"\nNext, with .venv/bin/activate: cogtools export-lora {out} loras --format comfyui, or your own checkpoint")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
