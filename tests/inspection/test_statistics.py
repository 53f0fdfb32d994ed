"""Statistics, the strength of updates, and how they are shown: numbers equal torch's, pictures can be opened."""

import json
import math
import os
import re
import struct
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cogtools.checkpoint.opening import open_checkpoint
from cogtools.errors import CogtoolsError
from cogtools.inspection import statistics
from cogtools.inspection.inspect import inspect_checkpoint, inspect_checkpoints
from cogtools.inspection.plot import titles
from cogtools.inspection.report import CheckpointReport, Statistics, UpdateReport
from cogtools.inspection.selection import Selection
from cogtools.inspection.updates import update_strength
from cogtools.render.folding import fold, open_lines
from cogtools.render.table import Group, group_by_prefix, last_segments
from tests.support.command_line import CommandLine, on_terminal
from tests.support.factories import COGVIDEOX_2B, SAVERS, TOY_2B, fill_lora, sat_checkpoint, sat_state_dict, zoo


def by_torch(tensor: torch.Tensor) -> Statistics:
    """The same statistics, computed by torch."""
    numbers = tensor.detach().contiguous().to(torch.float64).flatten()
    finite = numbers[numbers.isfinite()]
    return Statistics(
        min=finite.min().item() if finite.numel() else None,
        max=finite.max().item() if finite.numel() else None,
        mean=finite.mean().item() if finite.numel() else None,
        std=finite.std().item() if finite.numel() > 1 else None,
        norm=finite.norm().item() if finite.numel() else None,
        zeros=(numbers == 0).double().mean().item() if numbers.numel() else None,
        nans=int(numbers.isnan().sum()),
        infs=int(numbers.isinf().sum()),
    )


def rounded(found: Statistics | None) -> tuple[object, ...]:
    """The statistics to the digits that do not depend on the order of additions."""
    assert found is not None
    values = (found.min, found.max, found.mean, found.std, found.norm, found.zeros, found.nans, found.infs)
    return (*(None if value is None else round(value, 9) for value in values), found.not_computed)


def statistics_of(path: Path) -> dict[str, Statistics | None]:
    report = inspect_checkpoint(path, Selection(statistics=True))
    return {tensor.key: tensor.statistics for tensor in report.tensors}


@pytest.fixture(params=[1 << 17, 5], ids=["whole", "in pieces of 5"])
def piece_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read tensors whole, or in many small pieces."""
    monkeypatch.setattr(statistics, "PIECE_ELEMENTS", request.param)


@pytest.mark.usefixtures("piece_elements")
@pytest.mark.parametrize("saver", ["zip", "legacy", "big-endian", "deflated"])
def test_statistics_equal_torchs(tmp_path: Path, saver: str) -> None:
    state = {key: tensor for key, tensor in zoo().items() if not tensor.is_complex()}
    SAVERS[saver](state, tmp_path / "a.pt")
    found = statistics_of(tmp_path / "a.pt")
    assert {key: rounded(value) for key, value in found.items()} == {
        key: rounded(by_torch(tensor)) for key, tensor in state.items()
    }


FLOATS = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2,
          torch.float8_e5m2fnuz, torch.float8_e8m0fnu]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_bit_pattern_is_the_number_that_torch_has(tmp_path: Path, dtype: torch.dtype) -> None:
    bits = torch.uint8 if dtype.itemsize == 1 else torch.int16
    patterns = torch.arange(2 ** (8 * dtype.itemsize)).to(bits).view(dtype).reshape(64, -1)
    torch.save({f"{number}": pattern for number, pattern in enumerate(patterns)}, tmp_path / "a.pt")
    found = statistics_of(tmp_path / "a.pt")
    for number, pattern in enumerate(patterns):
        one, other = found[str(number)], by_torch(pattern)
        assert one is not None
        assert (one.min, one.max, one.zeros, one.nans, one.infs) == (
            *(other.min, other.max, other.zeros, other.nans, other.infs),
        )


def test_values_that_are_not_finite_are_counted_and_left_out(tmp_path: Path) -> None:
    values = torch.tensor([1.0, math.nan, 3.0, math.inf, -math.inf, 0.0, math.nan, math.inf])
    torch.save({"a": values, "all": torch.full((4,), math.nan)}, tmp_path / "a.pt")
    found = statistics_of(tmp_path / "a.pt")
    assert rounded(found["a"]) == rounded(
        Statistics(0, 3, 4 / 3, 1.527525231651947, math.sqrt(10), 1 / 8, nans=2, infs=3)
    )
    assert found["all"] == Statistics(zeros=0.0, nans=4, infs=0)


def test_large_integers_are_exact(tmp_path: Path) -> None:
    torch.save({"a": torch.tensor([2**62 + 1, -(2**62) - 3])}, tmp_path / "a.pt")
    found = statistics_of(tmp_path / "a.pt")["a"]
    assert found is not None
    assert (found.min, found.max) == (-(2**62) - 3, 2**62 + 1)


def test_numbers_beyond_json_are_told_as_none(cogtools_cli: CommandLine, tmp_path: Path) -> None:
    torch.save({"a": torch.tensor([1e300, 1e300], dtype=torch.float64)}, tmp_path / "a.pt")
    result = cogtools_cli("inspect", tmp_path / "a.pt", "--stats", "--json")
    assert result.code == 0
    assert result.json["report"]["checkpoints"][0]["tensors"][0]["statistics"]["norm"] is None


def test_what_has_no_statistics_says_why(tmp_path: Path) -> None:
    overlapping = torch.arange(6.0).as_strided((4, 3), (1, 1))
    torch.save({"complex": torch.ones(2, dtype=torch.complex64), "overlapping": overlapping}, tmp_path / "a.pt")
    assert statistics_of(tmp_path / "a.pt") == {
        "complex": Statistics(not_computed="complex64 has no order and no sign"),
        "overlapping": Statistics(not_computed="its elements overlap in the storage"),
    }


def test_a_tensor_that_repeats_itself_without_end_takes_no_time(tmp_path: Path) -> None:
    torch.save({"a": torch.tensor([[1.0], [3.0]]).expand(2, 10**12)}, tmp_path / "a.pt")
    found = statistics_of(tmp_path / "a.pt")["a"]
    assert found is not None
    assert (found.min, found.max, found.mean, round(found.std or 0, 9), found.zeros) == (1, 3, 2, 1, 0)


@pytest.mark.parametrize("how", ["whole", "transposed", "sliced"])
def test_memory_does_not_grow_with_a_tensor(tmp_path: Path, how: str) -> None:
    tensor = torch.ones(2000, 2000)  # 16 MB
    views = {"whole": tensor, "transposed": tensor.T, "sliced": tensor[:, 1::3]}
    torch.save({"a": views[how]}, tmp_path / "a.pt")
    with open_checkpoint(tmp_path / "a.pt") as checkpoint:
        statistics.tensor_statistics(checkpoint.tensors["a"])  # NumPy imports parts of itself now
        tracemalloc.start()
        found = statistics.tensor_statistics(checkpoint.tensors["a"])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert (found.mean, found.std) == (1, 0)
    assert peak < 8_000_000


# Updates


def lora_state(rank: int = 4) -> dict[str, torch.Tensor]:
    state = sat_state_dict(TOY_2B, rank, torch.float32)
    fill_lora(state, seed=3)
    return state


def test_updates_have_the_norm_and_the_effective_rank_of_the_whole_matrix(tmp_path: Path) -> None:
    state = lora_state()
    torch.save({"module": state}, tmp_path / "a.pt")
    lora = inspect_checkpoint(tmp_path / "a.pt", updates=True).lora
    assert lora is not None
    assert lora.updates is not None
    expected = []
    for layer in range(3):
        prefix = f"model.diffusion_model.transformer.layers.{layer}.attention."
        for name, (module, part) in {
            **{name: ("query_key_value", part) for part, name in enumerate("qkv")},
            "out": ("dense", 0),
        }.items():
            a, b = (state[f"{prefix}{module}.matrix_{factor}.{part}"].double() for factor in "AB")
            update = 0.25 * b @ a
            shares = torch.linalg.svdvals(update)[:4]
            shares = shares / shares.sum()
            effective_rank = math.exp(-(shares * shares.log()).sum().item())
            expected.append((layer, name, round(update.norm().item(), 12), round(effective_rank, 6)))
    assert [
        (update.layer, update.module, round(update.norm or 0, 12), round(update.effective_rank or 0, 6))
        for update in lora.updates
    ] == expected


def test_the_effective_rank_counts_directions() -> None:
    one = torch.zeros(8, 5, dtype=torch.float64)
    one[0, 0] = 2
    three = torch.zeros(8, 5, dtype=torch.float64)
    three[0, 0] = three[1, 1] = three[2, 2] = 2
    a = torch.eye(5, 6, dtype=torch.float64).numpy()
    strengths = [update_strength(a, b.numpy()) for b in (torch.zeros_like(one), one, three)]
    assert [tuple(round(value, 9) for value in strength) for strength in strengths] == [
        *((0, 0), (2, 1), (round(math.sqrt(12), 9), 3)),
    ]


PREFIX = "model.diffusion_model.transformer.layers."


def updates_of(state: dict[str, torch.Tensor], path: Path) -> tuple[UpdateReport, ...]:
    torch.save({"module": state}, path)
    lora = inspect_checkpoint(path, updates=True).lora
    assert lora is not None
    assert lora.updates is not None
    return lora.updates


def test_a_module_whose_update_cannot_be_computed_is_listed_with_the_reason(tmp_path: Path) -> None:
    state = lora_state()
    del state[PREFIX + "0.attention.dense.matrix_B.0"]
    state[PREFIX + "1.attention.query_key_value.matrix_A.2"].fill_(math.inf)
    state[PREFIX + "2.attention.query_key_value.matrix_B.0"][3, 1] = math.nan
    state[PREFIX + "2.attention.query_key_value.matrix_A.1"] = torch.ones(3, 128)
    updates = updates_of(state, tmp_path / "a.pt")
    assert [(update.layer, update.module) for update in updates] == [
        (layer, name) for layer in range(3) for name in ("q", "k", "v", "out")
    ]
    assert {
        (update.layer, update.module): update.not_computed for update in updates if update.not_computed is not None
    } == {
        (0, "out"): "one factor only",
        (1, "v"): "NaN or infinity",
        (2, "q"): "NaN or infinity",
        (2, "k"): "factors of different ranks",
    }
    assert all((update.norm is None) == (update.not_computed is not None) for update in updates)


def test_what_is_not_computed_is_said_with_layers_folded(cogtools_cli: CommandLine, tmp_path: Path) -> None:
    state = lora_state()
    for layer, factor in ((0, "A.2"), (1, "A.2"), (2, "B.0")):
        state[f"{PREFIX}{layer}.attention.query_key_value.matrix_{factor}"].fill_(math.nan)
    torch.save({"module": state}, tmp_path / "a.pt")
    told = "\nnot computed: 3 modules with NaN or infinity (layers 0-1: v; layer 2: q)\n"
    assert told in cogtools_cli("inspect", tmp_path / "a.pt", "--stats", "--limit", "0").out
    narrow = on_terminal(60, "inspect", tmp_path / "a.pt", "--stats", "--limit", "0", NO_COLOR="1")
    assert "\nnot computed: 3 modules with NaN or infinity (layers 0-1: v;\nlayer 2: q)\n" in narrow


@pytest.mark.parametrize("exponent", [-200, 140, 150])
def test_updates_of_very_small_and_very_large_values_are_computed(tmp_path: Path, exponent: int) -> None:
    state = {key: tensor.double() for key, tensor in lora_state().items()}
    small = updates_of(state, tmp_path / "a.pt")
    for key, tensor in state.items():
        if ".matrix_" in key:
            tensor *= 10.0**exponent if ".matrix_A" in key else 1
    large = updates_of(state, tmp_path / "b.pt")
    assert [update.norm for update in large] == pytest.approx([(update.norm or 0) * 10.0**exponent for update in small])
    assert [update.effective_rank for update in large] == pytest.approx([update.effective_rank for update in small])


def test_an_update_beyond_double_precision_is_no_number_and_no_crash(tmp_path: Path) -> None:
    state = {key: tensor.double() for key, tensor in lora_state().items()}
    for key, tensor in state.items():
        if ".matrix_" in key:
            tensor.fill_(1e200)
    updates = updates_of(state, tmp_path / "a.pt")
    assert {update.not_computed for update in updates} == {"an update too large for double precision"}


def test_every_module_is_scaled_by_its_own_rank(tmp_path: Path) -> None:
    state, wider = lora_state(), lora_state(8)
    of_four, of_eight = updates_of(state, tmp_path / "4.pt"), updates_of(wider, tmp_path / "8.pt")
    state |= {key: tensor for key, tensor in wider.items() if key.startswith(PREFIX + "1.")}
    mixed = updates_of(state, tmp_path / "a.pt")
    assert mixed == (*of_four[:4], *of_eight[4:8], *of_four[8:])
    assert [update.scaling for update in mixed] == [0.25] * 4 + [0.125] * 4 + [0.25] * 4
    report = inspect_checkpoint(tmp_path / "a.pt").lora
    assert report is not None
    assert report.scalings == (0.125, 0.25)


def diffusers_file(path: Path, alpha_pattern: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"transformer.transformer_blocks.{layer}.attn1.{module}.lora_{factor}.weight": torch.randn(
            shape, generator=generator
        )
        for layer in range(2)
        for module in ("to_q", "to_k", "to_v", "to_out.0")
        for factor, shape in (("A", (4, 64)), ("B", (64, 4)))
    }
    fields = {"r": 4, "lora_alpha": 2, "rank_pattern": {}, "alpha_pattern": alpha_pattern}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in fields.items()})}
    save_file(tensors, path, metadata=metadata)


def test_an_alpha_pattern_scales_its_modules_and_changes_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    patterns: list[dict[str, float]] = [{}, {"to_q": 8}]
    found = []
    for pattern in patterns:
        diffusers_file(tmp_path / "a.safetensors", pattern)
        report = inspect_checkpoints([tmp_path / "a.safetensors"], plot=tmp_path / "a.png")
        lora = report.checkpoints[0].lora
        assert lora is not None
        found.append((lora.updates or (), (tmp_path / "a.png").read_bytes()))
    (plain, picture), (patterned, other_picture) = found
    assert [update.norm for update in patterned] == pytest.approx(
        [(update.norm or 0) * (4 if update.module == "q" else 1) for update in plain]
    )
    assert [update.scaling for update in patterned] == [2, 0.5, 0.5, 0.5] * 2
    assert picture != other_picture


def test_numpy_gets_one_thread_before_it_is_imported_unless_told_otherwise(tmp_path: Path) -> None:
    torch.save({"module": lora_state()}, tmp_path / "a.pt")
    code = (
        "import os, sys; from cogtools.cli import run\n"
        "class Watch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'numpy': print('threads', os.environ.get('OPENBLAS_NUM_THREADS'))\n"
        "sys.meta_path.insert(0, Watch())\n"
        f"run(['inspect', {str(tmp_path / 'a.pt')!r}, '--stats', '--limit', '0'])"
    )
    for given, threads in (({}, "1"), ({"OPENBLAS_NUM_THREADS": "3"}, "3")):
        clean = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**clean, **given}
        )
        assert [line for line in done.stdout.splitlines() if line.startswith("threads")] == [f"threads {threads}"]


# Pictures


def test_pictures_are_drawn_of_one_checkpoint_and_of_two(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        torch.save({"module": lora_state()}, tmp_path / f"{name} $x_1$ <&>.pt")
    one, other = sorted(tmp_path.glob("*.pt"))
    report = inspect_checkpoints([one], plot=tmp_path / "one.png")
    assert report.plot == tmp_path / "one.png"
    width, height = struct.unpack(">2I", (tmp_path / "one.png").read_bytes()[16:24])
    inspect_checkpoints([one, other], plot=tmp_path / "two.png")
    wider, as_high = struct.unpack(">2I", (tmp_path / "two.png").read_bytes()[16:24])
    assert wider > width > height == as_high


def test_the_same_checkpoint_gives_the_same_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    torch.save({"module": lora_state()}, tmp_path / "a.pt")
    for name in ("1.svg", "2.svg", "1.png", "2.png"):
        inspect_checkpoints([tmp_path / "a.pt"], plot=tmp_path / name)
    assert (tmp_path / "1.svg").read_bytes().startswith(b"<?xml")
    assert (tmp_path / "1.svg").read_bytes() == (tmp_path / "2.svg").read_bytes()
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    torch.save({"module": {"weight": torch.ones(2)}}, tmp_path / "none.pt")
    torch.save({"module": lora_state()}, tmp_path / "a.pt")
    broken = {key: torch.full_like(tensor, math.nan) for key, tensor in lora_state().items()}
    torch.save({"module": broken}, tmp_path / "nan.pt")
    save_file({"network.layers.0.lora_A.weight": torch.ones(4, 8)}, tmp_path / "other.safetensors")
    save_file({"diffusion_model.blocks.0.q.lora_A.weight": torch.ones(4, 8)}, tmp_path / "unpaired.safetensors")

    def refusal(*paths: Path, plot: str) -> tuple[str, str | None]:
        with pytest.raises(CogtoolsError) as raised:
            inspect_checkpoints(paths, plot=tmp_path / plot)
        return raised.value.what, raised.value.found

    a = tmp_path / "a.pt"
    assert refusal(tmp_path / "none.pt", plot="a.png") == ("there is no LoRA in this checkpoint to draw", None)
    assert refusal(tmp_path / "other.safetensors", plot="a.png")[0] == (
        "the updates of a LoRA in this layout are not computed"
    )
    assert refusal(tmp_path / "unpaired.safetensors", plot="a.png") == (
        "no update of this LoRA can be computed",
        "1 module with one factor only",
    )
    assert refusal(tmp_path / "nan.pt", plot="a.png") == (
        "no update of this LoRA can be computed",
        "12 modules with NaN or infinity",
    )
    assert refusal(a, a, a, plot="a.png")[0] == "--plot draws one checkpoint, or two against each other"
    assert refusal(a, plot="a.jpeg")[0] == "--plot draws a picture"
    (tmp_path / "folder.png").mkdir()
    missing = tmp_path / "missing.pt"  # nothing is read before the picture's place is found good
    no_folder = "the picture cannot be written: there is no such folder"
    assert refusal(missing, plot="no/such/folder/a.png")[0] == no_folder
    assert refusal(missing, plot="folder.png")[0] == "the picture cannot be written: there is a folder of that name"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.pt", "folder.png", "nan.pt", "none.pt", "other.safetensors", "unpaired.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["run/1000/a.pt"], ["a.pt"]),
        (["run/1000/a.pt", "run/2000/a.pt"], ["1000", "2000"]),
        (["one/1000/a.pt", "other/1000/a.pt"], ["one", "other"]),
        (["one/1000/a.pt", "other/2000/b.pt"], ["one/1000/a.pt", "other/2000/b.pt"]),
        (["run/a.pt", "run/a.pt"], ["a.pt (1)", "a.pt (2)"]),
        (["a.pt", "run/a.pt"], ["a.pt", "run"]),
    ],
)
def test_titles_are_what_tells_two_paths_apart(
    toy_report: CheckpointReport, paths: list[str], expected: list[str]
) -> None:
    assert titles([replace(toy_report, checkpoint=Path(path)) for path in paths]) == expected


@pytest.fixture
def toy_report(tmp_path: Path) -> CheckpointReport:
    torch.save({"module": lora_state()}, tmp_path / "a.pt")
    return inspect_checkpoint(tmp_path / "a.pt")


def test_without_matplotlib_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CogtoolsError) as raised:
        inspect_checkpoints([tmp_path / "a.pt"], plot=tmp_path / "a.png")
    assert (raised.value.what, str(raised.value.hint)) == (
        "--plot needs matplotlib, which is not installed",
        "pip install matplotlib, or cogtools with its extra plot",
    )


# On a terminal


SGR = re.compile("\x1b\\[[0-9;]*m")
BOLD_OR_DIM = {"\x1b[1m", "\x1b[2m", "\x1b[0m"}
"""What rich still uses where NO_COLOR is set."""


@pytest.mark.parametrize("columns", [80, 160])
@pytest.mark.parametrize(
    "options", [[], ["--tree"], ["--stats", "--lora"], ["--offsets"], ["--sort", "size"]], ids=" ".join
)
def test_on_a_terminal_every_line_fits(tmp_path: Path, columns: int, options: list[str]) -> None:
    torch.save(sat_checkpoint(sat_state_dict(TOY_2B, 4)), tmp_path / "a.pt")
    coloured = on_terminal(columns, "inspect", tmp_path / "a.pt", *options)
    plain = on_terminal(columns, "inspect", tmp_path / "a.pt", *options, NO_COLOR="1")
    assert "\x1b[36m" in coloured
    assert set(SGR.findall(plain)) <= BOLD_OR_DIM
    plain = SGR.sub("", plain)
    assert SGR.sub("", coloured) == plain
    assert "\x1b" not in plain
    assert max(map(len, plain.splitlines()[1:])) <= columns  # the first line is the path
    assert not re.search(r"\d$\n\s+(bytes|[kMG]B)", plain, re.MULTILINE)
    if options in ([], ["--stats", "--lora"]):
        assert "layers.0.attention.query_key_value.matrix_A.0 " in plain


def test_a_long_key_is_shown_from_the_start_of_a_segment_on() -> None:
    key = "model.diffusion_model.transformer.layers.0.attention.dense.matrix_A.0"
    assert [last_segments(key, width) for width in (80, 40, 20, 4)] == [
        key,
        "…layers.0.attention.dense.matrix_A.0",
        "…dense.matrix_A.0",
        "…0",
    ]
    assert last_segments("a." * 10**6 + "b", 20) == "…" + "a." * 9 + "b"  # at once, however many segments


def test_keys_that_follow_each_other_are_cut_at_one_place_that_is_spelled_out() -> None:
    keys = ["m.mix.a.weight", "m.mix.b.weight", "m.mix.ccc.bias", "m.mix.ccc.weight"]
    names = ("attention.dense.original", "attention.qkv", "mlp")
    keys += [f"m.layers.{layer}.{name}.weight" for layer in (0, 1) for name in names]
    assert group_by_prefix(keys, 42) == [Group("", keys)]
    assert group_by_prefix(keys, 41) == [Group("m.", keys)]
    assert group_by_prefix(keys, 32) == [
        Group("m.mix.", keys[:4]),
        Group("m.layers.0.", keys[4:7]),
        Group("m.layers.1.", keys[7:]),
    ]
    # As they stand in another order, the lines that spell the beginnings out would be as many as the keys.
    shuffled = [key for pair in zip(keys[:4], keys[4:], strict=False) for key in pair]
    assert group_by_prefix(shuffled, 32) == [Group("m.", shuffled)]
    assert group_by_prefix(["x" * 50], 20) == [Group("", ["x" * 50])]


@pytest.mark.slow
def test_keys_that_branch_at_every_segment_are_no_matter() -> None:
    deep = ".".join(["a"] * 3000).split(".")
    keys = [".".join([*deep[:depth], "b"]) for depth in range(3000)]
    assert sum(len(group.keys) for group in group_by_prefix(keys, 20)) == 3000


# The tree


def test_a_tree_folds_equal_layers_onto_one_screen(tmp_path: Path) -> None:
    state = sat_state_dict(COGVIDEOX_2B, 1, base="telling")
    torch.save(sat_checkpoint(state), tmp_path / "a.pt")
    report = inspect_checkpoint(tmp_path / "a.pt")
    lines = [(line.depth, line.label, line.times, line.detail) for line, _ in open_lines(fold(report.tensors), 44)]
    assert lines == [
        (0, "model.diffusion_model", 1, "242 tensors"),
        (1, "transformer.layers", 1, "241 tensors"),
        (2, "0", 1, "9 tensors"),
        (3, "attention", 1, "8 tensors"),
        (4, "dense", 1, "2 tensors"),
        (5, "matrix_A.0", 1, "float16 (1, 1920)"),
        (5, "matrix_B.0", 1, "float16 (1920, 1)"),
        (4, "query_key_value", 1, "6 tensors"),
        (5, "matrix_A.0-2", 3, "float16 (1, 1920)"),
        (5, "matrix_B.0-2", 3, "float16 (1920, 1)"),
        (3, "input_layernorm.weight", 1, "float16 (1920,)"),
        (2, "1-29.attention", 29, "232 tensors"),
        (3, "dense", 1, "58 tensors"),
        (4, "matrix_A.0", 1, "float16 (1, 1920)"),
        (4, "matrix_B.0", 1, "float16 (1920, 1)"),
        (3, "query_key_value", 1, "174 tensors"),
        (4, "matrix_A.0-2", 3, "float16 (1, 1920)"),
        (4, "matrix_B.0-2", 3, "float16 (1920, 1)"),
        (1, "mixins.patch_embed.proj.weight", 1, "float16 (1920, 16, 2, 2)"),
        (0, "cuda_rng_state", 1, "uint8 (16,)"),
        (0, "torch_rng_state", 1, "uint8 (5056,)"),
        (0, "frozen_param_fragments", 1, "2 tensors, keys as above"),
    ]
    assert sum(line.size_bytes for line in fold(report.tensors)) == sum(tensor.size_bytes for tensor in report.tensors)


def test_into_a_pipe_a_tree_is_open_everywhere(cogtools_cli: CommandLine, tmp_path: Path) -> None:
    torch.save(sat_checkpoint(sat_state_dict(TOY_2B, 4)), tmp_path / "a.pt")
    report = inspect_checkpoint(tmp_path / "a.pt")
    assert all(is_open for _, is_open in open_lines(fold(report.tensors)))
    out = cogtools_cli("inspect", tmp_path / "a.pt", "--tree").out
    assert "norm_layer.{bias, weight}" in out
    assert " +" not in out


@pytest.mark.parametrize(("columns", "rows"), [(80, 50), (160, 40), (80, 60)])
def test_on_a_terminal_header_and_tree_fit_the_screen(tmp_path: Path, columns: int, rows: int) -> None:
    torch.save(sat_checkpoint(sat_state_dict(TOY_2B, 4)), tmp_path / "a.pt")
    lines = on_terminal(columns, "inspect", tmp_path / "a.pt", "--tree", NO_COLOR="1", rows=rows).splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("model.diffusion_model"))
    assert rows - 8 <= len(lines) < rows or rows // 2 - 8 <= len(lines) - first <= rows // 2 + 1
    assert lines[-1] == "+ means more below: list it with --keys GLOB"


def test_a_label_is_cut_in_the_middle_and_keeps_its_count(tmp_path: Path) -> None:
    layer = {f"{name}_layernorm_of_the_layer.{leaf}": torch.ones(9) for name in ("input", "output") for leaf in "ab"}
    state = {f"m.layers.{number}.{key}": tensor for number in range(3) for key, tensor in layer.items()}
    torch.save({"module": {**state, "m.x": torch.ones(1)}}, tmp_path / "a.pt")
    plain = on_terminal(60, "inspect", tmp_path / "a.pt", "--tree", NO_COLOR="1")
    assert "\n  layers.0…_the_layer}.{a, b} (6 x)  float32 (9,)  432 bytes\n" in plain
    whole_bar = on_terminal(80, "inspect", tmp_path / "a.pt", "--tree", NO_COLOR="1")
    assert max(map(len, whole_bar.splitlines()[1:])) == 80


def test_with_tree_statistics_are_those_of_the_updates_only(tmp_path: Path) -> None:
    torch.save({"module": lora_state()}, tmp_path / "a.pt")
    (report,) = inspect_checkpoints([tmp_path / "a.pt"], Selection(tree=True, statistics=True)).checkpoints
    assert report.lora is not None
    assert len(report.lora.updates or ()) == 12
    assert {tensor.statistics for tensor in report.tensors} == {None}
