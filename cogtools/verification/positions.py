"""The positions that diffusers computes for 2B, to hold those of a checkpoint against: sines and cosines.

For each patch of a video an embedding of its frame (a quarter of the width), its column and its row (three eighths
each), every one half sines and half cosines of the position times 10000^(-2i / width). The text's positions before them
are zeros.

Source: diffusers, models/embeddings.py (`get_3d_sincos_pos_embed`, `CogVideoXPatchEmbed`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cogtools.layouts.transformer import DEFAULTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray


class Grid(NamedTuple):
    """What the positions are computed of: the sizes of a transformer, of a video and of a text."""

    num_attention_heads: int
    attention_head_dim: int
    max_text_seq_length: int
    sample_frames: int
    sample_height: int
    sample_width: int
    patch_size: int
    temporal_compression_ratio: int
    spatial_interpolation_scale: float
    temporal_interpolation_scale: float


def grid_of(config: Mapping[str, object]) -> Grid | None:
    """The fields of a config.json, defaults for those that it lacks; None if one is not a number."""
    fields = {**DEFAULTS, **config}
    numbers = [fields[name] for name in Grid._fields]
    scales = len(Grid.__annotations__) - 2
    if not all(type(number) is int for number in numbers[:scales]):
        return None
    if not all(isinstance(number, (int, float)) and not isinstance(number, bool) and number > 0 for number in numbers):
        return None
    return Grid(*numbers)  # type: ignore[arg-type]


def position_blocks(grid: Grid) -> Iterator[NDArray[np.float64]]:
    """The positions in blocks of (positions, hidden size): those of the text, then those of each latent frame."""
    hidden = grid.num_attention_heads * grid.attention_head_dim
    yield np.zeros((grid.max_text_seq_length, hidden))
    frames = (grid.sample_frames - 1) // grid.temporal_compression_ratio + 1
    rows = np.arange(grid.sample_height // grid.patch_size) / grid.spatial_interpolation_scale
    columns = np.arange(grid.sample_width // grid.patch_size) / grid.spatial_interpolation_scale
    of_rows = _sines(rows, 3 * hidden // 8)[:, None, :]
    of_columns = _sines(columns, 3 * hidden // 8)[None, :, :]
    for of_frame in _sines(np.arange(frames) / grid.temporal_interpolation_scale, hidden // 4):
        parts = (of_frame[None, None, :], of_columns, of_rows)
        whole = [np.broadcast_to(part, (len(rows), len(columns), part.shape[-1])) for part in parts]
        yield np.concatenate(whole, axis=-1).reshape(-1, hidden)


def _sines(positions: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """(positions, width): sines, then cosines."""
    frequencies = 1 / 10000 ** (np.arange(width // 2) / (width / 2))
    angles = np.outer(positions, frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
