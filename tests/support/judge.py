"""Settings that LoRA files state, judged by what diffusers and PEFT compute with them.

Each construction is a good file that states one thing more, or another thing, in diffusers' header or in PEFT's
`adapter_config.json`. The libraries load it into a small transformer with random weights, which is run twice; it is
*right* if they load it without a word, give the same output both times, and give what a transformer computes whose
weights have the scaled updates of the file added, at the scalings that cogtools reads in it. `verify` must not pass
what is not right, and `verify --load` must fail it, and must not fail what is.

``python -m tests.support.judge`` judges all of them and prints the counts.
"""

import copy
import functools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from cogtools import verify_lora
from cogtools.errors import CogtoolsError
from cogtools.layouts import diffusers, peft
from cogtools.layouts.diffusers import module_path
from cogtools.verification.checks import scalings
from cogtools.verification.written import open_written
from tests.support.damage import PREFIX, PROJECTIONS, good_lora, modules, read, write
from tests.support.diffusers_alone import everything_said, toy_transformer
from tests.support.loading import answer_here

PATHS = modules([0, 1, 2])
SUFFIXES = list(PROJECTIONS)
HARMLESS = "You have passed exclude_modules="
"""PEFT says so of files that diffusers loads: diffusers has told it which modules the file has."""

ABSENT = object()
"""The field is left out."""

_EXPRESSION = r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)"
_ONE = "transformer_blocks.1.attn1.to_q"

VALUES: dict[str, list[Any]] = {
    "r": [4, 4.0, 8, "4", True, None, ABSENT],
    "lora_alpha": [1, 0.5, 4, 0, -1, "1", None, ABSENT],
    "rank_pattern": [{"to_q": 4}, {"to_q": 8}, {_ONE: 4}, {"to_x": 4}, {r".*\.to_q": 4}, None, [], ABSENT],
    "alpha_pattern": [{"to_q": 4}, {f"^{_ONE}": 4}, {_ONE: 8, "to_q": 2}, {r"to_[qk]": 4}, {"to_x": 4}, None, ABSENT],
    "use_rslora": [True, False, None, "yes", 1],
    "target_modules": [PATHS, SUFFIXES, ["to_q"], PATHS[:8], [*SUFFIXES, "proj"], _EXPRESSION, r".*\.to_q",
                       "all-linear", [], None, 5, ABSENT],
    "exclude_modules": [[], ["proj_out"], ["to_q"], r".*\.proj_out", 5, None],
    "layers_to_transform": [[], None, [0, 1, 2], [0, 1], 0, [True], "0", [0.5]],
    "layers_pattern": ["transformer_blocks", ["transformer_blocks"], [], "", "blocks", r"\w+", 5],
    "use_dora": [True, False, None],
    "lora_bias": [True, False, None],
    "bias": ["none", "all", "lora_only", None, "x", True],
    "init_lora_weights": [True, False, None, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "corda",
                          "eva", "loftq", "lora_ga", "mica", "kasa", 1, "x"],
    "lora_dropout": [0, 0.0, -0.1, 0.1, 0.5, 1, 1.0, 2, "0.5", True, False, None],
    "inference_mode": [True, False, None],
    "fan_in_fan_out": [True, False, None],
    "peft_type": ["LORA", "lora", "LOHA", None, ABSENT],
    "peft_version": ["0.1", None, 5],
    "base_model_name_or_path": ["THUDM/CogVideoX-5b", "", None],
    "revision": ["main", None],
    "auto_mapping": [{"base_model_class": "X", "parent_library": "this"}, None],
    "task_type": [None, "x", "CAUSAL_LM", "FEATURE_EXTRACTION"],
    "qalora_group_size": [16, 4],
    "use_qalora": [True, False],
    "alora_invocation_tokens": [None, [], [1]],
    "arrow_config": [None, {}],
    "corda_config": [None, {}],
    "ensure_weight_tying": [False, True],
    "eva_config": [None, {}],
    "kasa_config": [None, {}],
    "layer_replication": [None, [], [[0, 2]]],
    "loftq_config": [None, {}, {"loftq_bits": 4}],
    "lora_ga_config": [None, {}],
    "modules_to_save": [None, [], ["proj_out"], "proj_out"],
    "monteclora_config": [None, {}],
    "runtime_config": [None, {}, {"ephemeral_gpu_offload": True}],
    "target_parameters": [None, [], ["proj_out.weight"]],
    "trainable_token_indices": [None, [0], {"proj_out": [0]}],
    "use_bdlora": [None, {}, False],
    "velora_config": [None, {}],
    "run": ["12"],
}  # fmt: skip
"""What is stated in turn, by field."""

TOGETHER: list[dict[str, Any]] = [
    {"target_modules": SUFFIXES, "layers_to_transform": [0, 1, 2]},
    {"target_modules": SUFFIXES, "layers_to_transform": [0, 1, 2], "layers_pattern": "transformer_blocks"},
    {"target_modules": SUFFIXES, "layers_to_transform": [0, 1], "layers_pattern": "transformer_blocks"},
    {"target_modules": SUFFIXES, "exclude_modules": ["transformer_blocks.1.attn1.to_q"]},
    {"use_rslora": True, "alpha_pattern": {"to_q": 4}},
    {"init_lora_weights": "eva", "eva_config": {}},
]
"""Values that mean something together."""


class Construction(NamedTuple):
    """One file: where it states what."""

    place: str
    fields: dict[str, Any]

    @property
    def id(self) -> str:
        shown = ",".join(f"{name}={'absent' if value is ABSENT else value!r}" for name, value in self.fields.items())
        return f"{self.place}:{shown[:60]}"


def constructions() -> list[Construction]:
    """All of them."""
    stated = [{name: value} for name, values in VALUES.items() for value in values] + TOGETHER
    return [Construction(place, fields) for place in ("header", "folder") for fields in stated]


class Judgement(NamedTuple):
    """What became of one construction.

    Attributes:
        truth: "right", or why not.
        plain: the verdict of verify.
        load: that of verify --load.
    """

    truth: str
    plain: str
    load: str

    @property
    def is_just(self) -> bool:
        """Whether the verdicts fit the truth."""
        if self.truth == "right":
            return self.load in ("pass", "warn")
        return self.plain != "pass" and self.load in ("fail", "error")


def judge(construction: Construction, folder: Path) -> Judgement:
    """Make the file, load and run it, and ask verify."""
    path = make(construction, folder)
    alpha = construction.fields.get("lora_alpha", 1)
    is_stated = isinstance(alpha, (int, float)) and alpha > 0  # without one PEFT takes 8: not what was trained
    truth = _truth(path) if is_stated else "no alpha above 0 is stated"
    return Judgement(truth, _verdict(path, load=False), _verdict(path, load=True))


def make(construction: Construction, folder: Path) -> Path:
    """Write a good file in single precision that states these things."""
    file = good_lora(dtype="F32")
    fields = {name.removeprefix(PREFIX): value for name, value in file.adapter.items()}
    for name, value in construction.fields.items():
        fields.pop(name, None)
        if value is not ABSENT:
            fields[name] = value
    file.metadata = {"format": "pt"}
    if construction.place == "header":
        file.metadata[diffusers.METADATA_KEY] = json.dumps({PREFIX + name: value for name, value in fields.items()})
        path = folder / diffusers.FILE_NAME
    else:
        file.tensors = {peft.PREFIX + name.removeprefix(PREFIX): entry for name, entry in file.tensors.items()}
        typed = fields if "peft_type" in construction.fields else {"peft_type": "LORA", **fields}
        (folder / peft.CONFIG_NAME).write_text(json.dumps(typed))
        path = folder / peft.FILE_NAME
    write(path, file)
    return path


def _verdict(path: Path, *, load: bool) -> str:
    try:
        return verify_lora(path, layers=3, load=load).verdict
    except CogtoolsError:
        return "error"


@functools.cache
def base() -> Any:
    """A transformer with few layers and heads and random weights, else like CogVideoX-2B; ready to be run."""
    torch.manual_seed(0)
    config = {**toy_transformer().config, "time_embed_dim": 512, "text_embed_dim": 4096}
    return type(toy_transformer()).from_config(config).eval()


def run(transformer: Any) -> torch.Tensor:
    """One pass of a transformer, of inputs that are always the same."""
    random = torch.Generator().manual_seed(0)
    video, text = torch.randn(1, 3, 16, 8, 8, generator=random), torch.randn(1, 16, 4096, generator=random)
    with torch.no_grad():
        (output,) = transformer(video, text, torch.tensor([500]), return_dict=False)
    return torch.as_tensor(output)


def load_alone(path: Path, transformer: Any) -> Any:
    """Load a file as users do, by the place where it states its scale."""
    if path.name == peft.FILE_NAME:
        from peft import PeftModel

        return PeftModel.from_pretrained(transformer, str(path.parent)).get_base_model()
    from diffusers import CogVideoXPipeline

    pipeline = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=None)
    pipeline.load_lora_weights(str(path.parent))
    return transformer


def merged(path: Path) -> Any:
    """The transformer with the scaled updates of a file added to its weights, at the scalings that cogtools reads."""
    transformer = copy.deepcopy(base())
    with open_written(path) as lora:
        found = scalings(lora)
        tensors = load_file(path)
        for module in lora.modules:
            a, b = (tensors[lora.key((*module, part))] for part in "AB")  # type: ignore[arg-type]
            weight = transformer.get_submodule(module_path(module)).weight
            weight.data += found.get(module, _stated_scaling(path, module_path(module))) * (b @ a)
    return transformer


def _stated_scaling(path: Path, module: str) -> float:
    """What PEFT makes of what a file states, where cogtools does not evaluate that."""
    from peft.utils.other import get_pattern_key

    place = path.with_name(peft.CONFIG_NAME)
    fields = json.loads(place.read_text() if place.exists() else read(path).metadata[diffusers.METADATA_KEY])
    fields = {name.removeprefix(PREFIX): value for name, value in fields.items()}
    rank, alpha = (
        (fields.get(pattern) or {}).get(get_pattern_key(fields.get(pattern) or {}, module), fields.get(name, 8))
        for pattern, name in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    return float(alpha) / float(rank)


def _truth(path: Path) -> str:
    with everything_said() as said:
        try:
            loaded = load_alone(path, copy.deepcopy(base()))
            first, second = run(loaded), run(loaded)
        except Exception as error:  # noqa: BLE001 - whatever it raises is the truth
            return f"error: {type(error).__name__}"
    if not torch.equal(first, second):
        return "not the same twice"
    expected = run(merged(path))
    effect = (expected - run(base())).norm()
    distance = (first - expected).norm()
    if distance > 1e-3 * max(effect, 1e-3):
        return f"{distance / effect:.0%} off" if effect else "off"
    heard = [library for library, text in said if not text.startswith(HARMLESS)]
    return f"warning: {heard[0]}" if heard else "right"


def all_judgements() -> Iterator[tuple[Construction, Judgement]]:
    for construction in constructions():
        with tempfile.TemporaryDirectory() as folder:
            yield construction, judge(construction, Path(folder))


def main() -> int:
    """Judge all, print those that are not just and the counts; 1 if there is one."""
    answer_here()
    counts: Counter[tuple[str, str, str]] = Counter()
    unjust = 0
    for construction, judgement in all_judgements():
        truth = "right" if judgement.truth == "right" else "not right"
        counts[truth, judgement.plain, judgement.load] += 1
        if not judgement.is_just:
            unjust += 1
            sys.stdout.write(f"UNJUST {construction.id}: {judgement}\n")
        elif "-v" in sys.argv:
            sys.stdout.write(f"{construction.id}: {judgement}\n")
    for (truth, plain, load), count in sorted(counts.items()):
        sys.stdout.write(f"{count:4} {truth}: verify says {plain}, verify --load says {load}\n")
    sys.stdout.write(f"{sum(counts.values())} constructions judged, {unjust} unjust\n")
    return 1 if unjust else 0


if __name__ == "__main__":
    sys.exit(main())
