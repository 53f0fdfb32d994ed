"""The process that loads a LoRA with the libraries that people load it with, and runs it.

The transformer has its real shapes. Every base parameter views one zero, so that 5.6 billion of them take nothing,
and lies on the CPU: adapters of a model on the meta device would stay there and receive nothing. With such weights the
output of an adapted module is its adapter's alone: each module is run by itself, in the state in which the library
leaves it. What the libraries say while they load is heard, whatever the log level; a word of theirs is a problem here.
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cogtools.errors import KilledError, LibraryError, Problem
from cogtools.formatting import counted, number, percent
from cogtools.layouts.diffusers import module_path, parse_module
from cogtools.layouts.family import HEAD_SIZE, MODELS, LoraKey
from cogtools.layouts.folded import fold_modules
from cogtools.layouts.lora import PEFT_STYLE
from cogtools.layouts.recognition import BY_NAME
from cogtools.verification.checks import figures, scalings
from cogtools.verification.expected import expect
from cogtools.verification.load import Loaded, answer_of
from cogtools.verification.overheard import LIBRARIES, everything_said, one_line
from cogtools.verification.report import Check
from cogtools.verification.written import open_written

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cogtools.checkpoint.paths import AnyPath
    from cogtools.conversion.lora import Lora
    from cogtools.layouts.family import Model, Module, Transformer
    from cogtools.verification.expected import Expected
    from cogtools.verification.report import Status

_TRIED = 4
"""How many random vectors each module is run on at once."""

_ROUNDING = 1e-11
"""The error that double precision may make in a module's output, relative to the norms of what is multiplied; it makes
less than a thousandth of that."""


def answer(question: dict[str, object]) -> dict[str, object]:
    """Answer the question of `load.load_lora`: load the file that it names into the model that it names."""
    model, layers, asked = question["model"], question["layers"], question["format"]
    with open_written(Path(str(question["path"])), None if asked is None else BY_NAME[str(asked)]) as lora:
        expected = expect(
            lora,
            model=model if isinstance(model, str) else None,
            layers=layers if isinstance(layers, int) else None,
        )
        return answer_of(_load_lora(lora, expected))


class _Adapter(NamedTuple):
    """The adapter of a module, in the model.

    Attributes:
        layer: PEFT's layer, which wraps the module.
        is_active: whether its output is added to the module's.
        scaling: what it is multiplied by.
    """

    layer: Any
    is_active: bool
    scaling: float


class _Held(NamedTuple):
    """What the model holds after loading.

    Attributes:
        adapters: by module.
        parameters: of the adapters, by what they are; those of modules that are not in the family's table by their
            names in the model.
        base: the other parameters that are not the zero of before, by their names in the model.
    """

    adapters: dict[Module, _Adapter]
    parameters: dict[LoraKey | str, torch.Tensor]
    base: dict[str, torch.Tensor]


def _load_lora(lora: Lora, expected: Expected) -> Loaded:
    """Load a file, and compare what the model then holds and computes with it.

    Every parameter of every adapter must be one of the file's tensors, with its dtype, shape and bytes, and every
    tensor of the file such a parameter; every module that should be adapted is, at the scaling that the file states;
    and run on random vectors, twice, it gives scaling * lora_B @ lora_A of them.
    """
    libraries = _import_libraries()
    names = " and ".join(f"{name} {version}" for name, version in libraries.items())

    def found(status: Status, seen: str, problems: Sequence[Problem] = ()) -> Loaded:
        modules = {} if status == "fail" else {module: adapter.scaling for module, adapter in held.adapters.items()}
        return Loaded(Check("load", status, seen, tuple(problems)), libraries, modules)

    held = _Held({}, {}, {})
    with everything_said() as said:
        try:
            transformer, zero = weightless_transformer(expected.transformer, _dtype(lora))
            loaded = _load(lora, transformer)
        except Exception as error:  # noqa: BLE001 - whatever they raise is what a user of the file would see
            _raise_if_out_of_memory(error)
            text = f"{type(error).__name__}: {one_line(str(error))}"
            return found("fail", f"{names} do not load it", [Problem("error", text)])
    held = _held(loaded, zero)
    problems = [*_wrong_modules(lora, expected, held.adapters), *_wrong_tensors(lora, held)]
    problems += _wrong_outputs(held)
    heard = [Problem("library_warning", f"{library}: {one_line(text)}") for library, text in said]
    if problems or not all(text.startswith(_HARMLESS) for _, text in said):
        return found("fail", f"{names}: not loaded as the file says", [*heard, *problems])
    modules = f"{counted(len(held.adapters), 'module')} of {_which(expected.transformer)}"
    scaling = figures(adapter.scaling for adapter in held.adapters.values())
    tensors = counted(len(held.parameters) + len(held.base), "tensor")
    what = f"{names}: {modules} took {tensors} and ran at scaling {scaling}"
    return found("warn" if heard else "pass", what + (", with a warning" if heard else ", without a warning"), heard)


_HARMLESS = ("You have passed exclude_modules=",)
"""How warnings begin that say nothing bad of a file: PEFT misses modules to exclude, as diffusers has told it which
modules the file has."""


_NEEDED = ("torch", *LIBRARIES, "safetensors")


def _import_libraries() -> dict[str, str]:
    """Import the libraries, before anything is listened to: what they say of themselves is not about the file.

    Raises:
        LibraryError: if one cannot be imported, for whatever reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import diffusers
            import peft
            from diffusers.loaders import lora_pipeline  # noqa: F401
            from diffusers.models.transformers import cogvideox_transformer_3d  # noqa: F401
    except Exception as error:
        _raise_if_out_of_memory(error)
        if isinstance(error, ModuleNotFoundError) and error.name in _NEEDED:
            raise
        raise LibraryError(
            f"these cannot be imported together: {', '.join(_installed())}",
            found=f"{type(error).__name__}: {one_line(str(error))}",
            hint="install releases that go together: pip install --upgrade diffusers peft transformers accelerate",
        ) from error
    return {"diffusers": diffusers.__version__, "peft": peft.__version__}


def _installed() -> list[str]:
    """The libraries and their versions."""
    found = []
    for name in _NEEDED:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return found


def _raise_if_out_of_memory(error: Exception) -> None:
    """A lack of memory is not about the file.

    Raises:
        KilledError: if that is what the error says.
    """
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "not enough memory" in str(error):
        raise KilledError("there is not enough memory to load the file with diffusers and PEFT") from error


def _configured_as(transformer: Transformer) -> Model:
    """The model whose configuration the transformer is given: the first of those that it may be, or the smallest."""
    return transformer.models[0] if transformer.models else MODELS[0]


def _which(transformer: Transformer) -> str:
    """The transformer that a file was loaded into."""
    name = _configured_as(transformer).name
    if not transformer.models:
        return f"a {name} with {counted(transformer.layers, 'layer')} of hidden size {transformer.hidden}"
    return name if len(transformer.models) == 1 else f"{name} (all of the 5B family have the same ones)"


def _dtype(lora: Lora) -> torch.dtype:
    """The dtype of the base weights: the file's, since PEFT casts adapters to it without a word."""
    name = next((tensor.entry.dtype.name for tensor in lora.tensors.values()), "float32")
    dtype = getattr(torch, name)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


def weightless_transformer(transformer: Transformer, dtype: torch.dtype) -> tuple[Any, torch.Tensor]:
    """A CogVideoXTransformer3DModel of real shapes whose base parameters all view one zero, and that zero.

    It is in evaluation mode, as `from_pretrained` leaves it.
    """
    from diffusers import CogVideoXTransformer3DModel

    heads = transformer.hidden // HEAD_SIZE
    config = _configured_as(transformer).config | {"num_layers": transformer.layers, "num_attention_heads": heads}
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(**config)
    zero = torch.zeros((), dtype=dtype)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(zero.expand(parameter.shape), requires_grad=False))
    return model.eval(), zero


def _load(lora: Lora, transformer: Any) -> Any:
    """Load the file as its users do; the model with the adapters in it.

    Both libraries would ask the Hugging Face Hub for a path that is not a folder; this one is, and they must not.
    """
    folder = lora.checkpoint.path.absolute().parent
    if lora.intended.library == "peft":
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


# What the model holds


def _held(model: Any, zero: torch.Tensor) -> _Held:
    from peft.tuners.tuners_utils import BaseTunerLayer

    held = _Held({}, {}, {})
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        (adapter,) = layer.scaling
        is_active = layer.active_adapters == [adapter] and not layer.disable_adapters and not layer.merged
        module = parse_module(name)
        if module is not None:
            held.adapters[module] = _Adapter(layer, is_active, float(layer.scaling[adapter]))
        for parameter_name, parameter in layer.named_parameters():
            if not parameter_name.startswith("base_layer."):
                held.parameters[_part(name, parameter_name)] = parameter
    adapted = {id(parameter) for parameter in held.parameters.values()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in adapted and parameter.data_ptr() != zero.data_ptr() and ".original_module." not in name:
            held.base[_SAVED_MODULE.sub("", name)] = parameter
    return held


_SAVED_MODULE = re.compile(r"modules_to_save\.\w+\.")
"""What PEFT puts into the names of parameters of `modules_to_save`, of which it keeps the original beside the new."""


def _part(path: str, parameter: str) -> LoraKey | str:
    """What a parameter of an adapter is; its name in the model where that is not known."""
    parsed = PEFT_STYLE.parse(f"{path}.{parameter}")
    module = None if parsed is None else parse_module(parsed[0])
    return f"{path}.{parameter}" if parsed is None or module is None else LoraKey(*module, parsed[1])


def _wrong_modules(lora: Lora, expected: Expected, adapters: dict[Module, _Adapter]) -> list[Problem]:
    """Modules without a working adapter, or with another scaling than the file states."""
    # Where the file says by an expression which modules it means, they are those that it has.
    names = expected.names if expected.is_certain else lora.tensors
    problems = [
        Problem("module", module_path(module), "no adapter", "an adapter")
        for module in sorted({name.module for name in names} - adapters.keys(), key=lambda module: module.order)
    ]
    wanted = scalings(lora)
    for module, adapter in adapters.items():
        if not adapter.is_active:
            problems.append(Problem("module", module_path(module), "an adapter that is not active", "an active one"))
        if module in wanted and not math.isclose(adapter.scaling, wanted[module], rel_tol=1e-9):
            stated = f"{number(wanted[module])}, as stated"
            problems.append(Problem("scale", module_path(module), f"scaling {number(adapter.scaling)}", stated))
    return problems


def _wrong_tensors(lora: Lora, held: _Held) -> list[Problem]:
    """Differences between the model's parameters and the file's tensors, in both directions."""
    prefix = lora.intended.written.prefix
    in_model = {
        **{name if isinstance(name, str) else lora.key(name): tensor for name, tensor in held.parameters.items()},
        **{prefix + name: tensor for name, tensor in held.base.items()},
    }
    problems = [
        Problem("missing", key, "in the model, not in the file")
        for key in sorted(in_model.keys() - lora.checkpoint.tensors)
    ]
    ignored = {tensor.key for tensor in lora.alphas.values()} if lora.intended.ignores_alphas else set()
    for key, entry in lora.checkpoint.tensors.items():
        parameter = in_model.get(key)
        if key in ignored:
            continue
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


# What it computes


def _wrong_outputs(held: _Held) -> list[Problem]:
    """Modules whose output is not what their adapter's parameters mean, or not the same every time."""
    parameters: dict[Module, dict[str, torch.Tensor]] = {}
    for key, parameter in held.parameters.items():
        if isinstance(key, LoraKey):
            parameters.setdefault(key.module, {})[key.part] = parameter
    errors: dict[str, list[Module]] = {}
    off: dict[Module, float] = {}
    varying: dict[Module, float] = {}
    for module, adapter in held.adapters.items():
        own = parameters.get(module, {})
        if not adapter.is_active or not {"A", "B"} <= own.keys() or any(part.is_meta for part in own.values()):
            continue  # found elsewhere, as are values that are not finite
        try:
            with _in_double(adapter.layer):
                if all(part.sum().isfinite() for part in own.values()):
                    off[module], varying[module] = _run(adapter, own)
        except Exception as error:  # noqa: BLE001 - whatever it raises is what a user of the file would see
            _raise_if_out_of_memory(error)
            errors.setdefault(f"{type(error).__name__}: {one_line(str(error))}", []).append(module)
    problems = [_problem(modules, f"cannot be run: {text}", "its output") for text, modules in errors.items()]
    modules = [module for module, distance in varying.items() if distance]
    if modules:
        most = max(varying[module] for module in modules)
        found = f"another output each time it is run, {percent(most)} of the update apart"
        problems.append(_problem(modules, found, "the same output each time"))
    modules = [module for module, distance in off.items() if distance and not varying[module]]
    if modules:
        found = f"an output that is {percent(max(off[module] for module in modules))} of the update off"
        problems.append(_problem(modules, found, "scaling * lora_B @ lora_A of its input"))
    return problems


def _problem(modules: list[Module], found: str, expected: str) -> Problem:
    paths = tuple(map(module_path, modules))
    return Problem("module", paths[0] if len(paths) == 1 else fold_modules(modules), found, expected, paths)


@torch.no_grad()
def _run(adapter: _Adapter, parts: dict[str, torch.Tensor]) -> tuple[float, float]:
    """How far a module's output is off, and how far two outputs are apart: relative to the update; 0 within rounding.

    Args:
        adapter: of the module.
        parts: its parameters, in double precision.
    """
    a, b = parts["A"].flatten(1), parts["B"].flatten(1)
    vectors = torch.randn(_TRIED, *parts["A"].shape[1:], generator=torch.Generator().manual_seed(0)).double()
    first, second = (adapter.layer(vectors).flatten(1) for _ in range(2))
    flat = vectors.flatten(1)
    update = adapter.scaling * (flat @ a.T @ b.T)
    # Products are never larger than those of the norms.
    bound = abs(adapter.scaling) * a.norm() * torch.outer(flat.norm(dim=1), b.norm(dim=1))
    if "bias" in parts:
        update, bound = update + adapter.scaling * parts["bias"], bound + abs(adapter.scaling) * parts["bias"].abs()
    if "magnitude" in parts:  # DoRA: each row of the weights is brought to this length, and the base weights are zero
        lengths = (adapter.scaling * b @ a).norm(dim=1)
        factor = torch.where(lengths > 0, parts["magnitude"].flatten() / lengths, 0.0)
        update, bound = update * factor, bound * factor.abs()
        first, second = (torch.where(lengths > 0, output, 0.0) for output in (first, second))
    size = update.norm().item() or 1.0
    return _distance(first, update, bound, size), _distance(first, second, bound, size)


def _distance(one: torch.Tensor, other: torch.Tensor, bound: torch.Tensor, size: float) -> float:
    difference = (one - other).abs()
    return difference.norm().item() / size if not (difference <= _ROUNDING * bound).all() else 0.0


@contextlib.contextmanager
def _in_double(layer: Any) -> Iterator[None]:
    """Have a layer compute in double precision meanwhile, without its base weights, which are zero.

    Nothing else of its state changes: neither its mode, nor what is active.
    """
    base = layer.get_base_layer()
    parameters = list(layer.parameters())
    before = [parameter.data for parameter in parameters]
    zero = torch.zeros((), dtype=torch.float64)

    def without_weights(vectors: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return vectors.new_zeros(len(vectors), *base.weight.shape[:1], *(1,) * (base.weight.dim() - 2))

    of_base = {id(parameter) for parameter in base.parameters()}
    for parameter in parameters:
        parameter.data = zero.expand(parameter.shape) if id(parameter) in of_base else parameter.data.double()
    base.forward = without_weights
    try:
        yield
    finally:
        del base.forward
        for parameter, data in zip(parameters, before, strict=True):
            parameter.data = data


# What the libraries say
