"""Which LoRA and which transformer keys belong to: every table of names, asked in one place."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from cogtools.formatting import shown
from cogtools.layouts import comfyui, diffsynth, diffusers, peft, sat, videox_fun
from cogtools.layouts.family import LoraKey
from cogtools.layouts.lora import STYLES, LoraLayout, Spelling

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cogtools.layouts.family import Transformer
    from cogtools.layouts.lora import Names, Style

LAYOUTS = (sat.LAYOUT, diffusers.LAYOUT, peft.LAYOUT, comfyui.LAYOUT, videox_fun.LAYOUT, diffsynth.LAYOUT)
"""Every layout of a LoRA, in the order in which a key that several could have made is given to them."""

BY_NAME = {layout.name: layout for layout in LAYOUTS}

_NAMES = (
    sat.NAMES,
    diffusers.NAMES,
    videox_fun.NAMES,
    comfyui.NAMES,
    comfyui.UNDERSCORES,
    diffsynth.NAMES,
)
_ODD_NAMES = (diffusers.NAMES_WITHOUT_ZERO, videox_fun.NAMES_WITHOUT_ZERO, diffsynth.NAMES_WITH_ZERO)


class KeyReading(NamedTuple):
    """What a key was found to be.

    Attributes:
        name: the tensor.
        spelling: how it is spelled.
        is_exact: whether that spelling makes this very key; false where it lacks `.weight`, for one.
    """

    name: LoraKey
    spelling: Spelling
    is_exact: bool

    @property
    def layout(self) -> LoraLayout | None:
        """The layout that it is spelled for: that which writes such keys, else the first that reads them."""
        return layout_of(self.spelling) if self.is_exact else None

    @property
    def oddity(self) -> str:
        """What the key is called: whose names, and what else sets it apart from theirs."""
        return _oddity(self)


class LoraNames(NamedTuple):
    """How the keys of a LoRA are spelled.

    Attributes:
        readings: what each key is that could be read.
        spelling: of most of them.
    """

    readings: dict[str, KeyReading]
    spelling: Spelling


def read_names(keys: Iterable[str]) -> LoraNames | None:
    """Read the keys of a LoRA, in whatever layout, whatever stands before the modules' names; None if none is known.

    Some names are those of several programs. Those count that fit most of the keys; of two that fit as many, those
    that a program reads with what stands before them.
    """
    parsed = [found for key in keys if (found := _parse(key)) is not None]
    for tables in (_NAMES, _ODD_NAMES):
        votes = Counter({names: sum(_vote(names, found) for found in parsed) for names in tables})
        chosen, most = votes.most_common(1)[0]  # the first of equals
        if most:
            break
    else:
        return None
    readings: dict[str, KeyReading] = {}
    for found in parsed:
        for names in (chosen, *_ODD_NAMES):
            place = names.find(found.path)
            if place is not None:
                spelling = Spelling(names, found.style, place[0], found.adapter)
                name = LoraKey(*place[1], found.part)
                readings[found.key] = KeyReading(name, spelling, spelling.key(name) == found.unwrapped)
                break
    spellings = Counter(reading.spelling for reading in readings.values() if reading.name.part in ("A", "B"))
    if not spellings:
        return None
    return LoraNames(readings, spellings.most_common(1)[0][0])


class _Parsed(NamedTuple):
    """A key taken apart, before it is known whose names it has."""

    key: str
    unwrapped: str
    style: Style
    path: str
    part: str
    adapter: str


_OTHER_PARTS = ("text_encoder", "lora_te", "vae.", "lora_vae")
"""How keys begin that belong to another part of a pipeline than its transformer."""


def _parse(key: str) -> _Parsed | None:
    unwrapped = sat.unwrapped_key(key)
    if unwrapped.startswith(_OTHER_PARTS):
        return None
    for style in STYLES:
        found = style.parse(unwrapped)
        if found is not None:
            return _Parsed(key, unwrapped, style, *found)
    return None


def _vote(names: Names, found: _Parsed) -> int:
    """How much a key tells for a table of names: more, if a program reads what stands before them."""
    place = None if found.part == "alpha" else names.find(found.path)
    if place is None:
        return 0
    return 2 if layout_of(Spelling(names, found.style, place[0], found.adapter)) is None else 3


@lru_cache(maxsize=1000)  # a hostile file has spellings without end
def layout_of(spelling: Spelling) -> LoraLayout | None:
    """The layout that has keys spelled so: that which writes them, else the first whose program reads them."""
    for layout in LAYOUTS:
        if layout.written == spelling:
            return layout
    return next((layout for layout in LAYOUTS if layout.reads(spelling)), None)


def layout_of_names(spelling: Spelling) -> LoraLayout | None:
    """The layout whose names these are, whatever the rest of the spelling is."""
    return layout_of(spelling) or next(
        (layout for layout in LAYOUTS if spelling.names in (layout.written.names, *_names_read(layout))), None
    )


def _names_read(layout: LoraLayout) -> list[Names]:
    return [spelling.names for spelling in layout.also_read]


_PREFIXES = {
    "": "without a prefix",
    diffusers.PREFIX: "after diffusers' prefix",
    peft.PREFIX: "after PEFT's prefix",
    comfyui.PREFIX: "after ComfyUI's prefix",
    diffusers.PREFIX + peft.PREFIX: "after diffusers' and PEFT's prefixes",
    peft.PREFIX + diffusers.PREFIX: "after PEFT's and diffusers' prefixes",
}


def _oddity(reading: KeyReading) -> str:
    names, style, prefix, adapter = reading.spelling
    layout = layout_of_names(reading.spelling)
    own = layout.written if layout is not None else reading.spelling
    words = ["PEFT's names" if layout is peft.LAYOUT else names.title]
    if names not in (own.names, comfyui.UNDERSCORES):  # diffusers' names, which VideoX-Fun reads too
        own = diffusers.LAYOUT.written
    if prefix != own.prefix and names is not comfyui.UNDERSCORES:
        words.append(_PREFIXES.get(prefix, f"after an unknown prefix {shown(prefix)}"))
    if style != own.style and names is not comfyui.UNDERSCORES:
        words.append(f"with {style.title} for {own.style.title}")
    if adapter != own.adapter:
        words.append(f"with an adapter's name ({adapter})" if adapter else "without an adapter's name")
    if not reading.is_exact:
        words.append("without .weight")
    return " ".join(words)


def recognise_transformer(shapes: Mapping[str, tuple[int, ...]]) -> Transformer | None:
    """The transformer whose base weights, in diffusers' or SAT's layout, are among these shapes; None if none are."""
    known = diffusers.recognise_transformer(shapes)
    if known is not None:
        return known
    hidden = sat.hidden_size(shapes)
    return None if hidden is None else sat.recognise_transformer(shapes, hidden)
