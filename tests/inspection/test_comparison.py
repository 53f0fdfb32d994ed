"""What changed between two LoRAs, against the updates themselves, formed in double precision."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from cogtools import export_lora
from cogtools.inspection.inspect import inspect_checkpoints
from cogtools.inspection.report import LoraComparison
from cogtools.inspection.selection import Selection
from tests.support.command_line import CommandLine
from tests.support.consumers import IN_LAYERS, Updates, product
from tests.support.producers import PEFT_WORDS, PRODUCERS, Factors, after, factors, saved, spelled


def compared(*paths: Path) -> LoraComparison:
    report = inspect_checkpoints(paths, Selection(statistics=True, tree=True))
    assert report.comparison is not None
    return report.comparison


def save(path: Path, made: Factors) -> Path:
    return saved(path, spelled(made, after("transformer."), *PEFT_WORDS))


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()


def updates(made: Factors) -> Updates:
    return {path: product(*pair, 1.0) for path, pair in made.items()}


def assert_is(found: LoraComparison, first: Updates, second: Updates) -> None:
    """Every number of a comparison, against the updates."""
    zeros = {path: torch.zeros_like(update) for path, update in {**first, **second}.items()}
    one, other = zeros | first, zeros | second
    assert len(found.modules) == len(zeros)
    every = [torch.cat([found[path].flatten() for path in zeros]) for found in (one, other)]
    assert found.first_norm == pytest.approx(every[0].norm().item())
    assert found.second_norm == pytest.approx(every[1].norm().item())
    assert found.difference == pytest.approx((every[0] - every[1]).norm().item() / every[0].norm().item(), rel=1e-6)
    assert found.cosine == pytest.approx(cosine(every[0], every[1]), rel=1e-9)


def test_two_loras_differ_as_their_updates_do(tmp_path: Path) -> None:
    first, second = factors(IN_LAYERS, beside=["proj_out"]), factors(IN_LAYERS, beside=["proj_out"], seed=1)
    found = compared(save(tmp_path / "a.safetensors", first), save(tmp_path / "b.safetensors", second))
    assert_is(found, updates(first), updates(second))
    assert (found.only_first, found.only_second) == (0, 0)
    for change in found.modules:
        path = "proj_out" if change.layer is None else None
        if path is not None:
            one, other = updates(first)[path], updates(second)[path]
            assert change.difference == pytest.approx(((one - other).norm() / one.norm()).item())
            assert change.cosine == pytest.approx(cosine(one, other))


def test_ranks_may_differ(tmp_path: Path) -> None:
    first, second = factors(), factors(ranks=lambda _: 7, seed=1)
    found = compared(save(tmp_path / "a.safetensors", first), save(tmp_path / "b.safetensors", second))
    assert_is(found, updates(first), updates(second))


def test_modules_that_one_of_them_lacks_count_as_no_update(tmp_path: Path) -> None:
    first, second = factors(("attn1.to_q", "attn1.to_k")), factors(("attn1.to_k", "attn1.to_v", "ff.net.2"), seed=1)
    found = compared(save(tmp_path / "a.safetensors", first), save(tmp_path / "b.safetensors", second))
    assert_is(found, updates(first), updates(second))
    assert (found.only_first, found.only_second) == (2, 4)
    only = {change.module: (change.difference, change.cosine) for change in found.modules}
    assert only["q"][0] == pytest.approx(1.0)
    assert (only["q"][1], only["v"]) == (None, (None, None))


@pytest.mark.parametrize("change", [1e-12, 1e-6])
def test_a_small_change_comes_out_as_small_as_it_is(change: float, tmp_path: Path) -> None:
    first = {path: (a.double(), b.double()) for path, (a, b) in factors().items()}
    second = {path: (a * (1 + change), b) for path, (a, b) in first.items()}
    found = compared(save(tmp_path / "a.safetensors", first), save(tmp_path / "b.safetensors", second))
    assert found.difference == pytest.approx(change, rel=1e-3)
    assert found.cosine == pytest.approx(1.0)


def test_one_lora_in_two_layouts_has_not_changed(tmp_path: Path) -> None:
    made = PRODUCERS["peft_stabilised"](tmp_path / "in")
    formats = [export_lora(made.path, tmp_path / name, format=name).output for name in ("comfyui", "videox-fun")]
    for one, other in pairwise([made.path, *formats]):
        found = compared(one, other)
        assert found.difference is not None
        assert found.difference < 1e-7  # an alpha is a float32
        assert found.cosine == pytest.approx(1.0)


def test_the_scale_is_part_of_an_update(tmp_path: Path) -> None:
    made = PRODUCERS["sats_own_exporter"](tmp_path / "in")
    repaired = export_lora(made.path, tmp_path / "out", alpha=1).output
    found = compared(made.path, repaired)
    assert found.difference == pytest.approx(0.75)
    assert found.cosine == pytest.approx(1.0)


def test_what_cannot_be_computed_is_left_out_with_its_reason(tmp_path: Path) -> None:
    first, second = factors(), factors(seed=1)
    second["transformer_blocks.0.attn1.to_q"][0][0, 0] = torch.nan
    found = compared(save(tmp_path / "a.safetensors", first), save(tmp_path / "b.safetensors", second))
    reasons = {(change.layer, change.module): change.not_computed for change in found.modules if change.not_computed}
    assert reasons == {(0, "q"): "NaN or infinity"}
    rest = [
        torch.cat([update.flatten() for path, update in updates(made).items() if not path.endswith("0.attn1.to_q")])
        for made in (first, second)
    ]
    assert found.cosine == pytest.approx(cosine(rest[0], rest[1]))


def test_nothing_is_compared_without_statistics_or_of_one(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", factors())
    assert inspect_checkpoints([path, path], Selection()).comparison is None
    assert inspect_checkpoints([path], Selection(statistics=True)).comparison is None


def test_the_change_is_printed_last_with_a_row_for_each_layer(cogtools_cli: CommandLine, tmp_path: Path) -> None:
    first = save(tmp_path / "a.safetensors", factors(("attn1.to_q", "ff.net.2"), beside=["proj_out"]))
    second = save(tmp_path / "b.safetensors", factors(("attn1.to_q",), beside=["proj_out"], seed=1))
    result = cogtools_cli("inspect", first, second, "--stats", "--tree")
    assert result.code == 0
    lines = result.out.splitlines()
    start = next(place for place, line in enumerate(lines) if line.startswith("change "))
    assert lines[start].endswith("5 modules, 2 modules in the first only")
    assert lines[start + 2].split() == ["layer", "q", "ff_out", "q", "ff_out"]
    assert [line.split()[0] for line in lines[start + 3 :]] == ["0", "1", "proj_out"]
    assert [line.split()[-1] for line in lines[start + 3 : start + 5]] == ["-", "-"]


def test_json_has_all_of_it(cogtools_cli: CommandLine, tmp_path: Path) -> None:
    first = save(tmp_path / "a.safetensors", factors())
    second = save(tmp_path / "b.safetensors", factors(("attn1.to_q",), seed=1))
    comparison = cogtools_cli("inspect", first, second, "--stats", "--json").json["report"]["comparison"]
    assert (len(comparison["modules"]), comparison["only_first"], comparison["only_second"]) == (8, 6, 0)
