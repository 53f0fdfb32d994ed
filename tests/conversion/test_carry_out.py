"""Every planned tensor gets its own bytes, in whatever order a layout's keys are."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cogtools.checkpoint.formats.safetensors import safetensors_header
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.conversion.carry_out import PlannedFile, write
from cogtools.conversion.options import ExportOptions
from cogtools.conversion.output import AtomicFile
from cogtools.conversion.plan import plan_lora, planned_tensors
from cogtools.layouts import comfyui, diffusers
from cogtools.layouts.family import IN_LAYERS, LoraKey
from cogtools.layouts.lora import LoraLayout, Names, Spelling, Style
from cogtools.layouts.recognition import LAYOUTS
from tests.support.loras import Factors, factors, save_lora

ALPHA, SCALING = 1.0, 0.25  # of rank 4
MODULES = ("q", "out", "ff_in", "norm1")


@st.composite
def layouts(draw: st.DrawFn) -> LoraLayout:
    """A layout whose keys have any order: as in SAT's, modules may share a name, and have the factor within theirs."""
    factor_a, factor_b = draw(st.permutations("xy"))
    style = Style("the factors", {"A": factor_a, "B": factor_b}, before_index=draw(st.booleans()))
    places = draw(st.permutations(range(len(IN_LAYERS))))
    rows = {module: f"{draw(st.sampled_from('ab'))}.{place}" for module, place in zip(IN_LAYERS, places, strict=True)}
    spelling = Spelling(Names("the modules", draw(st.sampled_from(["{}.", "l.{}.m."])), rows), style, "")
    return replace(diffusers.LAYOUT, written=spelling, also_read=())


def written(source: Path, layout: LoraLayout, options: ExportOptions, target: Path) -> dict[str, torch.Tensor]:
    """What safetensors reads of a LoRA that was written in a layout."""
    with open_checkpoint(source) as checkpoint:
        tensors = tuple(planned_tensors(plan_lora(checkpoint, layout), options))
        file = PlannedFile(target.name, safetensors_header(tensors, {}), tensors)
        write(AtomicFile(target, overwrite=True), [file], checkpoint.files, None, sha256=False)
    return load_file(target)


def expected(made: Factors, layout: LoraLayout, options: ExportOptions) -> dict[str, torch.Tensor]:
    """The same, by the keys of single tensors."""
    factor = {"A": 1.0, "B": SCALING if options.scale == "fold" else 1.0}
    numbers = {name: tensor.float() * factor[name.part] for name, tensor in made.items()}
    dtype = torch.float32 if options.dtype == "fp32" else torch.float16
    return {str(layout.key(name)): tensor.to(dtype) for name, tensor in numbers.items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if found[key].dtype != wanted[key].dtype] == []
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


def are_neighbours(keys: Iterable[str], layout: LoraLayout) -> bool:
    """Whether both factors of every module stand next to each other in this order."""
    modules = [name.module for key in keys if (name := layout.parse(key)) is not None]
    return all(modules[place] == modules[place + 1] for place in range(0, len(modules), 2))


@pytest.fixture(scope="module")
def half() -> Factors:
    """A LoRA in fp16, square modules and others, no two tensors alike."""
    return factors(MODULES, dtype=torch.float16)


@pytest.fixture(scope="module")
def source(half: Factors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lora(tmp_path_factory.mktemp("source"), comfyui.LAYOUT, half, ALPHA)


OPTIONS = {
    "bytes": ExportOptions(),
    "cast-fold": ExportOptions(dtype="fp32", scale="fold"),
}


@pytest.mark.parametrize("how", OPTIONS)
def test_a_tensor_is_under_its_own_key_whatever_the_order_of_the_keys(
    how: str, half: Factors, source: Path, tmp_path: Path
) -> None:
    apart = []

    @settings(
        max_examples=15,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(layouts())
    def holds(layout: LoraLayout) -> None:
        found = written(source, layout, OPTIONS[how], tmp_path / "lora.safetensors")
        wanted = expected(half, layout, OPTIONS[how])
        assert_same(found, wanted)
        apart.append(not are_neighbours(sorted(wanted), layout))

    holds()
    assert any(apart)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_what_is_planned_is_in_the_order_of_its_keys(layout: LoraLayout, tmp_path: Path) -> None:
    path = save_lora(tmp_path, comfyui.LAYOUT, factors(), ALPHA)
    with open_checkpoint(path) as checkpoint:
        plan = plan_lora(checkpoint, layout)
        planned = planned_tensors(plan, ExportOptions(scale="fold", dtype="fp32"))
    keys = [tensor.key for tensor in planned]
    assert keys == sorted(keys)
    assert {layout.parse(key): tensor.source for key, tensor in zip(keys, planned, strict=True)} == {
        name: comfyui.LAYOUT.key(name) for name in plan.names
    }


def test_in_sats_layout_the_factors_of_a_module_are_not_neighbours() -> None:
    sat = next(layout for layout in LAYOUTS if layout.name == "sat")
    keys = sorted(str(sat.key(name)) for name in factors())
    assert not are_neighbours(keys, sat)
    assert sat.parse(keys[0]) == LoraKey(0, "out", "A")
