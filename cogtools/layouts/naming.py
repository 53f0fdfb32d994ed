"""The ways in which the tensors of a CogVideoX LoRA are named: two that are verified, and others that are recognised.

Both name the modules as diffusers does, after a prefix of their own. Keys that miss them nearly are told apart, so
that a file made for another program is called that.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from cogtools.layouts import diffusers, peft, sat
from cogtools.layouts.cogvideox import LoraKey


class Naming(NamedTuple):
    """How a kind of LoRA file names its tensors.

    Attributes:
        name: whose names they are.
        reader: who loads the file.
        prefix: what stands before a module's path.
        file_name: the usual name of the file.
    """

    name: str
    reader: str
    prefix: str
    file_name: str

    def key(self, name: LoraKey) -> str:
        """The key of a LoRA tensor."""
        return diffusers.diffusers_key(name, self.prefix)

    def parse(self, key: str) -> LoraKey | None:
        """Which LoRA tensor a key names; None if none."""
        return diffusers.parse_key(key, self.prefix)


DIFFUSERS = Naming("diffusers", "diffusers", diffusers.PREFIX, diffusers.FILE_NAME)
PEFT = Naming("PEFT", "PEFT", peft.PREFIX, peft.FILE_NAME)

_PREFIXES = {
    diffusers.PREFIX: "diffusers' names",
    peft.PREFIX: "PEFT's names",
    "": "names without a prefix",
    "diffusion_model.": "names with ComfyUI's prefix",
    f"{peft.PREFIX}{diffusers.PREFIX}": "names with two prefixes",
}
_FACTORS = {"lora_A": "A", "lora_B": "B", "lora_down": "A", "lora_up": "B"}
_NEAR_MISS = re.compile(
    r"(?P<prefix>[a-z_.]*?)(?P<module>transformer_blocks\.\d{1,5}\.attn1\.to_(?:q|k|v|out))(?P<zero>\.0)?"
    r"\.(?P<factor>lora_A|lora_B|lora_down|lora_up)(?P<adapter>\.\w+)?\.weight",
    re.ASCII,
)


def near_miss(key: str) -> tuple[LoraKey, str] | None:
    """Which LoRA tensor a key means that is not named as it should be, and what is wrong with its name."""
    name = sat.parse_lora_key(key)
    if name is not None:
        return name, "SAT's names"
    match = _NEAR_MISS.fullmatch(key)
    if match is None or match["prefix"] not in _PREFIXES:
        return None
    module = diffusers.parse_module(match["module"] + (".0" if match["module"].endswith("to_out") else ""))
    if module is None:
        return None
    return LoraKey(*module, _FACTORS[match["factor"]]), _what_is_odd(match)


def _what_is_odd(match: re.Match[str]) -> str:
    odd = [] if match["prefix"] == diffusers.PREFIX else [_PREFIXES[match["prefix"]]]
    if match["factor"] not in ("lora_A", "lora_B"):
        odd.append("lora_down and lora_up for lora_A and lora_B")
    if match["adapter"]:
        odd.append(f"an adapter's name ({match['adapter'][1:]})")
    if match["module"].endswith("to_out") and not match["zero"]:
        odd.append("to_out for to_out.0")
    return " and ".join(odd) or "diffusers' names"
