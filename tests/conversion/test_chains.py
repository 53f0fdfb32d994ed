"""Any LoRA through any chain of formats keeps its modules and its updates: random LoRAs, drawn by hypothesis."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, get_args

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from cogtools import export_lora, read_lora
from cogtools.conversion.options import Format
from tests.support.consumers import BESIDE, CONSUMERS, IN_LAYERS, product
from tests.support.producers import ATTENTION, PEFT_WORDS, Factors, after, config, factors, saved, spelled

FORMATS: tuple[Format, ...] = get_args(Format)

FEW = settings(max_examples=25, deadline=None, derandomize=True, database=None)


class RandomLora(NamedTuple):
    """A LoRA whose modules have ranks and alphas of their own, and the formats that can hold it."""

    factors: Factors
    alphas: dict[str, float]
    formats: list[Format]

    @property
    def scalings(self) -> dict[str, float]:
        """What each module's update is multiplied by."""
        return {path: self.alphas[path] / len(a) for path, (a, _) in self.factors.items()}

    def save(self, folder: Path) -> Path:
        """Write it as a PEFT folder, which states a rank and an alpha for each module."""
        saved(folder / "adapter_model.safetensors", spelled(self.factors, after("base_model.model."), *PEFT_WORDS))
        ranks = {path: len(a) for path, (a, _) in self.factors.items()}
        config(self.factors, folder, r=next(iter(ranks.values())), lora_alpha=next(iter(self.alphas.values())),
               rank_pattern=ranks, alpha_pattern=self.alphas, target_modules=list(self.factors))  # fmt: skip
        return folder


ALPHAS = st.one_of(
    st.integers(1, 256).map(float),
    st.floats(2.0**-10, 2.0**10, width=32),
    st.sampled_from([0.25, 0.5, 1.0, 2.0]),
)


@st.composite
def loras(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], *, powers_of_two: bool = False) -> RandomLora:
    """Any kinds of modules in some layers and beside them; of one rank and alpha, or of many."""
    names = draw(st.lists(st.sampled_from(list(IN_LAYERS)), unique=True, min_size=1))
    beside = draw(st.lists(st.sampled_from(list(BESIDE)), unique=True, max_size=3))
    attention_only = draw(st.booleans())
    if attention_only:
        names, beside = draw(st.lists(st.sampled_from(ATTENTION), unique=True, min_size=1)), []
    sizes = st.sampled_from([1, 2, 4]) if powers_of_two else st.integers(1, 5)
    alphas = st.sampled_from([0.25, 0.5, 1.0, 2.0, 16.0]) if powers_of_two else ALPHAS
    layers, is_mixed = draw(st.integers(1, 3)), draw(st.booleans())
    every = [f"transformer_blocks.{layer}.{name}" for layer in range(layers) for name in names] + beside
    one_rank, one_alpha = draw(sizes), draw(alphas)
    ranks = {path: draw(sizes) if is_mixed else one_rank for path in every}
    made = factors(names, layers=layers, beside=beside, ranks=ranks.__getitem__, dtype=draw(st.sampled_from(dtypes)),
                   seed=draw(st.integers(0, 99)))  # fmt: skip
    stated = {path: draw(alphas) if is_mixed else one_alpha for path in every}
    refused = set()
    if not attention_only or len(set(ranks.values())) > 1 or len(set(stated.values())) > 1:
        refused.add("sat")
    if {"patch_embed.proj", "ofs_embedding.linear_1", "ofs_embedding.linear_2"} & set(beside):
        refused.add("diffsynth")
    if {"ofs_embedding.linear_1", "ofs_embedding.linear_2"} & set(beside):
        refused.add("videox-fun")
    return RandomLora(made, stated, [name for name in FORMATS if name not in refused])


def chain(start: Path, formats: list[Format], folder: Path, **options: Any) -> Path:
    """Convert from one format to the next; the last output."""
    path = start
    for number, name in enumerate(formats):
        path = export_lora(path, folder / str(number), format=name, allow_partial=True, **options).output
    return path


def chains_over(lora: RandomLora, *left_out: Format) -> st.SearchStrategy[list[Format]]:
    names = [name for name in lora.formats if name not in left_out]
    return st.lists(st.sampled_from(names), min_size=1, max_size=4)


@given(st.data())
@FEW
def test_a_chain_without_arithmetic_keeps_every_bit_and_every_scaling(data: st.DataObject) -> None:
    lora = data.draw(loras((torch.float32, torch.float16, torch.bfloat16)))
    formats = data.draw(chains_over(lora, "diffsynth"))
    with TemporaryDirectory() as folder:
        start = lora.save(Path(folder) / "start")
        end = chain(start, formats, Path(folder))
        found = CONSUMERS[formats[-1]](end)
        assert found.keys() == lora.factors.keys()
        for path, pair in lora.factors.items():
            assert torch.equal(found[path], product(*pair, lora.scalings[path]))
        assert read_lora(end).scalings == lora.scalings
        back = load_file(export_lora(end, Path(folder) / "back", format="peft", allow_partial=True).output)
        there = load_file(start / "adapter_model.safetensors")
        assert back.keys() == there.keys()
        assert all(torch.equal(back[key], tensor) and back[key].dtype == tensor.dtype for key, tensor in there.items())


@given(st.data())
@FEW
def test_a_chain_with_a_fold_is_exact_where_every_scaling_is_a_power_of_two(data: st.DataObject) -> None:
    lora = data.draw(loras((torch.float32, torch.bfloat16), powers_of_two=True))
    formats = data.draw(chains_over(lora))
    folded = data.draw(st.sampled_from(lora.formats))
    with TemporaryDirectory() as folder:
        end = chain(lora.save(Path(folder) / "start"), formats, Path(folder))
        last = export_lora(end, Path(folder) / "last", format=folded, scale="fold", allow_partial=True).output
        found = CONSUMERS[folded](last)
        assert found.keys() == lora.factors.keys()
        for path, pair in lora.factors.items():
            assert torch.equal(found[path], product(*pair, lora.scalings[path]))


@given(st.data())
@FEW
def test_a_chain_with_any_fold_is_right_to_float32s_rounding(data: st.DataObject) -> None:
    lora = data.draw(loras((torch.float32,)))
    before, after_it = data.draw(chains_over(lora)), data.draw(chains_over(lora))
    folded = data.draw(st.sampled_from(lora.formats))
    with TemporaryDirectory() as folder:
        path = chain(lora.save(Path(folder) / "start"), before, Path(folder) / "before")
        path = export_lora(path, Path(folder) / "folded", format=folded, scale="fold", allow_partial=True).output
        end = chain(path, after_it, Path(folder) / "after")
        found = CONSUMERS[after_it[-1]](end)
        assert found.keys() == lora.factors.keys()
        for name, pair in lora.factors.items():
            wanted = product(*pair, lora.scalings[name])
            assert (found[name] - wanted).norm() <= 2**-22 * wanted.norm()
