"""What diffusers and PEFT make of the files that are written for them: the change of every weight of a real model."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from cogtools import export_lora
from tests.support.consumers import IN_LAYERS, Updates, product
from tests.support.producers import HIDDEN, PEFT_WORDS, TEXT, TIME, Factors, after, config, factors, saved, spelled

BESIDE = ("patch_embed.text_proj", "time_embedding.linear_1", "time_embedding.linear_2", "norm_out.linear", "proj_out")


@pytest.fixture
def transformer() -> Any:
    """A CogVideoX of two layers with the sizes of the random factors."""
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=HIDDEN,
        in_channels=4,
        out_channels=3,
        time_embed_dim=TIME,
        text_embed_dim=TEXT,
        num_layers=2,
        use_rotary_positional_embeddings=True,
    )


class Training:
    """A LoRA of every kind of module, with ranks and alphas by module, as a PEFT folder states them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.factors: Factors = factors(IN_LAYERS, beside=BESIDE, ranks=lambda path: 3 if path.endswith("to_k") else 4)
        self.alphas = {path: {"to_q": 2.0, "proj_out": 0.75}.get(path.rpartition(".")[2], 8.0) for path in self.factors}
        ranks = {path: len(a) for path, (a, _) in self.factors.items()}
        saved(folder / "adapter_model.safetensors", spelled(self.factors, after("base_model.model."), *PEFT_WORDS))
        config(self.factors, folder, r=4, lora_alpha=8.0, rank_pattern=ranks, alpha_pattern=self.alphas,
               target_modules=list(self.factors))  # fmt: skip

    @property
    def updates(self) -> Updates:
        """The change of every weight."""
        return {path: product(*pair, self.alphas[path] / len(pair[0])) for path, pair in self.factors.items()}


@pytest.fixture
def training(tmp_path: Path) -> Training:
    return Training(tmp_path / "in")


def changes(model: Any) -> Updates:
    """What the adapters in a model add to its weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            (adapter,) = module.active_adapters
            update = module.get_delta_weight(adapter).detach().double()
            found[name.removeprefix("base_model.model.")] = update.flatten(1)
    return found


def assert_changes(model: Any, wanted: Updates) -> None:
    found = changes(model)
    assert found.keys() == wanted.keys()
    for path, update in wanted.items():
        assert (found[path] - update).norm() <= 1e-6 * update.norm(), path


@pytest.mark.parametrize("way", ["diffusers", "comfyui", "videox-fun", "peft"])
def test_diffusers_applies_what_was_trained_after_any_way_round(
    way: Any, training: Training, transformer: Any, tmp_path: Path
) -> None:
    there = export_lora(training.folder, tmp_path / "there", format=way)
    back = export_lora(there.output, tmp_path / "back")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transformer.load_lora_adapter(str(tmp_path / "back"), prefix="transformer", weight_name=back.output.name)
    assert_changes(transformer, training.updates)


def test_diffusers_applies_a_folder_of_peft_by_its_header(training: Training, transformer: Any, tmp_path: Path) -> None:
    report = export_lora(training.folder, tmp_path / "out", format="peft")
    transformer.load_lora_adapter(str(tmp_path / "out"), prefix="base_model.model", weight_name=report.output.name)
    assert_changes(transformer, training.updates)


@pytest.mark.parametrize("way", ["diffusers", "comfyui", "videox-fun", "peft"])
def test_peft_applies_what_was_trained_after_any_way_round(
    way: Any, training: Training, transformer: Any, tmp_path: Path
) -> None:
    from peft import PeftModel

    there = export_lora(training.folder, tmp_path / "there", format=way)
    export_lora(there.output, tmp_path / "back", format="peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PeftModel.from_pretrained(transformer, str(tmp_path / "back"))
    assert_changes(model.get_base_model(), training.updates)


@pytest.mark.parametrize("name", ["diffusers", "peft"])
def test_both_apply_a_folded_file_too(name: Any, training: Training, transformer: Any, tmp_path: Path) -> None:
    report = export_lora(training.folder, tmp_path / "out", format=name, scale="fold")
    prefix = {"diffusers": "transformer", "peft": "base_model.model"}[name]
    transformer.load_lora_adapter(str(tmp_path / "out"), prefix=prefix, weight_name=report.output.name)
    assert_changes(transformer, training.updates)


@pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape")  # PEFT on its own biases
@pytest.mark.parametrize("part", ["bias", "dora"])
def test_biases_and_magnitudes_arrive(part: str, transformer: Any, tmp_path: Path) -> None:
    """From a folder that PEFT has written to diffusers and back."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.lora import LoraLayer

    options: dict[str, Any] = {"lora_bias": True} if part == "bias" else {"use_dora": True}
    lora = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], **options)
    trained = get_peft_model(transformer, lora)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in trained.named_parameters():
            if "lora_" in key:
                value.copy_(torch.randn(value.shape, generator=generator).abs() + 0.1)
    trained.save_pretrained(tmp_path / "trained")
    module = next(m for m in trained.modules() if isinstance(m, LoraLayer))
    inputs = torch.randn(5, HIDDEN, generator=generator)
    wanted = module(inputs)
    base = trained.unload()
    there = export_lora(tmp_path / "trained", tmp_path / "there", scale="fold" if part == "bias" else "metadata")
    export_lora(there.output, tmp_path / "back", format="peft")
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["use_dora"] == (part == "dora")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "back"))
    module = next(m for m in loaded.modules() if isinstance(m, LoraLayer))
    assert torch.allclose(module(inputs), wanted, atol=1e-5)
