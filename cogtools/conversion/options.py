"""What a user can ask of an export: one record that the commands, the Python API and a batch share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from cogtools.errors import OptionError

if TYPE_CHECKING:
    import os

    from cogtools.layouts.lora import LoraLayout

Format = Literal["diffusers", "peft", "comfyui", "videox-fun", "diffsynth", "sat"]
"""The layouts that a LoRA can be written in, by their names."""

FORMATS: dict[str, Format] = {name: name for name in get_args(Format)}

Scale = Literal["metadata", "fold", "none"]
"""How an exported file carries alpha / rank: stated where its program looks for it, multiplied into its weights, or
not at all."""

BY_HAND, BY_SCALING = "--alpha", "--scaling"
"""The options that state the scale, by which reports and records name it where the user did."""

Cast = Literal["keep", "fp32", "fp16", "bf16"]
"""What an exported file's tensors are cast to."""

Dtype = Literal["fp32", "fp16", "bf16"]
"""The dtypes that can be asked for."""

CASTS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""The dtypes that these words stand for, by PyTorch's names."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """The options of an export.

    Attributes:
        format: the layout of the output.
        alpha: the training's alpha; None takes what is stated in the file or beside it.
        scaling: what every update is multiplied by, instead of alpha / rank; None takes what is stated.
        scale: "metadata" states alpha / rank where the format's program looks for it; "fold" multiplies it into the
            weights; "none" leaves it out. None takes "metadata", and "fold" for a format that cannot state it.
        dtype: "keep" copies the bytes; the others cast.
        base: base weights to write beside the LoRA, for a format whose program loads whole models; None writes the
            LoRA only.
        iteration: which iteration of a save folder; None takes the latest.
        ema: take its EMA weights.
        allow_partial: accept a LoRA that adapts some of the layers only.
        overwrite: replace an output that is there already.
        dry_run: find out everything, write nothing.
        sha256: compute the SHA-256 of the output.
        rank: cut every module of a higher rank down to this one, to the best approximation there is; None keeps all.
            The scale is then multiplied in.
        verify: check every value of what was written.
    """

    format: Format = "diffusers"
    alpha: float | None = None
    scaling: float | None = None
    scale: Scale | None = None
    dtype: Cast = "keep"
    base: str | os.PathLike[str] | None = None
    iteration: int | None = None
    ema: bool = False
    allow_partial: bool = False
    overwrite: bool = False
    dry_run: bool = False
    sha256: bool = False
    rank: int | None = None
    verify: bool = False

    @property
    def layout(self) -> LoraLayout:
        """The layout of the output.

        Raises:
            OptionError: if there is no such format.
        """
        from cogtools.layouts.recognition import BY_NAME

        return BY_NAME[checked_format(self.format)]

    @property
    def way(self) -> Scale:
        """How the output carries the scale.

        Raises:
            OptionError: if there is no such way, or the format has no place for a scale.
        """
        layout = self.layout
        if self.rank is not None and self.scale in (None, "fold"):
            return "fold"
        if self.scale is None:
            return "fold" if layout.scale == "nowhere" else "metadata"
        if self.scale not in get_args(Scale):
            expected = ", ".join(get_args(Scale))
            raise OptionError("there is no such way to carry the scale", found=self.scale, expected=expected)
        if self.rank is not None:
            raise OptionError(
                f"--scale {self.scale} does not go with --rank, which multiplies the scale in",
                hint="leave --scale out",
            )
        if self.scale == "metadata" and layout.scale == "nowhere":
            raise OptionError(
                f"--scale metadata: {layout.reader} reads the scale from no file",
                expected="--scale fold, the default for this format",
                hint="leave --scale out",
            )
        if self.scale == "none" and layout.unstated_scaling is None:
            raise OptionError(
                f"--scale none: {layout.reader} loads nothing where the scale is not stated",
                expected="--scale metadata, the default, or --scale fold",
                hint="leave --scale out",
            )
        return self.scale


def format_words(layout: LoraLayout) -> list[str]:
    """The words of a command that ask for a layout: none for the one that is written anyway."""
    return [] if layout.name == ExportOptions().format else ["--format", layout.name]


def checked_format(name: str) -> Format:
    """The name of a format.

    Raises:
        OptionError: if there is none of that name.
    """
    if name not in FORMATS:
        expected = ", ".join(FORMATS)
        raise OptionError("there is no such format", found=name, expected=expected)
    return FORMATS[name]


ModelFormat = Literal["diffusers", "sat"]
"""What a whole model is written for."""


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """The options of an export of a whole model.

    Attributes:
        format: "diffusers" writes a folder for each part; "sat" a folder that SAT loads the transformer from.
        model: the short name of the model, where nothing else tells.
        iteration: which iteration of a save folder; None takes the latest.
        ema: take its EMA weights.
        max_shard_size: how large a file of weights may be; None takes the default.
        vae: a file of SAT's VAE, in place of the checkpoint's.
        base: a pipeline on this machine that gives the parts that are missing.
        overwrite: replace the folders of parts that cogtools wrote.
        dry_run: find out everything, write nothing.
    """

    format: ModelFormat = "diffusers"
    model: str | None = None
    iteration: int | None = None
    ema: bool = False
    max_shard_size: str | None = None
    vae: str | None = None
    base: str | None = None
    overwrite: bool = False
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """The options of a merge.

    Attributes:
        weights: of the LoRAs, in their order; () is 1 for all.
        alpha: the training's alpha of the only LoRA; None takes what is stated.
        dtype: what is written; None is the dtype of the base weights, and fp32 for a LoRA.
        rank: cut modules of a LoRA of several down to this rank, to the best approximation there is; None keeps all.
        format: the layout of the output: of a LoRA, or of a model (`ModelFormat`); None is diffusers'.
        model: the short name of the model, where nothing else tells.
        iteration: which iteration of a save folder; None takes the latest.
        ema: take its EMA weights.
        allow_partial: accept a LoRA that adapts some of the layers only.
        overwrite: replace an output that is there already.
        dry_run: find out everything, write nothing.
    """

    weights: tuple[float, ...] = ()
    alpha: float | None = None
    dtype: Dtype | None = None
    rank: int | None = None
    format: Format | None = None
    model: str | None = None
    iteration: int | None = None
    ema: bool = False
    allow_partial: bool = False
    overwrite: bool = False
    dry_run: bool = False
