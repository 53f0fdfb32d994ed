"""Damaged LoRA files, each made from a good one, and what is to be said of them.

``DAMAGES`` is a table: how the file is damaged, which check of ``verify`` must find it, and what diffusers
alone does with it. ``GOOD`` holds harmless variants, of which nothing may complain. What diffusers does was
measured with diffusers 0.42.1 and peft 0.21.2 on ``good_lora()``, 12 modules at scaling 0.25; test_damage.py
measures it again. Any good LoRA file of 2 layers or more can be damaged in the same ways.

``python -m tests.support.damage`` prints the table as Markdown.
"""

import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
PREFIX = "transformer."
ADAPTER_KEY = "lora_adapter_metadata"
RECORD_KEY = "cogtools"
DTYPE_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}

Floats = NDArray[np.float32]


# --- safetensors, read and written without a library, so that wrong files can be written too ------


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: its dtype as the header names it, its shape, its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass
class LoraFile:
    """The tensors of a safetensors file in the order of their bytes, and its ``__metadata__``."""

    tensors: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        """The numbers of the layers that have tensors, ascending."""
        return sorted({int(key.split(".")[2]) for key in self.tensors})

    @property
    def adapter(self) -> dict[str, Any]:
        """What ``lora_adapter_metadata`` says (a copy)."""
        stated: dict[str, Any] = json.loads(self.metadata[ADAPTER_KEY])
        return stated

    @property
    def rank(self) -> int:
        return int(self.adapter[PREFIX + "r"])

    @property
    def alpha(self) -> float:
        return float(self.adapter[PREFIX + "lora_alpha"])


def split(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Split a safetensors file into its header and the tensors' bytes."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def join(header: str, data: bytes) -> bytes:
    """Join a header and the tensors' bytes; nothing is checked."""
    encoded = header.encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def read(path: Path) -> LoraFile:
    """Read a good safetensors file."""
    header, data = split(path.read_bytes())
    metadata = header.pop("__metadata__", {})
    rows = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    tensors = {key: Entry(row["dtype"], tuple(row["shape"]), data[slice(*row["data_offsets"])]) for key, row in rows}
    return LoraFile(tensors, metadata)


def write(path: Path, file: LoraFile) -> None:
    """Write a safetensors file, tensors in the order given."""
    header: dict[str, Any] = {"__metadata__": file.metadata} if file.metadata else {}
    end = 0
    for key, entry in file.tensors.items():
        begin, end = end, end + len(entry.data)
        header[key] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
    path.write_bytes(join(json.dumps(header), b"".join(entry.data for entry in file.tensors.values())))


def decode(entry: Entry) -> Floats:
    """Give a tensor's values in fp32, which holds fp16 and bf16 exactly."""
    if entry.dtype == "BF16":
        bits = np.frombuffer(entry.data, "<u2").astype(np.uint32) << 16
        return bits.view(np.float32).reshape(entry.shape)
    return np.frombuffer(entry.data, {"F16": "<f2", "F32": "<f4"}[entry.dtype]).astype(np.float32).reshape(entry.shape)


def encode(values: Floats, dtype: str) -> Entry:
    """Round values to a dtype, ties to even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        data = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    else:
        data = values.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()
    return Entry(dtype, values.shape, data)


# --- the good file --------------------------------------------------------------------------------


def key(layer: int, projection: str, part: str) -> str:
    """Name a LoRA tensor as diffusers does; part is "A" or "B"."""
    return f"{PREFIX}transformer_blocks.{layer}.attn1.{projection}.lora_{part}.weight"


def modules(layers: list[int]) -> list[str]:
    """The full paths of the modules that a LoRA of these layers targets."""
    return [f"transformer_blocks.{layer}.attn1.{name}" for layer in layers for name in PROJECTIONS]


def adapter_metadata(layers: list[int], rank: int, alpha: float) -> dict[str, Any]:
    """State rank, alpha and modules as diffusers reads them."""
    stated = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": modules(layers),
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
        "lora_bias": False,
    }
    return {PREFIX + name: value for name, value in stated.items()}


def good_lora(*, layers: int = 3, hidden: int = 128, rank: int = 4, alpha: float = 1, dtype: str = "F16") -> LoraFile:
    """Make a good LoRA in memory: trained-looking values, every tensor different, scale stated."""
    random = np.random.default_rng(0)
    shapes = {"A": (rank, hidden), "B": (hidden, rank)}
    keys = sorted(
        (key(layer, projection, part), part) for layer in range(layers) for projection in PROJECTIONS for part in "AB"
    )
    tensors = {name: encode(random.normal(0, 0.05, shapes[part]).astype(np.float32), dtype) for name, part in keys}
    stated = adapter_metadata(list(range(layers)), rank, alpha)
    record = {
        "version": "0.1.0",
        "source": "mp_rank_00_model_states.pt",
        "iteration": 1000,
        "models": [],
        "transformer_layers": layers,
        "hidden_size": hidden,
        "rank": rank,
        "alpha": alpha,
        "alpha_source": "default",
        "scale": "metadata",
        "source_dtype": DTYPE_NAMES[dtype],
        "dtype": DTYPE_NAMES[dtype],
    }
    return LoraFile(tensors, {"format": "pt", ADAPTER_KEY: json.dumps(stated), RECORD_KEY: json.dumps(record)})


def save_as_checkpoint(file: LoraFile, path: Path) -> Path:
    """Save a LoRA file's tensors as the checkpoint that it could have been exported from."""
    renamed = LoraFile(dict(file.tensors), file.metadata)
    sat_names(renamed)
    state_dict = {
        name: torch.frombuffer(bytearray(entry.data), dtype=TORCH_DTYPES[entry.dtype]).reshape(entry.shape)
        for name, entry in renamed.tensors.items()
    }
    torch.save({"module": state_dict}, path)
    return path


# --- how to damage --------------------------------------------------------------------------------

Apply = Callable[[Path, Path], None]
"""Reads the good file at the first path and writes another at the second."""

Edit = Callable[[LoraFile], object]
"""Changes a file in place."""


def by_bytes(damaged: Callable[[bytes], bytes]) -> Apply:
    def apply(good: Path, target: Path) -> None:
        target.write_bytes(damaged(good.read_bytes()))

    return apply


def by_header(edit: Callable[[dict[str, Any]], object]) -> Apply:
    """Edit the header and leave the tensors' bytes as they are."""

    def apply(good: Path, target: Path) -> None:
        header, data = split(good.read_bytes())
        edit(header)
        target.write_bytes(join(json.dumps(header), data))

    return apply


def by_file(*edits: Edit) -> Apply:
    """Edit tensors and metadata, and write a safetensors file that is valid as such."""

    def apply(good: Path, target: Path) -> None:
        file = read(good)
        for edit in edits:
            edit(file)
        write(target, file)

    return apply


def lengthen_header(good: bytes) -> bytes:
    return len(good).to_bytes(8, "little") + good[8:]


def cut_brace(good: bytes) -> bytes:
    header, data = split(good)
    return join(json.dumps(header)[:-1], data)


def overlap(header: dict[str, Any]) -> None:
    """Give q's A of layer 1 the place of k's."""
    header[key(1, "to_q", "A")]["data_offsets"] = header[key(1, "to_k", "A")]["data_offsets"]


def key_twice(good: bytes) -> bytes:
    """List q's A of layer 1 with the place of k's too, first: a reader that keeps the last sees nothing."""
    header, data = split(good)
    row = json.dumps(header[key(1, "to_k", "A")])
    return join("{" + json.dumps(key(1, "to_q", "A")) + ":" + row + "," + json.dumps(header)[1:], data)


def scale_twice(good: bytes) -> bytes:
    """State the adapter a second time, with alpha = rank."""
    header, data = split(good)
    metadata = header.pop("__metadata__")
    adapter = json.loads(metadata[ADAPTER_KEY])
    adapter[PREFIX + "lora_alpha"] = adapter[PREFIX + "r"]
    second = json.dumps({ADAPTER_KEY: json.dumps(adapter)})
    twice = json.dumps(metadata)[:-1] + "," + second[1:]
    return join('{"__metadata__":' + twice + "," + json.dumps(header)[1:], data)


def drop(*parts: str) -> Edit:
    """Drop the tensors whose key holds one of these parts."""

    def edit(file: LoraFile) -> None:
        for name in list(file.tensors):
            if any(part in name for part in parts):
                del file.tensors[name]

    return edit


def drop_layers(chosen: Callable[[list[int]], list[int]]) -> Edit:
    def edit(file: LoraFile) -> None:
        drop(*(f".{layer}.attn1." for layer in chosen(file.layers)))(file)

    return edit


def rename(new_name: Callable[[str], str]) -> Edit:
    def edit(file: LoraFile) -> None:
        file.tensors = {new_name(name): entry for name, entry in file.tensors.items()}

    return edit


def prefix(new: str) -> Edit:
    """Put another prefix in the place of ``transformer.``."""
    return rename(lambda name: new + name.removeprefix(PREFIX))


def exchange(one: str, other: str) -> Edit:
    """Exchange two parts of the keys, and so the tensors."""
    return rename(lambda name: name.replace(one, other) if one in name else name.replace(other, one))


def sat_names(file: LoraFile) -> None:
    """Give the tensors the names that they have in SAT."""
    places = {
        "to_q": ("query_key_value", 0),
        "to_k": ("query_key_value", 1),
        "to_v": ("query_key_value", 2),
        "to_out": ("dense", 0),
    }

    def sat_name(name: str) -> str:
        _, _, layer, _, projection, *_ = name.split(".")
        module, part = places[projection]
        matrix = "matrix_A" if "lora_A" in name else "matrix_B"
        return f"model.diffusion_model.transformer.layers.{layer}.attention.{module}.{matrix}.{part}"

    rename(sat_name)(file)


def comfyui_names(file: LoraFile) -> None:
    """Give the tensors the names that they have in ComfyUI's own CogVideoX."""
    modules = {"attn1.to_q": "q", "attn1.to_k": "k", "attn1.to_v": "v", "attn1.to_out.0": "attn_out"}

    def comfyui_name(name: str) -> str:
        for module, other in modules.items():
            name = name.replace(f".{module}.", f".{other}.")
        return name.replace(f"{PREFIX}transformer_blocks.", "diffusion_model.blocks.")

    rename(comfyui_name)(file)


def kohya_names(file: LoraFile) -> None:
    """Give the tensors the names that VideoX-Fun reads, and every module its alpha."""
    alpha = encode(np.full((), file.alpha, np.float32), "F32")
    kohya = {module: "lora_unet__" + module.replace(".", "_") for module in modules(file.layers)}

    def kohya_name(name: str) -> str:
        module, _, factor = name.removeprefix(PREFIX).partition(".lora_")
        return f"{kohya[module]}.lora_{'down' if factor[0] == 'A' else 'up'}.weight"

    rename(kohya_name)(file)
    file.tensors |= {f"{module}.alpha": alpha for module in kohya.values()}


def diffsynth_names(file: LoraFile) -> None:
    """Give the tensors the names that DiffSynth-Studio reads."""
    rename(lambda name: name.removeprefix(f"{PREFIX}transformer_").replace(".to_out.0.", ".to_out."))(file)


def alter(altered: Callable[[Floats], Floats], *parts: str) -> Edit:
    """Alter the values of the tensors whose key holds all these parts; the dtype stays."""

    def edit(file: LoraFile) -> None:
        for name, entry in file.tensors.items():
            if all(part in name for part in parts):
                file.tensors[name] = encode(altered(decode(entry)), entry.dtype)

    return edit


def put(value: float) -> Callable[[Floats], Floats]:
    """Put one value in the first place."""

    def altered(values: Floats) -> Floats:
        values = values.copy()
        values.flat[0] = value
        return values

    return altered


def cast(dtype: str) -> Edit:
    def edit(file: LoraFile) -> None:
        file.tensors = {name: encode(decode(entry), dtype) for name, entry in file.tensors.items()}

    return edit


def cast_elsewhere(part: str) -> Edit:
    """Cast the tensors whose key holds a part to bf16; from bf16 to fp16."""

    def edit(file: LoraFile) -> None:
        for name, entry in file.tensors.items():
            if part in name:
                file.tensors[name] = encode(decode(entry), "F16" if entry.dtype == "BF16" else "BF16")

    return edit


def flip_lowest_bit(file: LoraFile) -> None:
    """Flip the lowest bit of the first value of layer 1's v, lora_B."""
    name = key(1, "to_v", "B")
    entry = file.tensors[name]
    file.tensors[name] = Entry(entry.dtype, entry.shape, bytes([entry.data[0] ^ 1]) + entry.data[1:])


def fold(file: LoraFile) -> None:
    """Multiply every B by alpha / rank."""
    scaling = np.float32(file.alpha / file.rank)
    alter(lambda values: values * scaling, "lora_B")(file)


def halve_hidden(file: LoraFile) -> None:
    alter(lambda values: values[:, : values.shape[1] // 2], "lora_A")(file)
    alter(lambda values: values[: len(values) // 2], "lora_B")(file)


def lower_rank(file: LoraFile) -> None:
    """Leave out one row of A and one column of B, of layer 1's q."""
    alter(lambda values: values[:-1], key(1, "to_q", "A"))(file)
    alter(lambda values: values[:, :-1], key(1, "to_q", "B"))(file)


def state_lower_rank(file: LoraFile) -> None:
    """State the rank that ``lower_rank`` leaves, and the alpha with which the scaling stays."""
    rank = file.rank - 1
    name = "transformer_blocks.1.attn1.to_q"
    state(rank_pattern={name: rank}, alpha_pattern={name: file.alpha / file.rank * rank})(file)


def double_rank(file: LoraFile) -> None:
    """Double rank and alpha: another LoRA of the same scaling."""
    alter(lambda values: np.concatenate([values, -values[::-1]]), "lora_A")(file)
    alter(lambda values: np.concatenate([values, values], axis=1), "lora_B")(file)
    state(r=2 * file.rank, lora_alpha=2 * file.alpha)(file)


def copy(new_name: Callable[[str], str], *parts: str) -> Edit:
    """Add copies under other keys of the tensors whose key holds all these parts."""

    def edit(file: LoraFile) -> None:
        chosen = {name: entry for name, entry in file.tensors.items() if all(part in name for part in parts)}
        file.tensors |= {new_name(name): entry for name, entry in chosen.items()}

    return edit


def add_layer(file: LoraFile) -> None:
    """Add a layer after the last one."""
    last = file.layers[-1]
    copy(lambda name: name.replace(f".{last}.attn1.", f".{last + 1}.attn1."), f".{last}.attn1.")(file)


def add_alphas(file: LoraFile) -> None:
    """Add the scalar that ComfyUI and kohya's tools read: ``<module>.alpha``."""
    alpha = encode(np.full((), file.alpha, np.float32), "F32")
    file.tensors |= {f"{PREFIX}{module}.alpha": alpha for module in modules(file.layers)}


FEED_FORWARD = "ff.net.0.proj"


def add_feed_forward(*layers: int) -> Edit:
    """Add a LoRA for the first feed-forward projection of these layers, which SAT never trains."""

    def edit(file: LoraFile) -> None:
        for layer in layers:
            name = f"{PREFIX}transformer_blocks.{layer}.{FEED_FORWARD}.lora_"
            narrow, wide = file.tensors[key(layer, "to_q", "A")], file.tensors[key(layer, "to_q", "B")]
            file.tensors[name + "A.weight"] = narrow
            file.tensors[name + "B.weight"] = encode(np.concatenate([decode(wide)] * 4), wide.dtype)

    return edit


def add_biases(file: LoraFile) -> None:
    """Add a bias to every lora_B, as PEFT's ``lora_bias`` does."""
    file.tensors |= {
        name.replace(".weight", ".bias"): encode(decode(entry)[:, 0], entry.dtype)
        for name, entry in file.tensors.items()
        if "lora_B" in name
    }


def add_magnitudes(file: LoraFile) -> None:
    """Add DoRA's magnitude vector to every module."""
    file.tensors |= {
        name.replace("lora_B.weight", "lora_magnitude_vector"): encode(abs(decode(entry)[:, 0]), entry.dtype)
        for name, entry in file.tensors.items()
        if "lora_B" in name
    }


def forget(file: LoraFile) -> None:
    """Leave out ``__metadata__``."""
    file.metadata = {}


def unrecord(file: LoraFile) -> None:
    """Leave out what cogtools says of how it wrote the file, as in a file that another program wrote."""
    file.metadata.pop(RECORD_KEY, None)


def restate(restated: Callable[[dict[str, Any]], object]) -> Edit:
    """Put something made of it in the place of ``lora_adapter_metadata``; text as it is, the rest as JSON."""

    def edit(file: LoraFile) -> None:
        new = restated(file.adapter)
        file.metadata[ADAPTER_KEY] = new if isinstance(new, str) else json.dumps(new)

    return edit


def state(**changes: object) -> Edit:
    """State something more, or something else, in ``lora_adapter_metadata``."""
    return restate(lambda stated: stated | {PREFIX + name: value for name, value in changes.items()})


def unprefix_adapter(file: LoraFile) -> None:
    restate(lambda stated: {name.removeprefix(PREFIX): value for name, value in stated.items()})(file)


def unstate(name: str) -> Edit:
    """Leave something out of ``lora_adapter_metadata``."""
    return restate(lambda stated: {key: value for key, value in stated.items() if key != PREFIX + name})


def state_target_modules(file: LoraFile) -> None:
    """State the modules that the file has."""
    state(target_modules=modules(file.layers))(file)


def state_feed_forward(*layers: int) -> Edit:
    """State the modules of the attention, and the first feed-forward projection of these layers."""

    def edit(file: LoraFile) -> None:
        wide = [f"transformer_blocks.{layer}.{FEED_FORWARD}" for layer in layers]
        state(target_modules=[*modules(file.layers), *wide])(file)

    return edit


def reverse_metadata(file: LoraFile) -> None:
    restate(lambda stated: dict(reversed(stated.items())))(file)
    file.metadata = dict(reversed(file.metadata.items()))


def reverse_tensors(file: LoraFile) -> None:
    file.tensors = dict(reversed(file.tensors.items()))


# --- the table ------------------------------------------------------------------------------------

Verdict = Literal["pass", "warn", "fail", "error"]
Check = Literal[
    "readable",
    "names",
    "complete",
    "pairs",
    "shapes",
    "rank",
    "dtype",
    "finite",
    "untrained",
    "constant",
    "scale",
    "target_modules",
    "record",
    "against",
    "against-scale",
    "load",
]

PLAIN_CHECKS = tuple(name for name in get_args(Check) if name not in ("against", "against-scale", "load"))
"""The checks of ``verify`` that need neither the checkpoint nor diffusers, in its order."""


@dataclass(frozen=True)
class Outcome:
    """What diffusers alone does with a file that is loaded the way users load it.

    ``says``: nothing, a warning or an error; ``by``: the exception's class, or the libraries that warned.
    ``taken``: modules whose adapter holds the file's A and B and lacks nothing. ``wanting``: modules that got
    an adapter of which a part was never filled. ``scaling``: the distinct scalings of all adapters.
    ``text``: what was said, shortened; it is no part of the comparison.
    """

    says: Literal["silent", "warning", "error"]
    by: str = ""
    taken: int = 12
    wanting: int = 0
    scaling: tuple[float, ...] = (0.25,)
    text: str = field(default="", compare=False)


@dataclass(frozen=True)
class Damage:
    """One damaged (or harmlessly different) file: how it is made, and what is to be said of it.

    ``plain``, ``against`` and ``load`` are the verdicts of ``verify``, of ``verify --against`` the checkpoint
    that the good file comes from, and of ``verify --load``, each run with the model's number of layers given.
    ``check`` names the check that finds it; where ``plain`` is a pass, only --against can. Where it is a warning and
    ``load`` a failure, it is the check of --load that settles it.
    """

    id: str
    description: str
    check: Check | None
    diffusers: Outcome
    apply: Apply
    plain: Verdict = "fail"
    against: Verdict = "fail"
    load: Verdict = "fail"


def silent(*, taken: int = 12, scaling: float = 0.25) -> Outcome:
    return Outcome("silent", taken=taken, scaling=(scaling,))


def warns(by: str, *, taken: int = 12, wanting: int = 0, scaling: float = 0.25) -> Outcome:
    return Outcome("warning", by, taken, wanting, (scaling,))


def raises(error: str) -> Outcome:
    return Outcome("error", error, taken=0, scaling=())


QUIET = silent()
UNSCALED = silent(scaling=1)
CANNOT_OPEN = raises("OSError")
NOTHING_LOADED = Outcome("warning", "diffusers", taken=0, scaling=())
NOTHING_FILLED = warns("diffusers", taken=0, wanting=12)


def unreadable(name: str, description: str, apply: Apply, diffusers: Outcome = CANNOT_OPEN) -> Damage:
    return Damage(name, description, "readable", diffusers, apply, "error", "error", "error")


def wrong(name: str, description: str, check: Check, diffusers: Outcome, *edits: Edit) -> Damage:
    return Damage(name, description, check, diffusers, by_file(*edits))


def doubtful(name: str, description: str, check: Check, diffusers: Outcome, *edits: Edit) -> Damage:
    """A file that can be used, and is probably not what was meant."""
    return Damage(name, description, check, diffusers, by_file(*edits), "warn", "fail", "warn")


def needless(name: str, description: str, check: Check, diffusers: Outcome, *edits: Edit, load: Verdict) -> Damage:
    """A file that is what the checkpoint holds, and states something that means nothing, or that is not evaluated."""
    return Damage(name, description, check, diffusers, by_file(*edits), "warn", "warn", load)


def unnoticed(name: str, description: str, check: Check, diffusers: Outcome, *edits: Edit) -> Damage:
    """A file that is right in itself, and not what the checkpoint holds."""
    return Damage(name, description, check, diffusers, by_file(*edits), "pass", "fail", "pass")


def harmless(name: str, description: str, against: Verdict, diffusers: Outcome, *edits: Edit) -> Damage:
    return Damage(name, description, None, diffusers, by_file(*edits), "pass", against, "pass")


A, B = key(1, "to_q", "A"), key(1, "to_q", "B")
PAIR, LAYER = ".1.attn1.to_v.", ".1.attn1."
HALF = drop_layers(lambda layers: layers[1::2])
LAST = drop_layers(lambda layers: layers[-1:])
ALL_BY_EXPRESSION = r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)"
ALPHA_OF_ONE = state(alpha_pattern={"transformer_blocks.1.attn1.to_q": 4})
TWO_SCALINGS = Outcome("silent", scaling=(0.25, 1.0))
DOWN_UP = rename(lambda name: name.replace("lora_A", "lora_down").replace("lora_B", "lora_up"))
WEB_PAGE = b"<!DOCTYPE html>\n<title>404 Not Found</title>\n"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"

# What PEFT 0.21 states beside the keys above, with its defaults.
PEFT_DEFAULTS = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "use_rslora": False,
}

# fmt: off
DAMAGES = (
    # The file cannot be opened, or says two things at once.
    unreadable("empty-file", "no bytes at all", by_bytes(lambda _: b"")),
    unreadable("web-page", "a web page saved under the name", by_bytes(lambda _: WEB_PAGE)),
    unreadable("git-lfs-pointer", "a Git LFS pointer in its place", by_bytes(lambda _: LFS_POINTER)),
    unreadable("pickle", "a pickle under the name", by_bytes(lambda _: pickle.dumps({A: [0.0]}))),
    unreadable("cut-in-length", "cut after 5 bytes", by_bytes(lambda good: good[:5])),
    unreadable("cut-in-header", "cut after 100 bytes", by_bytes(lambda good: good[:100])),
    unreadable("cut-in-data", "second half missing", by_bytes(lambda good: good[: len(good) // 2])),
    unreadable("cut-last-byte", "last byte missing", by_bytes(lambda good: good[:-1])),
    unreadable("byte-too-many", "a byte after the last tensor", by_bytes(lambda good: good + b"\0")),
    unreadable("header-too-long", "a header that ends after the file", by_bytes(lengthen_header)),
    unreadable("header-not-json", "a header that is not JSON", by_bytes(cut_brace)),
    unreadable("key-twice", "a key twice in the header", by_bytes(key_twice), QUIET),
    unreadable("scale-twice", "`lora_adapter_metadata` twice", by_bytes(scale_twice), UNSCALED),
    unreadable("overlap", "two tensors with the same bytes", by_header(overlap)),
    unreadable("hole", "bytes that belong to no tensor", by_header(lambda header: header.pop(A))),
    unreadable("shape-larger", "a shape larger than its bytes",
               by_header(lambda header: header[A]["shape"].append(2))),
    unreadable("dtype-larger", "a dtype larger than its bytes",
               by_header(lambda header: header[A].update(dtype="F64"))),
    unreadable("metadata-not-text", "a number in the metadata",
               by_header(lambda header: header["__metadata__"].update(rank=4))),

    # Names that are not diffusers' names.
    wrong("prefix-lost", "keys without `transformer.`", "names", NOTHING_LOADED, prefix("")),
    wrong("prefix-comfyui", "keys with `diffusion_model.`", "names", NOTHING_LOADED,
          prefix("diffusion_model.")),
    wrong("prefix-peft", "keys with PEFT's `base_model.model.`", "names", NOTHING_LOADED,
          prefix("base_model.model.")),
    wrong("prefix-both", "keys with both: a `PeftModel`'s state dict, saved by diffusers", "names",
          raises("NoMatchingPeftModuleError"), prefix("transformer.base_model.model.")),
    wrong("comfyui-names", "ComfyUI's own names", "names", NOTHING_LOADED, comfyui_names),
    wrong("kohya-names", "kohya's names, as VideoX-Fun reads them", "names", NOTHING_LOADED, kohya_names),
    wrong("diffsynth-names", "DiffSynth-Studio's names", "names", NOTHING_LOADED, diffsynth_names),
    wrong("sat-names", "SAT's own names", "names", raises("ValueError"), sat_names),
    wrong("down-up", "`lora_down` and `lora_up`", "names", NOTHING_FILLED, DOWN_UP),
    wrong("down-up-bare", "the same, no metadata", "names", raises("IndexError"), DOWN_UP, forget),
    wrong("adapter-name", "`lora_A.default.weight`, as in a PEFT model's state dict", "names", NOTHING_FILLED,
          rename(lambda name: name.replace(".weight", ".default.weight"))),
    wrong("to-out", "`to_out` for `to_out.0`", "names", raises("ValueError"),
          rename(lambda name: name.replace("to_out.0", "to_out"))),
    wrong("alpha-tensors", "an `.alpha` tensor per module", "names", raises("ValueError"), add_alphas),
    wrong("foreign-key", "a base weight beside the LoRA", "names", raises("ValueError"),
          copy(lambda _: "transformer.proj_out.weight", A)),
    wrong("foreign-lora", "a text encoder's LoRA beside it", "names", QUIET,
          copy(lambda name: "text_encoder." + name.removeprefix(PREFIX), LAYER)),
    wrong("layer-too-many", "a layer after the last", "names", warns("diffusers"), add_layer),

    # Tensors missing.
    wrong("pair", "one module's A and B missing", "complete", warns("peft", taken=11), drop(PAIR)),
    wrong("pair-bare", "the same, no metadata", "complete", silent(taken=11, scaling=1), drop(PAIR), forget),
    wrong("layer", "a layer missing", "complete", warns("peft", taken=8), drop(LAYER)),
    wrong("last-layer", "the last layer missing", "complete", warns("peft", taken=8), LAST),
    wrong("half", "every other layer missing", "complete", warns("peft", taken=8), HALF),
    wrong("half-bare", "the same, no metadata", "complete", silent(taken=8, scaling=1), HALF, forget),
    wrong("half-suffixes", "the same, `target_modules` as suffixes", "complete", warns("peft", taken=8),
          HALF, state(target_modules=list(PROJECTIONS))),
    unnoticed("half-restated", "the same, `target_modules` without them", "against", silent(taken=8),
              HALF, state_target_modules),
    doubtful("projection-bare", "`to_out.0` missing in every layer, no metadata", "scale",
             silent(taken=9, scaling=1), drop("to_out.0"), forget),
    wrong("feed-forward-bare", "a LoRA for `ff.net.0.proj` in one layer only, no metadata", "complete",
          silent(taken=13, scaling=1), add_feed_forward(0), forget),
    wrong("no-tensors", "a header and no tensors", "complete", NOTHING_LOADED, drop(PREFIX)),
    wrong("lone-a", "one B missing", "pairs", warns("diffusers", taken=11, wanting=1), drop(B)),
    wrong("lone-b", "one A missing", "pairs", warns("diffusers", taken=11, wanting=1), drop(A)),

    # Shapes and ranks.
    wrong("transposed", "one A transposed", "shapes", raises("RuntimeError"),
          alter(lambda values: values.T, A)),
    wrong("a-b-exchanged", "A named B and B named A", "shapes", raises("RuntimeError"),
          exchange("lora_A", "lora_B")),
    wrong("other-model", "half the hidden size", "shapes", raises("RuntimeError"), halve_hidden),
    wrong("short-a", "one A a row short", "rank", raises("RuntimeError"),
          alter(lambda values: values[:-1], A)),
    wrong("lower-rank", "one pair of a lower rank", "rank", raises("RuntimeError"), lower_rank),
    doubtful("lower-rank-bare", "the same, no metadata", "rank", UNSCALED, lower_rank, forget),
    wrong("r-wrong", "`r` twice the rank", "rank", raises("RuntimeError"),
          lambda file: state(r=2 * file.rank)(file)),

    # Values.
    wrong("dtype-mixed", "one layer in another dtype", "dtype", QUIET, cast_elsewhere(LAYER)),
    wrong("nan", "one NaN", "finite", QUIET, alter(put(np.nan), A)),
    wrong("infinity", "one infinity", "finite", QUIET, alter(put(np.inf), B)),
    wrong("a-constant", "one A with one value throughout", "constant", QUIET, alter(np.ones_like, A)),
    doubtful("b-zero", "every B zero, as before training", "untrained", QUIET,
             alter(np.zeros_like, "lora_B")),
    doubtful("one-b-zero", "one B zero", "untrained", QUIET, alter(np.zeros_like, B)),
    unnoticed("bit-flipped", "one bit flipped", "against", QUIET, flip_lowest_bit),
    wrong("rounded", "all values rounded to another dtype", "record", QUIET, cast_elsewhere(PREFIX)),
    unnoticed("rounded-bare", "the same, no record of the export", "against", QUIET,
              cast_elsewhere(PREFIX), unrecord),
    unnoticed("q-k", "q and k exchanged in one layer", "against", QUIET,
              exchange(".1.attn1.to_q.", ".1.attn1.to_k.")),
    unnoticed("q-k-everywhere", "q and k exchanged in every layer", "against", QUIET,
              exchange("to_q", "to_k")),
    unnoticed("b-of-another-layer", "two layers' B of q exchanged", "against", QUIET,
              exchange(key(0, "to_q", "B"), B)),
    unnoticed("layers-exchanged", "two layers exchanged", "against", QUIET, exchange(".0.attn1.", LAYER)),
    unnoticed("other-step", "the values of another training step", "against", QUIET,
              alter(lambda values: values * np.float32(1.5))),
    unnoticed("scaled-twice", "the scale folded into B and stated too", "against", QUIET, fold),

    # The scale.
    doubtful("metadata-lost", "no metadata, as the old script leaves it", "scale", UNSCALED, forget),
    wrong("no-adapter-metadata", "no `lora_adapter_metadata`", "record", UNSCALED,
          lambda file: file.metadata.pop(ADAPTER_KEY)),
    wrong("not-json", "`lora_adapter_metadata` not JSON", "scale", raises("JSONDecodeError"), restate(repr)),
    wrong("not-an-object", "`lora_adapter_metadata` a list", "scale", raises("AttributeError"),
          restate(list)),
    wrong("unprefixed", "its keys without `transformer.`", "scale", raises("KeyError"), unprefix_adapter),
    wrong("alpha-absent", "no `lora_alpha`", "scale", silent(scaling=2), unstate("lora_alpha")),
    wrong("alpha-text", "`lora_alpha` a string", "scale", raises("TypeError"), state(lora_alpha="1")),
    wrong("alpha-zero", "`lora_alpha` 0", "scale", silent(scaling=0), state(lora_alpha=0)),
    wrong("alpha-huge", "`lora_alpha` of 400 digits", "scale", raises("OverflowError"),
          state(lora_alpha=10**400)),
    wrong("alpha-is-rank", "`lora_alpha` = rank", "record", UNSCALED,
          lambda file: state(lora_alpha=file.rank)(file)),
    unnoticed("alpha-is-rank-bare", "the same, no record of the export", "against-scale", UNSCALED,
              lambda file: state(lora_alpha=file.rank)(file), unrecord),
    wrong("alpha-doubled", "`lora_alpha` twice as large", "record", silent(scaling=0.5),
          lambda file: state(lora_alpha=2 * file.alpha)(file)),
    unnoticed("alpha-doubled-bare", "the same, no record of the export", "against-scale", silent(scaling=0.5),
              lambda file: state(lora_alpha=2 * file.alpha)(file), unrecord),
    wrong("rslora", "`use_rslora`: alpha / sqrt(rank)", "record", silent(scaling=0.5), state(use_rslora=True)),
    unnoticed("rslora-bare", "the same, no record of the export", "against-scale", silent(scaling=0.5),
              state(use_rslora=True), unrecord),
    wrong("alpha-pattern", "another alpha for one module", "record", TWO_SCALINGS, ALPHA_OF_ONE),
    unnoticed("alpha-pattern-bare", "the same, no record of the export", "against-scale", TWO_SCALINGS,
              ALPHA_OF_ONE, unrecord),
    wrong("alpha-pattern-null", "`alpha_pattern` null", "scale", raises("AttributeError"),
          state(alpha_pattern=None)),
    needless("alpha-pattern-idle", "an alpha for a module that there is not", "scale", warns("peft"),
             state(alpha_pattern={"to_x": 4}), load="fail"),
    wrong("r-absent", "no `r`", "scale", raises("RuntimeError"), unstate("r")),
    Damage("rank-pattern-absent", "no `rank_pattern` (diffusers 0.34 to 0.38: `KeyError`)", "scale", QUIET,
           by_file(unstate("rank_pattern")), plain="warn", against="warn", load="warn"),
    wrong("rank-pattern-null", "`rank_pattern` null", "scale", raises("AttributeError"),
          state(rank_pattern=None)),
    wrong("rank-pattern-float", "a rank that is no whole number", "scale", raises("TypeError"),
          state(rank_pattern={"to_q": 4.0})),
    wrong("dora-absent", "`use_dora` without magnitude vectors", "scale", NOTHING_FILLED, state(use_dora=True)),
    wrong("dora-unstated", "magnitude vectors without `use_dora`", "scale", warns("diffusers"), add_magnitudes),
    wrong("bias-absent", "`lora_bias` without biases", "scale", NOTHING_FILLED, state(lora_bias=True)),
    wrong("bias-unstated", "biases without `lora_bias`", "scale", warns("diffusers"), add_biases),
    needless("pissa", "`init_lora_weights` that needs the base weights", "scale", raises("RuntimeError"),
             state(init_lora_weights="pissa"), load="fail"),
    wrong("dropout", "`lora_dropout` 0.1: live dropout", "scale", QUIET, state(lora_dropout=0.1)),
    wrong("dropout-of-all", "`lora_dropout` 1: the LoRA is off", "scale", QUIET, state(lora_dropout=1.0)),
    needless("monteclora", "`monteclora_config`: noise in every output", "scale", QUIET, state(monteclora_config={}),
             load="fail"),
    needless("alora", "`alora_invocation_tokens`: the LoRA is off", "scale", warns("peft"),
             state(alora_invocation_tokens=[1]), load="fail"),
    needless("kasa", "`kasa_config`: other base weights, and a tensor more for each module", "scale", NOTHING_FILLED,
             state(kasa_config={}), load="fail"),
    wrong("layers-pattern-alone", "`layers_pattern` without `layers_to_transform`", "scale", raises("ValueError"),
          state(layers_pattern="transformer_blocks")),
    needless("bias-null", "`bias` null", "scale", raises("AttributeError"), state(bias=None), load="fail"),
    needless("endless-expression", "`target_modules` an expression that takes for ever", "target_modules",
             warns("peft"), state(target_modules=r"(a+)+!"), load="fail"),
    needless("modules-to-save", "`modules_to_save` without their weights", "scale", raises("KeyError"),
             state(modules_to_save=["proj_out"]), load="fail"),
    wrong("unknown-key", "a key that PEFT does not know", "scale", raises("TypeError"), state(run="12")),

    # What the file says it targets.
    wrong("targets-short", "`target_modules` without the last layer", "target_modules", warns("peft"),
          lambda file: state(target_modules=modules(file.layers[:-1]))(file)),
    needless("targets-long", "`target_modules` with a layer that no model has", "target_modules", QUIET,
             lambda file: state(target_modules=modules([*file.layers, 99]))(file), load="warn"),
    needless("targets-idle", "`target_modules` with an end that no module has", "target_modules", QUIET,
             state(target_modules=[*PROJECTIONS, "add_k_proj"]), load="warn"),
    Damage("half-expression", "every other layer missing, `target_modules` an expression for all", "complete",
           warns("peft", taken=8), by_file(HALF, state(target_modules=ALL_BY_EXPRESSION)), "warn", "fail", "fail"),
    wrong("layers-without-pattern", "`layers_to_transform` without `layers_pattern`", "target_modules", warns("peft"),
          state(target_modules=list(PROJECTIONS), layers_to_transform=[0, 1, 2])),
    wrong("feed-forward", "a LoRA for `ff.net.0.proj` that `target_modules` does not name", "target_modules",
          warns("peft", taken=13), add_feed_forward(0)),
    wrong("targets-of-sat", "`target_modules` with SAT's names", "target_modules", warns("peft"),
          state(target_modules=["query_key_value", "dense"])),
    wrong("targets-absent", "no `target_modules`", "target_modules", raises("KeyError"),
          unstate("target_modules")),
)

# Good files that say by an expression which modules they mean: a doubt, which only --load can lift.
EXPRESSIONS = (
    needless("alpha-pattern-expression", "an alpha for what an expression means", "scale", QUIET,
             state(alpha_pattern={r".*\.to_q": 1}), load="pass"),
    needless("rank-pattern-expression", "a rank for what an expression means", "rank", QUIET,
             state(rank_pattern={r".*\.to_q": 4}), load="pass"),
    needless("targets-expression", "`target_modules` an expression", "target_modules", QUIET,
             state(target_modules=ALL_BY_EXPRESSION), load="pass"),
)

# Variants that nothing may complain of. --against fails where the checkpoint is not the variant's source, and
# where the file does not state that it was cast or folded.
GOOD = (
    harmless("unchanged", "the good file", "pass", QUIET),
    harmless("suffixes", "`target_modules` as suffixes", "pass", QUIET,
             state(target_modules=list(PROJECTIONS))),
    harmless("float-alpha", "`lora_alpha` a float", "pass", QUIET,
             lambda file: state(lora_alpha=file.alpha)(file)),
    harmless("no-cogtools-key", "nothing of our own stated", "pass", QUIET,
             lambda file: file.metadata.pop("cogtools")),
    harmless("metadata-reversed", "metadata in another order", "pass", QUIET, reverse_metadata),
    harmless("tensors-reversed", "tensors in another order", "pass", QUIET, reverse_tensors),
    harmless("peft-keys", "PEFT's other keys stated, as diffusers saves them", "pass", QUIET,
             state(**PEFT_DEFAULTS)),
    harmless("other-rank", "twice the rank and alpha", "fail", QUIET, double_rank, unrecord),
    harmless("rank-pattern", "one pair of a lower rank, stated", "fail", QUIET, lower_rank, state_lower_rank),
    harmless("alpha-of-a-kind", "an alpha for a kind of module, stated", "fail", TWO_SCALINGS,
             state(alpha_pattern={"to_q": 4}), unrecord),
    harmless("folded", "the scale folded into B, alpha = rank", "fail", UNSCALED,
             fold, lambda file: state(lora_alpha=file.rank)(file), unrecord),
    harmless("fp32", "all values in fp32", "fail", QUIET, cast("F32"), unrecord),
    harmless("bf16", "all values in bf16", "fail", QUIET, cast("BF16"), unrecord),
    harmless("no-layers-to-transform", "`layers_to_transform` empty", "pass", QUIET,
             state(target_modules=list(PROJECTIONS), layers_to_transform=[])),
    harmless("partial", "half of the layers, stated", "fail", silent(taken=8), HALF, state_target_modules),
    harmless("three-projections", "no LoRA for `to_out.0`, stated", "fail", silent(taken=9), drop("to_out.0"),
             state(target_modules=["to_q", "to_k", "to_v"])),
    harmless("feed-forward-of-one-layer", "a LoRA for `ff.net.0.proj` in one layer, stated", "fail", silent(taken=13),
             add_feed_forward(0), state_feed_forward(0)),
    harmless("feed-forward-of-all", "a LoRA for `ff.net.0.proj` in every layer, stated", "fail", silent(taken=15),
             add_feed_forward(0, 1, 2), state_feed_forward(0, 1, 2)),
    harmless("feed-forward-suffix", "the same, `target_modules` as suffixes", "fail", silent(taken=15),
             add_feed_forward(0, 1, 2), state(target_modules=[*PROJECTIONS, FEED_FORWARD])),
    harmless("lora-bias", "a bias for every B, stated", "fail", QUIET, add_biases, state(lora_bias=True)),
    harmless("dora", "a magnitude vector for every module, stated", "fail", QUIET, add_magnitudes,
             state(use_dora=True)),
    harmless("bias-lora-only", "`bias` of the base weights that no file can hold", "pass", QUIET,
             state(bias="lora_only")),
)
# fmt: on


# --- the table as Markdown ------------------------------------------------------------------------


def told(outcome: Outcome) -> str:
    """Say in a few words what diffusers alone does."""
    if outcome.says == "error":
        return f"`{outcome.by}`"
    modules_taken = [f"{outcome.taken} of 12 modules"] if outcome.taken < 12 else []
    unfilled = [f"{outcome.wanting} left unfilled"] if outcome.wanting else []
    scalings = " and ".join(f"{scaling:g}" for scaling in outcome.scaling)
    scaled = [] if outcome.scaling in {(), (0.25,)} else [f"scaling {scalings}"]
    said = "**silent**" if outcome.says == "silent" else f"a warning ({outcome.by})"
    return ", ".join([said, *modules_taken, *unfilled, *scaled])


def caught_by(damage: Damage) -> str:
    """Name the check, and the option of ``verify`` that it needs; a file that cannot be opened has no checks."""
    if damage.check == "readable":
        return "not opened: exit code 2"
    options: dict[Check | None, str] = {"against": "`--against`: ", "against-scale": "`--against`: "}
    needed = options.get(damage.check, "")
    doubt = ", a warning" if damage.plain == "warn" else ""
    decided = "; `--load`: `load`" if damage.plain == "warn" and damage.load == "fail" else ""
    return f"{needed}`{damage.check}`{doubt}{decided}"


def markdown() -> str:
    """Render the table, a row per damage, in the order of ``DAMAGES``."""
    rows = [("damage", "what diffusers alone does", "caught by"), ("---", "---", "---")]
    rows += [(damage.description, told(damage.diffusers), caught_by(damage)) for damage in DAMAGES]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    sys.stdout.write(markdown())
