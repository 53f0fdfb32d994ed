"""What a user can ask of an export: one record that the commands, the Python API and a batch share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scale = Literal["metadata", "fold", "none"]
"""How an exported file carries alpha / rank: stated in its header, multiplied into its weights, or not at all."""

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
        alpha: the training's alpha; None takes it from `training_config.yaml` beside the checkpoint, and 1, SAT's
            default, where that does not say.
        scale: "metadata" states alpha / rank in the header, where diffusers reads it from 0.34 on; "fold" multiplies
            it into the weights, for everything else; "none" leaves it out.
        dtype: "keep" copies the bytes; the others cast.
        iteration: which iteration of a save folder; None takes the latest.
        ema: take its EMA weights.
        allow_partial: accept a LoRA that adapts some of the layers only.
        overwrite: replace a file that is there already.
        dry_run: find out everything, write nothing.
        sha256: compute the SHA-256 of the output.
        rank: cut every module of a higher rank down to this one, to the best approximation there is; None keeps all.
    """

    alpha: float | None = None
    scale: Scale = "metadata"
    dtype: Cast = "keep"
    iteration: int | None = None
    ema: bool = False
    allow_partial: bool = False
    overwrite: bool = False
    dry_run: bool = False
    sha256: bool = False
    rank: int | None = None


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
    format: str | None = None
    model: str | None = None
    iteration: int | None = None
    ema: bool = False
    allow_partial: bool = False
    overwrite: bool = False
    dry_run: bool = False


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
