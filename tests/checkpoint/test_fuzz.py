"""Whatever is done to a file that is read, nothing but a CogtoolsError comes out.

`make fuzz` runs the same targets for longer, guided by the code that an input reaches.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cogtools.checkpoint.opening import open_checkpoint
from cogtools.conversion.plan import plan_lora
from cogtools.layouts import diffusers
from tests.support import hostile
from tests.support.fuzz_commands import dumped, good_lora, run
from tests.support.fuzz_readers import TARGETS, seeds

if TYPE_CHECKING:
    from pathlib import Path

EXAMPLES = 150
"""A sample that is the same every time; `make fuzz` goes on from there."""


@st.composite
def mutated(draw: st.DrawFn, target: str) -> bytes:
    """A seed with up to four changes: a byte flipped, bytes cut out, put in, or taken from another seed; an end cut."""
    content = bytearray(draw(st.sampled_from(list(seeds(target).values()))))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["flip", "cut out", "put in", "splice", "cut off"])):
            case "flip" if at < len(content):
                content[at] ^= draw(st.integers(1, 255))
            case "cut out":
                del content[at : at + draw(st.integers(1, 16))]
            case "put in":
                content[at:at] = draw(st.binary(min_size=1, max_size=9))
            case "splice":
                other = draw(st.sampled_from(list(seeds(target).values())))
                start = draw(st.integers(0, len(other)))
                content[at:] = other[start : start + 4096]
            case "cut off":
                del content[at:]
    return bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_but_a_cogtools_error_comes_out(target: str, tmp_path: Path) -> None:
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.binary(min_size=6, max_size=42) if target == "stated" else mutated(target))
    def holds(content: bytes) -> None:
        TARGETS[target](content, tmp_path)

    holds()


@pytest.mark.parametrize(
    ("entry", "field"),
    [
        ("lora_adapter_metadata", "transformer.r"),
        ("lora_adapter_metadata", "transformer.rank_pattern"),
        ("cogtools", "alpha"),
    ],
)
@pytest.mark.parametrize("command", [("inspect", "--json"), ("verify", "--json")], ids=["inspect", "verify"])
def test_what_is_as_deep_as_json_can_be_read_is_told(
    command: tuple[str, ...], entry: str, field: str, tmp_path: Path
) -> None:
    # Where reading it just succeeds, printing it may fail: that goes deeper by a few calls.
    content = good_lora()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    stated = json.loads(header["__metadata__"][entry])
    path = tmp_path / "pytorch_lora_weights.safetensors"

    def told(levels: int) -> str:
        """What the command says of so many levels, whatever the numbers in it are."""
        stated[field] = f"deep {levels}"
        header["__metadata__"][entry] = dumped(stated)
        path.write_bytes(hostile.safetensors(header, content[8 + size :]))
        return re.sub(r"\d+", "#", run(command, path))

    read, too_deep = 1, 200_000
    refusal = told(too_deep)
    assert told(read) != refusal
    while too_deep - read > 1:
        middle = (read + too_deep) // 2
        if told(middle) == refusal:
            too_deep = middle
        else:
            read = middle
    for levels in range(read - 20, read):
        assert told(levels) != refusal


@pytest.mark.parametrize("seed", ["zip", "zip-without-crc32"])
def test_the_seed_of_a_whole_lora_reaches_the_plan(seed: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(seeds("file")[seed])
    with open_checkpoint(path) as checkpoint:
        plan = plan_lora(checkpoint, diffusers.LAYOUT)
    assert (len(plan.names), plan.rank, plan.transformer.hidden) == (8, 2, 4)


@pytest.mark.parametrize("seed", ["zip", "legacy"])
def test_the_seed_of_every_format_opens(seed: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(seeds("file")[seed])
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == f"torch.save ({seed})"
        assert len(checkpoint.tensors) > 0
