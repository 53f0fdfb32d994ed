"""The ways in which the tensors of a CogVideoX LoRA are named: two that are verified, and others that are recognised.

Both name the modules as diffusers does, after a prefix of their own. Keys that miss them nearly are told apart, so
that a file made for another program is called that.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from cogtools.layouts import diffusers, peft, sat
from cogtools.layouts.family import LAYER_NUMBER, LoraKey


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

_FACTORS = {"lora_A": "A", "lora_B": "B", "lora_down": "A", "lora_up": "B"}
_PROJECTIONS = {"q": "q", "k": "k", "v": "v", "out": "out", "attn_out": "out"}

_LAYER = f"(?P<layer>{LAYER_NUMBER})"
_FACTOR = r"\.(?P<factor>lora_A|lora_B|lora_down|lora_up)(?P<adapter>\.\w+)?\.weight"
_DIFFUSERS_MODULE = rf"transformer_blocks\.{_LAYER}\.attn1\.to_(?P<projection>q|k|v|out)(?P<zero>\.0)?"


class Spelling(NamedTuple):
    """A way in which tensors of a LoRA are named.

    Attributes:
        names: what such names are called.
        module: the key up to the factor, as a regular expression.
        is_own: whether lora_down and lora_up, and a to_out without .0, are what its reader calls them.
        reader: the program that reads a file with such names; None if none does.
    """

    names: str
    module: str
    is_own: bool = False
    reader: str | None = None


_PEFT_FOLDER = f"PEFT (as {peft.FILE_NAME}, with {peft.CONFIG_NAME} beside it)"

SPELLINGS = (
    # diffusers' modules after a prefix
    Spelling("diffusers' names", rf"transformer\.{_DIFFUSERS_MODULE}", reader="diffusers"),
    Spelling("PEFT's names", rf"base_model\.model\.{_DIFFUSERS_MODULE}", reader=_PEFT_FOLDER),
    Spelling("names without a prefix", _DIFFUSERS_MODULE),
    Spelling("names with ComfyUI's prefix", rf"diffusion_model\.{_DIFFUSERS_MODULE}"),
    # get_peft_model_state_dict(PeftModel) given to diffusers' save_lora_weights
    Spelling("PEFT's names after diffusers' prefix", rf"transformer\.base_model\.model\.{_DIFFUSERS_MODULE}"),
    Spelling("diffusers' names after PEFT's prefix", rf"base_model\.model\.transformer\.{_DIFFUSERS_MODULE}"),
    # modules of other programs
    Spelling(
        "ComfyUI's names", rf"diffusion_model\.blocks\.{_LAYER}\.(?P<projection>q|k|v|attn_out)(?P<zero>)",
        is_own=True, reader="ComfyUI",
    ),
    Spelling(
        "VideoX-Fun's names",
        rf"lora_unet__transformer_blocks_{_LAYER}_attn1_to_(?P<projection>q|k|v|out)(?P<zero>_0)?",
        is_own=True, reader="VideoX-Fun",
    ),
    Spelling(
        "DiffSynth-Studio's names", rf"blocks\.{_LAYER}\.attn1\.to_(?P<projection>q|k|v|out)(?P<zero>\.0)?",
        is_own=True, reader="DiffSynth-Studio",
    ),
)  # fmt: skip
"""The names of LoRA tensors that are recognised. No key fits two rows: each begins in its own way."""

_PATTERNS = tuple((spelling, re.compile(spelling.module + _FACTOR, re.ASCII)) for spelling in SPELLINGS)


class NearMiss(NamedTuple):
    """A key that means a LoRA tensor and is not named as its reader names it.

    Attributes:
        name: the tensor.
        what: what its name is.
        reader: the program that reads a file with such names; None if none does.
    """

    name: LoraKey
    what: str
    reader: str | None = None


def near_miss(key: str) -> NearMiss | None:
    """Which LoRA tensor a key means that is not named as it should be; None if none that is known."""
    name = sat.parse_lora_key(key)
    if name is not None:
        return NearMiss(name, "SAT's names", "cogtools export-lora")
    for spelling, pattern in _PATTERNS:
        match = pattern.fullmatch(key)
        if match is not None:
            name = LoraKey(int(match["layer"]), _PROJECTIONS[match["projection"]], _FACTORS[match["factor"]])
            odd = _what_is_odd(spelling, match)
            return NearMiss(name, *odd)
    return None


def _what_is_odd(spelling: Spelling, match: re.Match[str]) -> tuple[str, str | None]:
    """What a name is, and who reads it: nobody if it is not quite that either."""
    odd = []
    if not spelling.is_own and match["factor"] not in ("lora_A", "lora_B"):
        odd.append("lora_down and lora_up for lora_A and lora_B")
    if match["adapter"]:
        odd.append(f"an adapter's name ({match['adapter'][1:]})")
    if not spelling.is_own and match["projection"] == "out" and not match["zero"]:
        odd.append("to_out for to_out.0")
    if not odd:
        return spelling.names, spelling.reader
    return " and ".join(odd if spelling is SPELLINGS[0] else [spelling.names, *odd]), None
