"""What the programs that load LoRAs make of a file, each written anew from its own rules: no table of cogtools is used.

Each reader takes what its program is given, at strength 1, and returns the change of every module's weight in double
precision, by the module's path in diffusers. What would stop the program is an error here.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

Updates = dict[str, torch.Tensor]

IN_LAYERS = {
    # diffusers            ComfyUI            DiffSynth-Studio
    "attn1.to_q": ("q", "attn1.to_q"),
    "attn1.to_k": ("k", "attn1.to_k"),
    "attn1.to_v": ("v", "attn1.to_v"),
    "attn1.to_out.0": ("attn_out", "attn1.to_out"),
    "ff.net.0.proj": ("ff_proj", "ff.0"),
    "ff.net.2": ("ff_out", "ff.2"),
    "norm1.linear": ("norm1.linear", "norm1.linear"),
    "norm2.linear": ("norm2.linear", "norm2.linear"),
}
BESIDE = {
    "patch_embed.proj": ("patch_embed.proj", None),
    "patch_embed.text_proj": ("patch_embed.text_proj", "context_embedder"),
    "time_embedding.linear_1": ("time_embedding_linear_1", "time_embedder.timestep_embedder.0"),
    "time_embedding.linear_2": ("time_embedding_linear_2", "time_embedder.timestep_embedder.2"),
    "ofs_embedding.linear_1": ("ofs_embedding_linear_1", None),
    "ofs_embedding.linear_2": ("ofs_embedding_linear_2", None),
    "norm_out.linear": ("norm_out.linear", "norm_out.linear"),
    "proj_out": ("proj_out", "proj_out"),
}


def paths(layers: int = 42) -> list[str]:
    """Every module's path in diffusers."""
    return [f"transformer_blocks.{layer}.{name}" for layer in range(layers) for name in IN_LAYERS] + list(BESIDE)


def comfyui_name(path: str) -> str:
    """A module's name in ComfyUI, without a prefix."""
    match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", path)
    return f"blocks.{match[1]}.{IN_LAYERS[match[2]][0]}" if match else BESIDE[path][0]


def diffsynth_name(path: str) -> str | None:
    """A module's name in DiffSynth-Studio."""
    match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", path)
    return f"blocks.{match[1]}.{IN_LAYERS[match[2]][1]}" if match else BESIDE[path][1]


def product(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling * B A, of Linears and of convolutions."""
    return scaling * (b.double().flatten(1) @ a.double().flatten(1))


def opened(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the text entries of a safetensors file."""
    with safe_open(file, "pt") as content:
        return {key: content.get_tensor(key) for key in content.keys()}, content.metadata() or {}  # noqa: SIM118


def taken(tensors: dict[str, torch.Tensor], a: str, b: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Both factors, taken out of what is left; one without the other is an error."""
    lora_a, lora_b = tensors.pop(a, None), tensors.pop(b, None)
    if lora_a is None and lora_b is None:
        return None
    assert lora_a is not None, f"{b} without {a}"
    assert lora_b is not None, f"{a} without {b}"
    return lora_a, lora_b


def configured(fields: dict[str, object], path: str, rank: int) -> float:
    """The scaling that a LoraConfig gives a module, and its rank held against the tensors."""

    def of(pattern: str, default: object) -> float:
        patterns = fields.get(pattern, {})
        assert isinstance(patterns, dict)
        key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", path)), None)
        value = default if key is None else patterns[key]
        assert isinstance(value, (int, float))
        return value

    targets = fields["target_modules"]
    assert isinstance(targets, list)
    assert any(path == target or path.endswith(f".{target}") for target in targets), path
    assert of("rank_pattern", fields["r"]) == rank
    return of("alpha_pattern", fields["lora_alpha"]) / rank


def diffusers(file: Path) -> Updates:
    """`pipe.load_lora_weights`, from 0.34 on."""
    tensors, metadata = opened(file)
    assert all("lora" in key for key in tensors), "a key without lora"
    text = metadata.get("lora_adapter_metadata")
    fields = None
    if text is not None:
        fields = {key.removeprefix("transformer."): value for key, value in json.loads(text).items()}
        assert {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"} <= fields.keys()
    updates = {}
    for path in paths():
        key = f"transformer.{path}"
        found = taken(tensors, f"{key}.lora_A.weight", f"{key}.lora_B.weight")
        if found is not None:
            rank = len(found[0])
            updates[path] = product(*found, 1.0 if fields is None else configured(fields, path, rank))
    assert not tensors, "keys that it warns of"
    return updates


def peft(file: Path) -> Updates:
    """`PeftModel.from_pretrained` of the file's folder."""
    assert file.name == "adapter_model.safetensors"
    fields = json.loads((file.parent / "adapter_config.json").read_text())
    assert fields["peft_type"] == "LORA"
    tensors, _ = opened(file)
    updates = {}
    for path in paths():
        key = f"base_model.model.{path}"
        found = taken(tensors, f"{key}.lora_A.weight", f"{key}.lora_B.weight")
        if found is not None:
            updates[path] = product(*found, configured(fields, path, len(found[0])))
    assert not tensors, "keys that it ignores"
    return updates


def diffusers_of_peft(file: Path) -> Updates:
    """`load_lora_adapter(prefix="base_model.model")` of the same file: it reads the header, not adapter_config.json."""
    tensors, metadata = opened(file)
    fields = {key.removeprefix("base_model.model."): value
              for key, value in json.loads(metadata["lora_adapter_metadata"]).items()}  # fmt: skip
    return {
        path: product(tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"], configured(fields, path, rank))
        for path in paths()
        if (key := f"base_model.model.{path}") + ".lora_A.weight" in tensors
        and (rank := len(tensors[f"{key}.lora_A.weight"]))
    }


def with_alphas(file: Path, name: Callable[[str], str], a: str, b: str) -> Updates:
    """A module's product times alpha / rank; without an alpha, times 1."""
    tensors, _ = opened(file)
    updates = {}
    for path in paths():
        key = name(path)
        alpha = tensors.pop(f"{key}.alpha", None)
        found = taken(tensors, f"{key}.{a}", f"{key}.{b}")
        if found is not None:
            assert alpha is None or (alpha.shape == () and alpha.dtype == torch.float32)
            updates[path] = product(*found, 1.0 if alpha is None else alpha.item() / len(found[0]))
    assert not tensors, f"keys that it does not know: {next(iter(tensors), None)}"
    return updates


def comfyui(file: Path) -> Updates:
    """The node LoraLoaderModelOnly."""
    return with_alphas(file, lambda path: f"diffusion_model.{comfyui_name(path)}", "lora_A.weight", "lora_B.weight")


def videox_fun(file: Path) -> Updates:
    """`merge_lora`, also before November 2025; kijai's wrapper merges this layout by the same rule."""
    underscores = {path: f"lora_unet__{path.replace('.', '_')}" for path in paths()}
    return with_alphas(file, underscores.__getitem__, "lora_down.weight", "lora_up.weight")


def diffsynth(file: Path) -> Updates:
    """`load_lora` of 1.1.9: nothing in the file states a scale, and every module has to be known."""
    tensors, _ = opened(file)
    updates = {}
    for path in paths():
        name = diffsynth_name(path)
        found = taken(tensors, f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight")
        if found is not None:
            updates[path] = product(*found, 1.0)
    assert not tensors, "Cannot load LoRA"
    return updates


def sat(file: Path, alpha: float | None = None) -> Updates:
    """`load_checkpoint` of the folder, with r of the file and this lora_alpha in the yaml.

    None takes what cogtools prints for the yaml, which it also writes beside `latest`.
    """
    import yaml

    folder = file.parents[1]
    assert int((folder / "latest").read_text()) > 0
    assert file == folder / (folder / "latest").read_text() / "mp_rank_00_model_states.pt"
    tensors = dict(torch.load(file, weights_only=True)["module"])
    if alpha is None:
        config = yaml.safe_load((folder / "training_config.yaml").read_text())
        for name in ("model", "network_config", "params", "modules", "lora_config", "params"):
            config = config[name]
        alpha = config["lora_alpha"]
    updates = {}
    for layer in range(42):
        attention = f"model.diffusion_model.transformer.layers.{layer}.attention"
        for place, name in enumerate(("to_q", "to_k", "to_v", "to_out.0")):
            fused, index = ("query_key_value", place) if place < 3 else ("dense", 0)
            key = f"{attention}.{fused}"
            found = taken(tensors, f"{key}.matrix_A.{index}", f"{key}.matrix_B.{index}")
            if found is not None:
                updates[f"transformer_blocks.{layer}.attn1.{name}"] = product(*found, alpha / len(found[0]))
    assert not tensors, "keys that it would not take"
    return updates


CONSUMERS: dict[str, Callable[[Path], Updates]] = {
    "diffusers": diffusers,
    "peft": peft,
    "comfyui": comfyui,
    "videox-fun": videox_fun,
    "diffsynth": diffsynth,
    "sat": sat,
}
"""By the format that is written for them."""
