"""How programs name the tensors of a LoRA: rows of names, a style of factors, a prefix.

A key is `prefix` + the module's name + the part's word: `transformer.` + `transformer_blocks.0.attn1.to_q` +
`lora_A.weight`. Each of the three is a table, and keys are made and read by the same tables:

    Names       what a program calls the modules
    Style       what it calls lora_A, lora_B and the other parts
    Spelling    names, style and prefix together: all that it takes to make a key, and to read one
    LoraLayout  the spelling that a program's own LoRAs have, its file's name, and where that states its scale

Real files mix these: diffusers' names under another program's prefix, an adapter's name in the middle of a key. So
`read_key` takes a key apart whatever stands before it, and `Spelling` says what was found.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

from cogtools.layouts.family import BESIDE_LAYERS, IN_LAYERS, LAYER_NUMBER, LoraKey, Module

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

ScalePlace = Literal["header", "adapter_config", "alpha_tensors", "training_config", "nowhere"]
"""Where a layout states its scale: in an entry of the file's header, in adapter_config.json or training_config.yaml
beside the file, in a tensor per module, or not at all."""


Container = Literal["safetensors", "torch"]
"""What kind of file a layout's tensors are in: a safetensors file, or a zip file of torch.save."""


@dataclass(frozen=True, eq=False)  # a table is itself: compared and hashed by identity
class Names:
    """What a program calls the modules.

    Attributes:
        title: whose names they are: "diffusers' names".
        layer: what stands before the name of a module in a layer, with {} for its number.
        rows: the names, by cogtools' own; a module that is not in it has no name here.
    """

    title: str
    layer: str
    rows: Mapping[str, str]

    def with_underscores(self, title: str) -> Names:
        """The same names, with underscores for the dots."""
        rows = {name: row.replace(".", "_") for name, row in self.rows.items()}
        return Names(title, self.layer.replace(".", "_"), rows)

    def path(self, module: Module) -> str | None:
        """A module's name; None if it has none here."""
        row = self.rows.get(module.name)
        if row is None or module.layer is None:
            return row
        return self.layer.format(module.layer) + row

    def parse(self, path: str) -> Module | None:
        """The module that a name is of, matched as a whole; None if none."""
        found = self.find(path)
        return found[1] if found is not None and not found[0] else None

    def find(self, path: str) -> tuple[str, Module] | None:
        """What stands before a module's name at the end of a path, and the module; None if the path ends otherwise."""
        # The plain tests first: most paths are no name of most tables.
        if path.endswith(self._ends[True]) and self.layer.partition("{}")[0] in path:
            match = self._in_layer.fullmatch(path)
            if match is not None:
                return match[1], Module(int(match["layer"]), self._by_row[True, match["row"]])
        if path.endswith(self._ends[False]):
            match = self._beside.fullmatch(path)
            if match is not None:
                return match[1], Module(None, self._by_row[False, match["row"]])
        return None

    @cached_property
    def _ends(self) -> dict[bool, tuple[str, ...]]:
        """The names, by whether the module is in a layer."""
        return {
            in_layers: tuple(self.rows[name] for name in names if name in self.rows)
            for in_layers, names in ((True, IN_LAYERS), (False, BESIDE_LAYERS))
        }

    @cached_property
    def _by_row(self) -> dict[tuple[bool, str], str]:
        return {(name in IN_LAYERS, row): name for name, row in self.rows.items()}

    @cached_property
    def _in_layer(self) -> re.Pattern[str]:
        before, after = map(re.escape, self.layer.split("{}"))
        return self._at_the_end(rf"{before}(?P<layer>{LAYER_NUMBER}){after}", IN_LAYERS)

    @cached_property
    def _beside(self) -> re.Pattern[str]:
        return self._at_the_end("", BESIDE_LAYERS)

    def _at_the_end(self, before: str, names: tuple[str, ...]) -> re.Pattern[str]:
        """Names at the end of a path, after nothing or after something that a dot or an underscore ends."""
        end = re.escape("." if "." in self.layer else "_")
        return re.compile(rf"((?:.*?{end})?){before}(?P<row>{self._alternatives(names)})", re.ASCII | re.DOTALL)

    def _alternatives(self, names: tuple[str, ...]) -> str:
        rows = sorted((self.rows[name] for name in names if name in self.rows), key=len, reverse=True)
        return "|".join(map(re.escape, rows)) or "(?!)"


@dataclass(frozen=True, eq=False)  # a table is itself: compared and hashed by identity
class Style:
    """What a program calls the parts of a module's adapter.

    Attributes:
        title: what sets it apart: "lora_down and lora_up".
        words: by part; the first two are the factors.
        before_index: whether the word stands before the last segment of the module's name, as SAT has it.
    """

    title: str
    words: Mapping[str, str]
    before_index: bool = False

    def key(self, path: str, part: str, adapter: str = "") -> str:
        """The key of a part of the module of this path."""
        word = self.words[part]
        if self.before_index:
            stem, _, index = path.rpartition(".")
            return f"{stem}.{word}.{index}"
        if adapter:
            stem, dot, end = word.rpartition(".")
            return f"{path}.{stem}.{adapter}.{end}" if dot else f"{path}.{word}.{adapter}"
        return f"{path}.{word}"

    def parse(self, key: str) -> tuple[str, str, str] | None:
        """The module's path, the part and the adapter's name ("" if none is there); None if it is another style's."""
        if not any(stem in key for stem in self._stems):  # the plain test first
            return None
        match = self._pattern.fullmatch(key)
        if match is None:
            return None
        if self.before_index:
            return f"{match['path']}.{match['index']}", self._by_word[match["word"]], ""
        part = self._by_word.get(match["word"] + (match["end"] or ""))
        return None if part is None else (match["path"], part, match["adapter"] or "")

    @cached_property
    def _by_word(self) -> dict[str, str]:
        """The parts by their words; `.weight` may be missing."""
        short = {word.removesuffix(".weight"): part for part, word in self.words.items()}
        return (
            short
            | {word: part for part, word in self.words.items()}
            | {f"{word}.weight": short[word] for word in short}
        )

    @cached_property
    def _stems(self) -> frozenset[str]:
        return frozenset(word.removesuffix(".weight").removesuffix(".bias") for word in self.words.values())

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        if self.before_index:
            words = "|".join(map(re.escape, self.words.values()))
            return re.compile(rf"(?P<path>.+)\.(?P<word>{words})\.(?P<index>\d)", re.ASCII | re.DOTALL)
        listed = "|".join(map(re.escape, sorted(self._stems, key=len, reverse=True)))
        adapter = r"(?:\.(?!(?:weight|bias)$)(?P<adapter>\w+))?"
        return re.compile(
            rf"(?P<path>.+?)[._](?P<word>{listed}){adapter}(?P<end>\.weight|\.bias)?", re.ASCII | re.DOTALL
        )


PEFT_STYLE = Style(
    "lora_A and lora_B",
    {
        "A": "lora_A.weight",
        "B": "lora_B.weight",
        "bias": "lora_B.bias",
        "magnitude": "lora_magnitude_vector",
        "alpha": "alpha",
    },
)
KOHYA_STYLE = Style(
    "lora_down and lora_up",
    {"A": "lora_down.weight", "B": "lora_up.weight", "alpha": "alpha", "magnitude": "dora_scale"},
)
SAT_STYLE = Style("matrix_A and matrix_B", {"A": "matrix_A", "B": "matrix_B"}, before_index=True)
OLD_DIFFUSERS_STYLE = Style("lora.down and lora.up", {"A": "lora.down.weight", "B": "lora.up.weight"})
LINEAR_LAYER_STYLE = Style(
    "lora_linear_layer.down and lora_linear_layer.up",
    {"A": "lora_linear_layer.down.weight", "B": "lora_linear_layer.up.weight"},
)
STYLES = (SAT_STYLE, PEFT_STYLE, KOHYA_STYLE, OLD_DIFFUSERS_STYLE, LINEAR_LAYER_STYLE)
"""Every style, in the order in which a key is held against them: an alpha, which several have, is PEFT's style."""


class Spelling(NamedTuple):
    """All that it takes to make a key, and to read one.

    Attributes:
        names: what the modules are called.
        style: what the parts are called.
        prefix: what stands before a module's name.
        adapter: the name of an adapter in the middle of a key; "" if there is none.
    """

    names: Names
    style: Style
    prefix: str
    adapter: str = ""

    def key(self, key: LoraKey) -> str | None:
        """The key of a tensor; None if its module or its part has no name here."""
        path = self.names.path(key.module)
        if path is None or key.part not in self.style.words:
            return None
        return self.prefix + self.style.key(path, key.part, "" if key.part == "alpha" else self.adapter)

    def parse(self, key: str) -> LoraKey | None:
        """Which tensor a key is of, matched as a whole; None if none."""
        if not key.startswith(self.prefix):
            return None
        found = self.style.parse(key[len(self.prefix) :])
        if found is None or (found[2] != self.adapter and found[1] != "alpha"):
            return None
        module = self.names.parse(found[0])
        name = None if module is None else LoraKey(*module, found[1])
        return name if name is not None and self.key(name) == key else None


class Usage(NamedTuple):
    """How a program loads a file of its layout.

    In the lines, {path}, {folder} and {name} stand for the file as literals of Python, {weight} for the strength,
    {rank} and {alpha} for what the user has to state.

    Attributes:
        advice: what to do, in a sentence that ends with a colon.
        lines: how it is done.
        unscaled: lines that follow where the file does not carry its scale; () if {weight} is in the others.
        whole: advice and lines for a file that has the base weights too.
    """

    advice: str
    lines: tuple[str, ...]
    unscaled: tuple[str, ...] = ()
    whole: tuple[str, tuple[str, ...]] | None = None


@dataclass(frozen=True, eq=False)  # a table is itself: compared and hashed by identity
class LoraLayout:
    """How one program's LoRAs are laid out.

    Attributes:
        name: its name on the command line and in reports.
        reader: the program that loads such a file.
        written: how keys are spelled in what cogtools writes.
        scale: where it states its scale.
        usage: how its reader loads a file.
        unstated_scaling: what its reader multiplies lora_B @ lora_A by where nothing is stated; None if it then
            loads nothing.
        unstated_alpha: what its reader takes for alpha there, so that the scaling is that over the rank; None if it
            knows no alpha of its own.
        path: where its reader looks for the file in a folder; None if it takes any name.
        is_folder: whether the file is not enough, and others lie beside it.
        beside: these files: their names, and what is always in them; None for one that states the scale.
        container: what kind of file it is.
        also_read: other spellings that its reader loads, as `written` but for what is replaced.
        parts: the tensors of a module that its reader applies.
        ignores_alphas: whether its reader passes over tensors of alphas, where it does not take them.
        reads_convolutions: whether its reader applies a LoRA of four dimensions: that of the patch embedding of the
            1.0 models.
        always: the kinds of modules that its trainer always adapts; () if any.
        one_rank: whether all modules have one rank, and one alpha.
        library: the library that `verify --load` runs, where its reader is one.
        loads_base_weights: whether its reader loads base weights that lie among the LoRA, as PEFT's `bias` and
            `modules_to_save` put them there.
        only_size: the layers and the hidden size of the only model that its reader has; None if it has all.
        notes: what users of such a file should know.
        stated_note: the same, of a file that states its scale.
        lora_only_note: the same, of a file with nothing but the LoRA, where its reader takes it for a whole model.
    """

    name: str
    reader: str
    written: Spelling
    scale: ScalePlace
    usage: Usage
    unstated_scaling: float | None = 1.0
    unstated_alpha: float | None = None
    path: str | None = None
    is_folder: bool = False
    beside: Mapping[str, bytes | None] = field(default_factory=dict)
    container: Container = "safetensors"
    also_read: tuple[Spelling, ...] = ()
    parts: tuple[str, ...] = ("A", "B")
    ignores_alphas: bool = False
    reads_convolutions: bool = False
    always: tuple[str, ...] = ()
    one_rank: bool = False
    library: Literal["diffusers", "peft"] | None = None
    loads_base_weights: bool = False
    only_size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()
    stated_note: str | None = None
    lora_only_note: str | None = None

    @property
    def beside_content(self) -> dict[str, bytes]:
        """The files beside it whose content is always the same."""
        return {name: content for name, content in self.beside.items() if content is not None}

    @property
    def file_name(self) -> str | None:
        """The name that its reader looks for; None if it takes any."""
        return None if self.path is None else self.path.rpartition("/")[2]

    def key(self, key: LoraKey) -> str | None:
        """The key of a tensor as it is written; None if the layout has no place for it."""
        return self.written.key(key) if key.part in self.parts or key.part == "alpha" else None

    def parse(self, key: str) -> LoraKey | None:
        """Which tensor a key is of, spelled as it is written; None if none."""
        return self.written.parse(key)

    def reads(self, spelling: Spelling) -> bool:
        """Whether its reader loads keys that are spelled so."""
        return spelling == self.written or spelling in self.also_read

    def scaling_unstated(self, rank: int) -> float | None:
        """What its reader multiplies a module of this rank by where nothing is stated; None if it loads nothing."""
        return self.unstated_scaling if self.unstated_alpha is None else self.unstated_alpha / rank

    @property
    def title(self) -> str:
        """What its names are called: "diffusers' names"."""
        return self.written.names.title


LORA_SEGMENTS = frozenset(
    {"matrix_A", "matrix_B", "lora_A", "lora_B", "lora_down", "lora_up", "lora", "lora_linear_layer"}
    | {"lora_magnitude_vector", "dora_scale"}
)
"""A key with one of these segments belongs to a LoRA, whatever the rest of it is."""

_ALPHA_STARTS = ("lora_", "lycoris_", "diffusion_model.", "transformer.", "transformer_blocks.", "blocks.",
                 "base_model.model.")  # fmt: skip


class OtherAdapter(NamedTuple):
    """Another kind of adapter than a LoRA.

    Attributes:
        words: what one of the last segments of its keys begins with.
        name: what it is called.
        readers: who loads it.
    """

    words: tuple[str, ...]
    name: str
    readers: str


OTHER_ADAPTERS = (
    OtherAdapter(("lokr_",), "a LyCORIS LoKr", "lycoris (create_lycoris_from_weights, merge_to)"),
    OtherAdapter(("hada_",), "a LyCORIS LoHa", "lycoris (create_lycoris_from_weights, merge_to)"),
    OtherAdapter(("oft_", "boft_"), "an OFT adapter", "the library that trained it: lycoris or PEFT"),
    OtherAdapter(("diff", "diff_b"), "a full difference of weights", "ComfyUI"),
    OtherAdapter(("ia3_l",), "an IA3 adapter", "PEFT"),
    OtherAdapter(("vera_lambda",), "a VeRA adapter", "PEFT"),
)
"""Adapters that cogtools names but does not convert."""


def is_lora_key(key: str) -> bool:
    """Whether a key alone shows that it belongs to a LoRA of any kind, or to its alphas."""
    if "lora" not in key and "matrix_" not in key and "dora_scale" not in key:  # as good as always
        return key.endswith(".alpha") and key.startswith(_ALPHA_STARTS)
    return not LORA_SEGMENTS.isdisjoint(key.split(".")) or (key.endswith(".alpha") and key.startswith(_ALPHA_STARTS))


def lora_keys(keys: Collection[str]) -> list[str]:
    """Those of a state dict's keys that belong to a LoRA: an alpha does whose module has other tensors of one."""
    found = {key for key in keys if is_lora_key(key)}
    modules = {_before_lora_segment(key) for key in found}
    return [key for key in keys if key in found or (key.endswith(".alpha") and key.removesuffix(".alpha") in modules)]


def _before_lora_segment(key: str) -> str:
    segments = key.split(".")
    end = next((place for place, segment in enumerate(segments) if segment in LORA_SEGMENTS), 0)
    return ".".join(segments[:end])


def other_adapter(key: str) -> OtherAdapter | None:
    """The kind of adapter, other than a LoRA, that a key belongs to; None if none."""
    end = key.removesuffix(".weight").rpartition(".")[2]
    for adapter in OTHER_ADAPTERS:
        if any(end == word if not word.endswith("_") else end.startswith(word) for word in adapter.words):
            return adapter
    return None
