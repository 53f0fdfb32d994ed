"""Make a checkpoint of full size in seconds, with little memory and disk: the real layout, a dense LoRA.

    python -m benchmarks.full_size OUT.pt --model 2b --rank 128 --scale 1

torch writes the file with holes in place of the storages (`torch.serialization.skip_data`). The LoRA and the
random states are then written into theirs, and every record gets its CRC-32. All other weights stay holes:
they read as zeros and, on a filesystem with sparse files, take no room. With --dense they are filled too.
"""

import argparse
import bisect
import math
import struct
import time
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import BinaryIO

import torch

from tests.support.factories import (
    COGVIDEOX_1_5_5B,
    COGVIDEOX_1_5_5B_I2V,
    COGVIDEOX_2B,
    COGVIDEOX_5B,
    COGVIDEOX_5B_I2V,
    COGVIDEOX_VAE,
    T5_XXL,
    TIED_EMBEDDING,
    SatModel,
    TextEncoder,
    allocate,
    fill_lora,
    is_lora,
    module_shapes,
    sat_checkpoint,
    tensors_in,
)

MODELS = {
    "2b": COGVIDEOX_2B,
    "5b": COGVIDEOX_5B,
    "5b-i2v": COGVIDEOX_5B_I2V,
    "1.5-5b": COGVIDEOX_1_5_5B,
    "1.5-5b-i2v": COGVIDEOX_1_5_5B_I2V,
}
# What the trainer's shipped configurations train in.
DTYPES = {name: torch.float16 if name == "2b" else torch.bfloat16 for name in MODELS}

NARROW, WIDEST = 64, 2**15  # widths of a text encoder
_ZEROS = bytes(2**20)


def make(
    path: Path,
    model: SatModel,
    rank: int,
    dtype: torch.dtype,
    scale: float = 1,
    seed: int = 0,
    *,
    is_dense: bool = False,
) -> None:
    """Write a checkpoint of `model` with a LoRA of `rank`, `scale` times as large as those (see `scaled`)."""
    module = allocate(module_shapes(scaled(model, rank, scale), rank), dtype)
    checkpoint = sat_checkpoint(module)
    with torch.serialization.skip_data():
        torch.save(checkpoint, path)

    fill_lora(module, seed)
    dense = [tensor for key, tensor in module.items() if is_lora(key)]
    dense += [checkpoint["torch_rng_state"], checkpoint["cuda_rng_state"]]
    numbers = _storage_numbers(tensors_in(checkpoint))
    filled = {numbers[tensor.untyped_storage().data_ptr()]: _storage_bytes(tensor) for tensor in dense}
    _fill_records(path, filled, _tile(dtype, seed) if is_dense else None)


def _tile(dtype: torch.dtype, seed: int) -> bytes:
    """Numbers that fill the base weights, over and over."""
    numbers = torch.empty(2**20, dtype=torch.float32).normal_(std=0.02, generator=torch.Generator().manual_seed(seed))
    return _storage_bytes(numbers.to(dtype)).tobytes()


def scaled(model: SatModel, rank: int, scale: float) -> SatModel:
    """Give `model` a narrow VAE and a T5 so wide that all storages together grow `scale` times.

    At any scale all keys are there. 2B at 4 and 5B at 2 are about as large as what the trainer saves.
    """
    narrow = replace(model, text_encoder=_t5(NARROW), vae=replace(COGVIDEOX_VAE, channels=8))

    def elements(width: int) -> int:
        shapes = module_shapes(replace(narrow, text_encoder=_t5(width)), rank)
        return sum(math.prod(shape) for key, shape in shapes.items() if key != TIED_EMBEDDING)

    width = bisect.bisect_left(range(WIDEST), scale * elements(NARROW), lo=NARROW, key=elements)
    return replace(narrow, text_encoder=_t5(width))


def _t5(width: int) -> TextEncoder:
    """Size a T5 with the blocks and the proportions of T5 v1.1 XXL."""
    return replace(T5_XXL, width=width, inner=width, feed_forward=width * 5 // 2)


def _storage_numbers(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Map each storage's address to the N of its record `data/N`: torch counts them as the pickle does."""
    numbers: dict[int, int] = {}
    for tensor in tensors:
        numbers.setdefault(tensor.untyped_storage().data_ptr(), len(numbers))
    return numbers


def _storage_bytes(tensor: torch.Tensor) -> memoryview:
    """Show the whole storage that a tensor views. No copy."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy().data


def _fill_records(path: Path, dense: Mapping[int, memoryview], tile: bytes | None) -> None:
    """Write storages into their records `data/N`, and the CRC-32 of every storage, filled or hole.

    Args:
        path: the checkpoint.
        dense: the content of storages, by their number.
        tile: what the others are filled with; None leaves them holes.
    """
    with zipfile.ZipFile(path) as archive:
        records, directory = archive.infolist(), archive.start_dir
    with path.open("r+b") as file:
        for record in records:
            crc32 = record.CRC
            if "/data/" in record.filename:
                number = int(record.filename.rpartition("/")[2])
                content = dense.get(number)
                if content is None and tile is not None:
                    content = memoryview((tile * (record.file_size // len(tile) + 1))[: record.file_size])
                crc32 = _fill_record(file, record, content)
            directory = _set_directory_crc32(file, directory, crc32)


def _fill_record(file: BinaryIO, record: zipfile.ZipInfo, content: memoryview | None) -> int:
    """Write one record's bytes (None: it stays a hole) and the data descriptor's CRC-32; return that."""
    file.seek(record.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", file.read(4))
    start = record.header_offset + 30 + name_length + extra_length
    if content is None:
        crc32 = _crc32_of_zeros(record.file_size)
    else:
        crc32 = zlib.crc32(content)
        file.seek(start)
        file.write(content)
    file.seek(start + record.file_size + len(b"PK\x07\x08"))
    file.write(struct.pack("<I", crc32))
    return crc32


def _set_directory_crc32(file: BinaryIO, entry: int, crc32: int) -> int:
    """Set the CRC-32 in one entry of the central directory; return where the next entry begins."""
    file.seek(entry + 16)
    file.write(struct.pack("<I", crc32))
    file.seek(entry + 28)
    name_length, extra_length, comment_length = struct.unpack("<HHH", file.read(6))
    return entry + 46 + int(name_length) + int(extra_length) + int(comment_length)


@cache
def _crc32_of_zeros(size_bytes: int) -> int:
    crc32 = 0
    for _ in range(size_bytes // len(_ZEROS)):
        crc32 = zlib.crc32(_ZEROS, crc32)
    return zlib.crc32(_ZEROS[: size_bytes % len(_ZEROS)], crc32)


def main() -> None:
    """Make one checkpoint and say how large it is."""
    parser = argparse.ArgumentParser(description="Make a checkpoint of full size.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=MODELS, default="2b")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument(
        "--scale", type=float, default=1, help="the file's size: so many times the transformer and its LoRA"
    )
    parser.add_argument("--dense", action="store_true", help="fill the base weights: the file takes its whole size")
    arguments = parser.parse_args()

    start = time.perf_counter()
    model, dtype = MODELS[arguments.model], DTYPES[arguments.model]
    make(arguments.out, model, arguments.rank, dtype, arguments.scale, is_dense=arguments.dense)
    status = arguments.out.stat()
    print(
        f"{arguments.out}: {status.st_size / 1e9:.2f} GB, {status.st_blocks * 512 / 1e9:.2f} GB on disk, "
        f"made in {time.perf_counter() - start:.1f} s"
    )


if __name__ == "__main__":
    main()
