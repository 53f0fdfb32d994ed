"""The CogVideoX family: its models, and the modules that LoRAs of them adapt.

A *module* is one Linear of the transformer, in one of its layers or beside them. cogtools has its own short names for
them (`q`, `ff_in`, `proj_out`); what each program calls them stands in the table of its layout. A LoRA has two factors
for each module that it adapts: lora_A of shape (rank, in) and lora_B of shape (out, rank). SAT's trainer adapts the
four modules of the attention, so that CogVideoX-2B, with 30 layers, has 240 such tensors; other trainers adapt any.

Sources: CogVideo's sat/configs/*.yaml and sat/dit_video_concat.py; diffusers' CogVideoXTransformer3DModel, and the
config.json of the released models.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_LAYERS = 1000
"""A larger number of layers is not believed. The largest model has 42."""

LAYER_NUMBER = r"(0|[1-9]\d{0,2})"
"""A layer's number in a key, as a regular expression: below `MAX_LAYERS`, without leading zeros."""

HEAD_SIZE = 64
"""The width of every attention head in the family."""

LATENT_CHANNELS = 16
"""The channels of a latent video; image-to-video models take those of the image beside them."""


class Linear(NamedTuple):
    """A kind of module.

    Attributes:
        name: cogtools' name.
        inputs: what its input is: a size of the table below, perhaps with a factor before it.
        outputs: the same of its output.
        in_layers: whether every layer has one.
    """

    name: str
    inputs: str
    outputs: str
    in_layers: bool = True


LINEARS = (
    # attention: h is the hidden size
    Linear("q", "h", "h"),
    Linear("k", "h", "h"),
    Linear("v", "h", "h"),
    Linear("out", "h", "h"),
    # feed-forward
    Linear("ff_in", "h", "4h"),
    Linear("ff_out", "4h", "h"),
    # adaptive layer norms: shift, scale and gate, of video and text
    Linear("norm1", "time", "6h"),
    Linear("norm2", "time", "6h"),
    # beside the layers
    Linear("patch_proj", "patch_in", "h", in_layers=False),
    Linear("text_proj", "text", "h", in_layers=False),
    Linear("time_1", "h", "time", in_layers=False),
    Linear("time_2", "time", "time", in_layers=False),
    Linear("ofs_1", "ofs", "ofs", in_layers=False),
    Linear("ofs_2", "ofs", "ofs", in_layers=False),
    Linear("norm_out", "time", "2h", in_layers=False),
    Linear("proj_out", "h", "patch_out", in_layers=False),
)
"""Every module that LoRAs of this family adapt, in the order in which they are shown."""

BY_NAME = {linear.name: linear for linear in LINEARS}
IN_LAYERS = tuple(linear.name for linear in LINEARS if linear.in_layers)
BESIDE_LAYERS = tuple(linear.name for linear in LINEARS if not linear.in_layers)
ATTENTION = ("q", "k", "v", "out")
"""What SAT's LoRA adapts in every layer, and most trainers by default."""

_ORDER = {linear.name: place for place, linear in enumerate(LINEARS)}

PARTS = ("A", "B", "bias", "magnitude", "alpha")
"""The tensors that a module's adapter may have: lora_A and lora_B, a bias of lora_B (PEFT's `lora_bias`), DoRA's
magnitude vector, and its alpha where that is a tensor."""


class Module(NamedTuple):
    """One module: in a layer, or beside the layers (None)."""

    layer: int | None
    name: str

    def __str__(self) -> str:
        return self.name if self.layer is None else f"layer {self.layer}: {self.name}"

    @property
    def order(self) -> tuple[bool, int, int]:
        """A sort key: by layer, then in the order of the table; those beside the layers last."""
        return self.layer is None, self.layer or 0, _ORDER[self.name]


class LoraKey(NamedTuple):
    """Which tensor of a LoRA: of which layer (None: beside them), which module, which part."""

    layer: int | None
    name: str
    part: str

    def __str__(self) -> str:
        return f"{self.module} lora_{self.part}"

    @property
    def module(self) -> Module:
        """The module that it belongs to."""
        return Module(self.layer, self.name)

    @property
    def partner(self) -> LoraKey:
        """The other factor, of lora_A or lora_B."""
        return self._replace(part="B" if self.part == "A" else "A")

    @property
    def order(self) -> tuple[bool, int, int, int]:
        """A sort key, as that of its module."""
        return *self.module.order, PARTS.index(self.part)


_COMMON_CONFIG: dict[str, object] = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": HEAD_SIZE,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "max_text_seq_length": 226,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-05,
    "out_channels": LATENT_CHANNELS,
    "patch_size": 2,
    "spatial_interpolation_scale": 1.875,
    "temporal_compression_ratio": 4,
    "temporal_interpolation_scale": 1.0,
    "text_embed_dim": 4096,
    "time_embed_dim": 512,
    "timestep_activation_fn": "silu",
}
"""The fields of diffusers' config.json that all models have alike. Source: the released files."""


class Model(NamedTuple):
    """One model of the family.

    Attributes:
        slug: its short name on the command line.
        name: its full name.
        size: what models of one width and depth are called together.
        layers: transformer layers.
        heads: attention heads; the hidden size is 64 times that.
        dtype: what it was trained in.
        in_channels: channels of its input: 32 where an image is given beside the video.
        patch_size_t: frames per patch in the 1.5 models; None in the older ones, which have no patches in time.
        rotary: whether its positions are rotary embeddings.
        learned_positions: whether it has a table of positions that was trained, too.
        ofs_embed: whether it has an embedding of the frame rate's offset.
        sample: width, height and frames of the latent video that it was released for (frames: of the video).
        scaling_factor: what its VAE's latents are multiplied by.
        snr_shift_scale: the shift of its noise levels.
        diffusers_version: of its released config.json.
        repository: where its pipeline was released on the Hugging Face Hub.
    """

    slug: str
    name: str
    size: str
    layers: int
    heads: int
    dtype: str
    in_channels: int = LATENT_CHANNELS
    patch_size_t: int | None = None
    rotary: bool = True
    learned_positions: bool = False
    ofs_embed: bool = False
    sample: tuple[int, int, int] = (90, 60, 49)
    scaling_factor: float = 0.7
    snr_shift_scale: float = 1.0
    diffusers_version: str = "0.31.0.dev0"
    repository: str = ""

    @property
    def hidden(self) -> int:
        """The hidden size."""
        return self.heads * HEAD_SIZE

    @property
    def patch_embed(self) -> tuple[int, ...]:
        """The shape of the patch embedding's weight: of a convolution, or in the 1.5 models of a Linear."""
        if self.patch_size_t is None:
            return (self.hidden, self.in_channels, 2, 2)
        return (self.hidden, self.in_channels * 4 * self.patch_size_t)

    @property
    def is_image_to_video(self) -> bool:
        """Whether it takes an image beside the text; diffusers has another pipeline class for these."""
        return self.in_channels > LATENT_CHANNELS

    @property
    def pipeline(self) -> str:
        """The class of its pipeline in diffusers."""
        return "CogVideoXImageToVideoPipeline" if self.is_image_to_video else "CogVideoXPipeline"

    @property
    def config(self) -> dict[str, object]:
        """The fields of diffusers' config.json, as the model was released with them.

        A field that a released file lacks is left out: its default means the same, and older releases of diffusers
        warn of fields that they do not know.
        """
        width, height, frames = self.sample
        config: dict[str, object] = {
            **_COMMON_CONFIG,
            "in_channels": self.in_channels,
            "num_attention_heads": self.heads,
            "num_layers": self.layers,
            "sample_frames": frames,
            "sample_height": height,
            "sample_width": width,
            "use_rotary_positional_embeddings": self.rotary,
        }
        if self.learned_positions or self.patch_size_t is not None:
            config["use_learned_positional_embeddings"] = self.learned_positions
        if self.patch_size_t is not None:
            config |= {"patch_bias": False, "patch_size_t": self.patch_size_t}
        if self.ofs_embed:
            config["ofs_embed_dim"] = self.sizes["ofs"]
        return config

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that `LINEARS` speaks of."""
        return {
            "h": self.hidden,
            "time": 512,
            "text": 4096,
            "ofs": 512 if self.ofs_embed else 0,
            "patch_in": self.patch_embed[1],
            "patch_out": LATENT_CHANNELS * 4 * (self.patch_size_t or 1),
        }


_V1_5 = (170, 96, 81)

MODELS = (
    Model("2b", "CogVideoX-2B", "2B", 30, 30, "float16", rotary=False, scaling_factor=1.15258426,
          snr_shift_scale=3.0, diffusers_version="0.30.0.dev0", repository="THUDM/CogVideoX-2b"),
    Model("5b", "CogVideoX-5B", "5B", 42, 48, "bfloat16", repository="THUDM/CogVideoX-5b"),
    Model("5b-i2v", "CogVideoX-5B-I2V", "5B", 42, 48, "bfloat16", in_channels=32, learned_positions=True,
          repository="THUDM/CogVideoX-5b-I2V"),
    Model("1.5-5b", "CogVideoX1.5-5B", "5B", 42, 48, "bfloat16", patch_size_t=2, sample=_V1_5,
          diffusers_version="0.32.0.dev0", repository="THUDM/CogVideoX1.5-5B"),
    Model("1.5-5b-i2v", "CogVideoX1.5-5B-I2V", "5B", 42, 48, "bfloat16", in_channels=32, patch_size_t=2,
          ofs_embed=True, sample=_V1_5, diffusers_version="0.32.0.dev0", repository="THUDM/CogVideoX1.5-5B-I2V"),
)  # fmt: skip
"""The published models."""

BY_SLUG = {model.slug: model for model in MODELS}
SLUGS = tuple(BY_SLUG)


OTHER_SAT_MODELS = {4096: "VisualGLM-6B and CogVLM"}
"""Models beside CogVideoX that SAT trains LoRAs of, by their hidden size: no CogVideoX has it."""


class Transformer(NamedTuple):
    """What is known of the transformer that a LoRA belongs to.

    Attributes:
        layers: how many it has.
        hidden: its hidden size; 0 if nothing tells it.
        models: the models that fit; more than one if the base weights that would tell are not there, none if it is
            not a published model.
    """

    layers: int
    hidden: int
    models: tuple[Model, ...]

    @property
    def name(self) -> str:
        """Its name, or what can be stated of it."""
        if len(self.models) == 1:
            return self.models[0].name
        if self.models:
            size = self.models[0].size
            slugs = ", ".join(model.slug for model in self.models)
            same_size = all(model.size == size for model in self.models)
            return f"CogVideoX {size} family ({slugs})" if same_size else f"one of the CogVideoX models {slugs}"
        if self.others is not None:
            return f"not a CogVideoX: hidden size {self.hidden}, which {self.others} have"
        if not self.hidden:
            return "CogVideoX of unknown size"
        return f"CogVideoX of no published size: {self.layers} layers, hidden size {self.hidden}"

    @property
    def others(self) -> str | None:
        """The models of other families that have its hidden size, where no CogVideoX has it."""
        return None if self.models else OTHER_SAT_MODELS.get(self.hidden)

    @property
    def pipeline(self) -> str | None:
        """The class of its pipeline in diffusers; None if that depends on which of the models it is."""
        found = {model.pipeline for model in self.models}
        return found.pop() if len(found) == 1 else None

    @property
    def modules(self) -> list[Module]:
        """Every module that it has."""
        beside = [name for name in BESIDE_LAYERS if self.models or not name.startswith("ofs")]
        beside = [name for name in beside if self.features(name) != (0, 0)]
        in_layers = [Module(layer, name) for layer in range(self.layers) for name in IN_LAYERS]
        return in_layers + [Module(None, name) for name in beside]

    def has(self, module: Module) -> bool:
        """Whether it has this module."""
        if module.layer is not None:
            return module.layer < self.layers and BY_NAME[module.name].in_layers
        return not BY_NAME[module.name].in_layers and self.features(module.name) != (0, 0)

    def features(self, name: str) -> tuple[int | None, int | None]:
        """In and out size of a module; None where models that fit differ, or nothing tells."""
        linear = BY_NAME[name]
        return self._size(linear.inputs), self._size(linear.outputs)

    def _size(self, expression: str) -> int | None:
        factor, size = (int(expression[0]), expression[1:]) if expression[0].isdigit() else (1, expression)
        if size == "h":
            return factor * self.hidden or None
        found = {model.sizes[size] for model in self.models}
        return factor * found.pop() if len(found) == 1 else None

    def lora_shape(self, key: LoraKey, rank: int) -> tuple[int | None, ...] | None:
        """The shape that a tensor of a LoRA has here; None in it for a size that nothing tells.

        None for the patch embedding where it may be a convolution: its factors then have four dimensions.
        """
        if key.name == "patch_proj" and (not self.models or any(model.patch_size_t is None for model in self.models)):
            return None
        inputs, outputs = self.features(key.name)
        return {"A": (rank, inputs), "B": (outputs, rank), "alpha": ()}.get(key.part, (outputs,))


def recognise(
    hidden: int, layers: int | None, patch_embed: tuple[int, ...] | None = None, *, ofs_embed: bool = False
) -> Transformer | None:
    """The transformer of this hidden size.

    Args:
        hidden: its hidden size.
        layers: how many layers its base weights have; None if there are no base weights.
        patch_embed: shape of its patch embedding's weight; None if that is not there.
        ofs_embed: whether its base weights have that; where only some of them are there, it may be missing.

    Returns:
        None if the number of layers cannot be told: no base weights, and no published model of that hidden size.
    """
    fitting = [model for model in MODELS if model.hidden == hidden and layers in (None, model.layers)]
    if patch_embed is not None:
        fitting = [model for model in fitting if model.patch_embed == patch_embed]
    if ofs_embed:
        fitting = [model for model in fitting if model.ofs_embed]
    count = layers if layers is not None else next((model.layers for model in fitting), None)
    return None if count is None else Transformer(count, hidden, tuple(fitting))


def rank_of(key: LoraKey, shape: tuple[int, ...]) -> int | None:
    """The rank that a factor of this shape has: rows of lora_A, columns of lora_B. None for other tensors."""
    if len(shape) < 2 or key.part not in ("A", "B"):
        return None
    return shape[0] if key.part == "A" else shape[1]


def hidden_of(key: LoraKey, shape: tuple[int, ...]) -> int | None:
    """The hidden size that a factor of this shape has on its other side; None where that is not a hidden size."""
    if len(shape) not in (2, 4) or key.part not in ("A", "B"):
        return None
    linear = BY_NAME[key.name]
    size, width = (linear.inputs, shape[1]) if key.part == "A" else (linear.outputs, shape[0])
    factor = int(size[0]) if size[0].isdigit() else 1
    return width // factor if size.endswith("h") and width % factor == 0 else None
