"""The options that the commands and the Python API share."""

from __future__ import annotations

from typing import Literal, TypedDict

Scale = Literal["metadata", "fold", "none"]
"""How an exported file carries alpha / rank: stated in its header, multiplied into its weights, or not at all."""

Cast = Literal["keep", "fp32", "fp16", "bf16"]
"""What an exported file's tensors are cast to."""

CASTS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""The dtypes that these words stand for, by PyTorch's names."""


class ExportOptions(TypedDict):
    """Those options of `export_lora` that shape the output."""

    alpha: float | None
    scale: Scale
    dtype: Cast
    allow_partial: bool


class WriteOptions(TypedDict):
    """Those options of `export_lora` that say how the output is written."""

    overwrite: bool
    dry_run: bool
    sha256: bool
