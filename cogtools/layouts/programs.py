"""The programs that load LoRAs of CogVideoX: which keys each reads, where it looks for the scale, how it fails.

A program may read a file in several ways; each is a row here. Some of its rules are about the whole file: a key that it
does not know may stop it, or one factor without the other.

Source: every row was measured by running the program's own loader, but for the versions of diffusers before 0.34 and
of VideoX-Fun before November 2025, which were read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from cogtools.layouts import comfyui, diffsynth, diffusers, peft, sat, videox_fun

if TYPE_CHECKING:
    from cogtools.layouts.lora import LoraLayout, ScalePlace, Spelling

ANY_KEY = re.compile("", re.DOTALL)
WITHOUT_LORA = re.compile("(?!.*lora)", re.DOTALL)


class Way(NamedTuple):
    """How a program reads a file.

    Attributes:
        spellings: how the keys that it reads are spelled.
        scale: where it looks for the scale.
        alphas: what it does with tensors of alphas.
        refused: the keys, of those that are not a LoRA's, that make it load nothing; None if it ignores all.
        lone: the factors that, without the other, make it load nothing.
        whole: whether it loads nothing unless it knows every tensor of the LoRA.
        without_weight: whether keys may lack `.weight`.
        wrapper: the keys under which the state dict has to lie; None if that does not matter.
        note: what users of the program should know of a file that it loads so.
    """

    spellings: tuple[Spelling, ...]
    scale: ScalePlace
    alphas: Literal["applied", "ignored", "refused"]
    refused: re.Pattern[str] | None = None
    lone: str = ""
    whole: bool = False
    without_weight: bool = False
    wrapper: tuple[str, ...] | None = None
    note: str | None = None


@dataclass(frozen=True, eq=False)
class Program:
    """A program that loads LoRAs.

    Attributes:
        name: what it is called, with the versions that this is about.
        layout: that of the files that cogtools makes for it.
        ways: how it reads a file.
        otherwise: what happens where it reads nothing.
        strength_step: the steps in which its users set the strength; 0 if any number can be set.
    """

    name: str
    layout: LoraLayout
    ways: tuple[Way, ...]
    otherwise: str
    strength_step: float = 0.0


def _spellings(layout: LoraLayout) -> tuple[Spelling, ...]:
    return (layout.written, *layout.also_read)


_NOT_MERGED = "it prints errors and goes on without the LoRA; a ValueError for a key that it does not know"
_DIFFUSERS = Way(_spellings(diffusers.LAYOUT), "header", "refused", WITHOUT_LORA)
_KOHYA = tuple(
    spelling
    for spelling in _spellings(videox_fun.LAYOUT)
    if spelling.names is videox_fun.NAMES and spelling.style is videox_fun.LAYOUT.written.style
)
_VIDEOX_FUN = Way(
    _spellings(videox_fun.LAYOUT),
    "alpha_tensors",
    "applied",
    ANY_KEY,
    "AB",
    note="set lora_weight to 1.0: its examples have 0.55",
)

PROGRAMS = (
    Program(
        "diffusers >= 0.34",
        diffusers.LAYOUT,
        (_DIFFUSERS,),
        "a warning, and the video is as without the LoRA; a ValueError for a key without 'lora' in it",
    ),
    Program(
        "diffusers < 0.34",
        diffusers.LAYOUT,
        (_DIFFUSERS._replace(scale="nowhere"),),
        "a warning, and the video is as without the LoRA; a ValueError for a key without 'lora' in it",
    ),
    Program(
        "PEFT",
        peft.LAYOUT,
        (
            Way(
                _spellings(peft.LAYOUT),
                "adapter_config",
                "ignored",
                note="diffusers loads it too, by load_lora_adapter(prefix='base_model.model'): at scaling 1 unless the "
                "file's header states the scale",
            ),
        ),
        "at most a warning about missing adapter keys",
    ),
    Program(
        "ComfyUI >= 0.20.1",
        comfyui.LAYOUT,
        (Way(_spellings(comfyui.LAYOUT), "alpha_tensors", "applied", lone="B", without_weight=True),),
        "lines 'lora key not loaded' in its log, and the video is as without the LoRA",
        strength_step=0.01,
    ),
    Program(
        "kijai's ComfyUI-CogVideoXWrapper",
        diffusers.LAYOUT,
        # It hands a file with lora_B in a key to diffusers, and merges any other itself.
        (
            _DIFFUSERS._replace(note="with diffusers older than 0.34 at scaling 1"),
            Way(_KOHYA, "alpha_tensors", "applied", ANY_KEY, "AB", whole=True),
        ),
        "an error",
        strength_step=0.0001,
    ),
    Program("VideoX-Fun", videox_fun.LAYOUT, (_VIDEOX_FUN,), _NOT_MERGED),
    Program(
        "VideoX-Fun before November 2025", videox_fun.LAYOUT, (_VIDEOX_FUN._replace(spellings=_KOHYA),), _NOT_MERGED
    ),
    Program(
        "DiffSynth-Studio <= 1.1.9",
        diffsynth.LAYOUT,
        (Way(_spellings(diffsynth.LAYOUT), "nowhere", "ignored", lone="B", whole=True),),
        "'Cannot load LoRA'; for lora_down and lora_up it reports success and changes nothing",
    ),
    Program(
        "SAT",
        sat.LAYOUT,
        (
            Way(
                (sat.LAYOUT.written,),
                "training_config",
                "ignored",
                wrapper=("module",),
                note="it takes r and lora_alpha from the yaml that it is started with",
            ),
        ),
        "nothing is printed: missing keys stay random",
    ),
)
"""In the order in which reports list them."""


class Trap(NamedTuple):
    """What is odd about a program and a file of some name.

    Attributes:
        program: the beginning of the program's name.
        word: what the file's path has in it, in lower case.
        loads: whether it is about a file that the program loads.
        text: what happens.
    """

    program: str
    word: str
    loads: bool
    text: str


TRAPS = (
    Trap("kijai", "orbit", True, "'orbit' in the path: with fuse on, it multiplies by 1/rank once more"),
    Trap("kijai", "dimensionx", True, "'dimensionx' in the path: with fuse on, it multiplies by 1/rank once more"),
    Trap("ComfyUI", "compatible_with_comfyui", False, "VideoX-Fun's name for it is wrong: ComfyUI cannot read it"),
)


class Loser(NamedTuple):
    """A trainer whose files do not state the scale that it trained with."""

    name: str
    scaling: str


LOSERS = (
    Loser("CogVideo's finetune", "0.5"),
    Loser("VideoX-Fun with --use_peft_lora", "0.5"),
    Loser("SAT's own exporter", "1/rank"),
)
"""Trainers whose files lose the scale, and the scaling that their defaults give."""
