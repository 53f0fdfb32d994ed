"""The picture of the README: how strong a LoRA's updates are in two iterations of one training.

    python -m tools.picture docs/images/strength.png

The trainings are samples at CogVideoX-2B's real shapes. Their values are random; how strong a layer is, is made up.
"""

import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tests.support.factories import COGVIDEOX_2B, is_lora, sat_checkpoint, sat_state_dict, save_run
from tools.demo import RANK


def make_iteration(folder: Path, iteration: int) -> Path:
    """A sample of a training whose updates grow with its iterations, most in the middle layers; its checkpoint."""
    state = sat_state_dict(COGVIDEOX_2B, RANK, torch.float16, base="telling")
    for key, tensor in state.items():
        if is_lora(key):
            layer = int(key.partition(".layers.")[2].partition(".")[0])
            of_layer = 0.5 + math.exp(-(((layer - 18) / 8) ** 2)) + 0.15 * math.sin(layer * 2.3)
            of_module = 1.2 if ".dense." in key else (0.8, 0.9, 1.1)[int(key[-1])]
            tensor.mul_(math.sqrt(of_layer * of_module * iteration / 1000))
    return save_run(folder, sat_checkpoint(state), iteration=iteration, rank=RANK)


def main(picture: Path) -> None:
    """Draw the picture with the command that the README shows for it."""
    picture.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        runs = [make_iteration(Path(folder) / name, steps) for name, steps in (("early", 250), ("late", 1000))]
        command = [sys.executable, "-m", "cogtools", "inspect", *map(str, runs), "--plot", str(picture)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
