"""Really loading a LoRA with the libraries that people load it with, into a transformer whose weights take no memory.

The transformer has its real shapes. Every base parameter views one zero, so that 5.6 billion of them take nothing,
and lies on the CPU: adapters of a model on the meta device would stay there and receive nothing. What the libraries
say while they load is heard, whatever the log level; a word of theirs is a problem here.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cogtools.errors import Problem
from cogtools.formatting import counted, number
from cogtools.layouts.diffusers import module_path, parse_module
from cogtools.layouts.family import HEAD_SIZE, MODELS
from cogtools.verification.checks import figures, scalings
from cogtools.verification.report import Check

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cogtools.checkpoint.paths import AnyPath
    from cogtools.conversion.lora import Lora
    from cogtools.layouts.family import Model, Module, Transformer
    from cogtools.verification.expected import Expected
    from cogtools.verification.report import Status

LIBRARIES = ("diffusers", "peft", "transformers", "huggingface_hub", "accelerate")


class Loaded(NamedTuple):
    """What came of loading a file.

    Attributes:
        check: the check.
        libraries: the versions of the libraries.
        modules: the scaling of every module that was adapted; {} unless the file was loaded rightly.
    """

    check: Check
    libraries: dict[str, str]
    modules: dict[Module, float]


def load_lora(lora: Lora, expected: Expected) -> Loaded:
    """Load a file, and compare what the model then holds with it.

    Every parameter of every adapter must be one of the file's tensors, with its dtype, shape and bytes, and every
    tensor of the file such a parameter; every module that should be adapted is, at the scaling that the file states.
    """
    # Imported before anything is listened to: what they say of themselves is not about the file.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import peft
        from diffusers.loaders import lora_pipeline  # noqa: F401
        from diffusers.models.transformers import cogvideox_transformer_3d  # noqa: F401

    libraries = {"diffusers": diffusers.__version__, "peft": peft.__version__}
    names = " and ".join(f"{name} {version}" for name, version in libraries.items())

    def found(status: Status, seen: str, problems: Sequence[Problem] = ()) -> Loaded:
        modules = {} if status == "fail" else {module: scaling for module, (_, scaling) in adapters.items()}
        return Loaded(Check("load", status, seen, tuple(problems)), libraries, modules)

    adapters: dict[Module, tuple[bool, float]] = {}
    reason = _cannot(lora, expected)
    if reason is not None:
        return found("fail", reason)
    with _everything_said() as said:
        try:
            transformer = weightless_transformer(expected.transformer, _dtype(lora))
            loaded = _load(lora, transformer)
        except Exception as error:  # noqa: BLE001 - whatever they raise is what a user of the file would see
            text = f"{type(error).__name__}: {_one_line(str(error))}"
            return found("fail", f"{names} do not load it", [Problem("error", text)])
    adapters, held = _adapters(lora, loaded)
    problems = [*_wrong_modules(lora, expected, adapters), *_wrong_tensors(lora, held)]
    heard = [Problem("library_warning", f"{library}: {_one_line(text)}") for library, text in said]
    if problems or not all(text.startswith(_HARMLESS) for _, text in said):
        return found("fail", f"{names}: not loaded as the file says", [*heard, *problems])
    modules = f"{counted(len(adapters), 'module')} of {_which(expected.transformer)}"
    scaling = figures(scaling for _, scaling in adapters.values())
    what = f"{names}: {modules} took {counted(len(held), 'tensor')} at scaling {scaling}"
    return found("warn" if heard else "pass", what + (", with a warning" if heard else ", without a warning"), heard)


_HARMLESS = ("You have passed exclude_modules=",)
"""How warnings begin that say nothing bad of a file: PEFT misses modules to exclude, as diffusers has told it which
modules the file has."""


def _configured_as(transformer: Transformer) -> Model:
    """The model whose configuration the transformer is given: the first of those that it may be, or the smallest."""
    return transformer.models[0] if transformer.models else MODELS[0]


def _which(transformer: Transformer) -> str:
    """The transformer that a file was loaded into."""
    name = _configured_as(transformer).name
    if not transformer.models:
        return f"a {name} with {counted(transformer.layers, 'layer')} of hidden size {transformer.hidden}"
    return name if len(transformer.models) == 1 else f"{name} (all of the 5B family have the same ones)"


def _cannot(lora: Lora, expected: Expected) -> str | None:
    """Why there is nothing to load the file into, or nothing that should read it; None if all is well."""
    transformer = expected.transformer
    if not transformer.hidden or not transformer.layers:
        return "the file has no LoRA tensors, so there is nothing to load"
    if transformer.hidden % HEAD_SIZE:
        return f"no CogVideoX transformer has hidden size {transformer.hidden}: its heads have {HEAD_SIZE} each"
    if lora.checkpoint.path.suffix != ".safetensors":
        # diffusers would unpickle it.
        return f"diffusers reads safetensors only from a file named .safetensors, not {lora.checkpoint.path.name}"
    return None


def _dtype(lora: Lora) -> torch.dtype:
    """The dtype of the base weights: the file's, since PEFT casts adapters to it without a word."""
    name = next((tensor.entry.dtype.name for tensor in lora.tensors.values()), "float32")
    dtype = getattr(torch, name)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


def weightless_transformer(transformer: Transformer, dtype: torch.dtype) -> Any:
    """A CogVideoXTransformer3DModel of real shapes whose base parameters all view one zero."""
    from diffusers import CogVideoXTransformer3DModel

    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(
            **_configured_as(transformer).config
            | {"num_layers": transformer.layers, "num_attention_heads": transformer.hidden // HEAD_SIZE}
        )
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zero = torch.zeros((), dtype=dtype).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(zero, requires_grad=False))
    return model


def _load(lora: Lora, transformer: Any) -> Any:
    """Load the file as its users do; the model with the adapters in it.

    Both libraries would ask the Hugging Face Hub for a path that is no folder: this one is, and they are told not to.
    """
    folder = lora.checkpoint.path.absolute().parent
    if lora.intended.scale == "adapter_config":
        return _load_with_peft(folder, transformer)
    from diffusers.loaders.lora_pipeline import CogVideoXLoraLoaderMixin

    class Pipeline(CogVideoXLoraLoaderMixin):  # type: ignore[misc] # diffusers ships no types
        """What `load_lora_weights` needs of a pipeline."""

        hf_device_map = None
        _lora_loadable_modules = ("transformer",)

        def __init__(self, transformer: Any) -> None:
            self.transformer = transformer
            self.components = {"transformer": transformer}

    Pipeline(transformer).load_lora_weights(
        str(folder), weight_name=lora.checkpoint.path.name, low_cpu_mem_usage=True, local_files_only=True
    )
    return transformer


def _load_with_peft(folder: AnyPath, transformer: Any) -> Any:
    from peft import PeftModel

    # PEFT makes adapters in float32 unless told not to, whatever the file has.
    loaded = PeftModel.from_pretrained(
        transformer, str(folder), autocast_adapter_dtype=False, low_cpu_mem_usage=True, local_files_only=True
    )
    return loaded.get_base_model()


def _adapters(lora: Lora, model: Any) -> tuple[dict[Module, tuple[bool, float]], dict[str, torch.Tensor]]:
    """Every adapted module, whether its adapter works, and its scaling; and the adapters' parameters by file key."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapters: dict[Module, tuple[bool, float]] = {}
    held: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        (adapter,) = module.scaling
        works = module.active_adapters == [adapter] and not module.disable_adapters and not module.merged
        known = parse_module(name)
        if known is not None:
            adapters[known] = works, float(module.scaling[adapter])
        for parameter_name, parameter in module.named_parameters():
            if not parameter_name.startswith("base_layer."):
                held[f"{lora.intended.written.prefix}{name}.{parameter_name.replace(f'.{adapter}.', '.')}"] = parameter
    return adapters, held


def _wrong_modules(lora: Lora, expected: Expected, adapters: dict[Module, tuple[bool, float]]) -> list[Problem]:
    """Modules without a working adapter, or with another scaling than the file states."""
    # Where the file says by an expression which modules it means, they are those that it has.
    names = expected.names if expected.is_certain else lora.tensors
    problems = [
        Problem("module", module_path(module), "no adapter", "an adapter")
        for module in sorted({name.module for name in names} - adapters.keys(), key=lambda module: module.order)
    ]
    wanted = scalings(lora)
    for module, (works, scaling) in adapters.items():
        if not works:
            problems.append(Problem("module", module_path(module), "an adapter that is not active", "an active one"))
        if module in wanted and not math.isclose(scaling, wanted[module], rel_tol=1e-9):
            stated = f"{number(wanted[module])}, as stated"
            problems.append(Problem("scale", module_path(module), f"scaling {number(scaling)}", stated))
    return problems


def _wrong_tensors(lora: Lora, held: dict[str, torch.Tensor]) -> list[Problem]:
    """Differences between the adapters' parameters and the file's tensors, in both directions."""
    problems = [
        Problem("missing", key, "in the model, not in the file")
        for key in sorted(held.keys() - lora.checkpoint.tensors)
    ]
    for key, entry in lora.checkpoint.tensors.items():
        parameter = held.get(key)
        if parameter is None:
            problems.append(Problem("unexpected", key, "in the file, not in the model"))
        elif parameter.is_meta:
            problems.append(Problem("value", key, "nothing: the adapter was never filled", "the file's values"))
        elif str(parameter.dtype) != f"torch.{entry.dtype.name}" or tuple(parameter.shape) != entry.shape:
            found = f"{parameter.dtype} {tuple(parameter.shape)}"
            problems.append(Problem("value", key, found, f"{entry.dtype.name} {entry.shape}"))
        elif not _same_bytes(parameter, entry.storage.range().read()):
            problems.append(Problem("value", key, "other values", "the file's"))
    return problems


def _same_bytes(parameter: torch.Tensor, expected: bytes) -> bool:
    held = parameter.detach().contiguous().view(-1).view(torch.uint8)
    return torch.equal(held, torch.frombuffer(bytearray(expected), dtype=torch.uint8))


@contextlib.contextmanager
def _everything_said() -> Iterator[list[tuple[str, str]]]:
    """Collect (library, text) of what the libraries warn of, by their loggers and by `warnings`; print nothing.

    Their log level is that which they have by default, whatever the environment says.
    """
    said: list[tuple[str, str]] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append((record.name.split(".")[0], record.getMessage()))

    listener = Listener(logging.WARNING)
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers[:], logger.propagate = [listener], False
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield said
        said += [(_library(warning.filename), str(warning.message)) for warning in warned]
    finally:
        for logger, handlers, level, propagate in before:
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)


def _library(filename: str) -> str:
    """The library that a source file belongs to."""
    return next((name for name in (*LIBRARIES, "torch") if name in Path(filename).parts), Path(filename).name)


def _one_line(text: str, length: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
