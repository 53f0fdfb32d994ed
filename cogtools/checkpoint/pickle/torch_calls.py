"""What the pickle of a `torch.save` file says about tensors: PyTorch's calls and persistent ids, and nothing else.

A tensor is written as a call of one of the functions in `_REBUILD_TENSOR`, as a rule with a storage, an offset, a shape
and strides; the storage as a persistent id. Here such a call makes a `TensorEntry`: a description, and not a tensor. Of
the kinds of tensors that are no view of one storage (sparse, quantized, nested …) only the kind is told.

Sources: torch/_utils.py and torch/_tensor.py (`_reduce_ex_internal`) for the calls, torch/serialization.py (`_save`,
`_legacy_save`) for the persistent ids.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from cogtools.checkpoint.dtypes import BY_STORAGE_CLASS, BY_TORCH_NAME, UNTYPED_STORAGE_CLASS, DType
from cogtools.checkpoint.pickle.machine import (
    ForgedPickleError,
    Global,
    MalformedPickleError,
    MismatchError,
    PickleMachine,
    Record,
    Vocabulary,
    short_name,
)
from cogtools.checkpoint.pickle.plain_calls import PLAIN_CALLS
from cogtools.checkpoint.plausible import can_be_shape, can_be_steps
from cogtools.checkpoint.tensors import OtherTensor, Storage, TensorEntry
from cogtools.errors import SHOWN_PROBLEMS, CheckpointError
from cogtools.formatting import shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from cogtools.checkpoint.paths import AnyPath

OpenStorage: TypeAlias = "Callable[[str, DType | None, int], Storage]"
"""Gives the storage of a key, for a dtype (None: untyped) and a number of elements."""


class StorageReference(NamedTuple):
    """A storage as a tensor's description names it. `dtype` is None for an untyped storage."""

    storage: Storage
    dtype: DType | None


def torch_vocabulary(open_storage: OpenStorage) -> Vocabulary:
    """All that the pickle of a `torch.save` file may say besides plain data."""
    return Vocabulary(_CALLS, ORDINARY_NAMES, lambda identifier: _persistent(identifier, open_storage))


def _persistent(identifier: object, open_storage: OpenStorage) -> StorageReference | Global:
    """A persistent id: ('storage', class, key, location, elements[, view]), the view being None since PyTorch 0.4.

    Legacy files of whole models also have ('module', class, file name, source); it stands for the class.
    """
    match identifier:
        case ("module", Global() as name, *_):
            return name
        case (
            "storage",
            Global(module="torch" | "torch.storage", name=name),
            str(key),
            str(),
            int(numel),
            *view,
        ) if numel >= 0 and not isinstance(numel, bool) and all(item is None for item in view):
            dtype = BY_STORAGE_CLASS.get(name)
            if dtype is not None or name == UNTYPED_STORAGE_CLASS:
                return StorageReference(open_storage(key, dtype, numel), dtype)
    raise MalformedPickleError("it names a storage in a way that PyTorch does not")


def tensor_entry(reference: object, dtype: DType | None, layout: tuple[object, ...]) -> TensorEntry:
    """A tensor that views a storage; the layout is (offset, shape, stride) in elements.

    Raises:
        MalformedPickleError: if these are of other types, or the storage is too small.
    """
    match (reference, layout):
        case StorageReference(storage=storage), (int(offset), tuple(shape), tuple(stride)) if (
            dtype is not None
            and can_be_shape(shape, dtype.itemsize)
            and can_be_steps(stride, dtype.itemsize)
            and can_be_steps((offset,), dtype.itemsize)
            and len(shape) == len(stride)
        ):
            tensor = TensorEntry(dtype, shape, stride, storage, offset)
        case _:
            raise MalformedPickleError("it describes a tensor in a way that PyTorch does not")
    span_bytes = tensor.span_bytes
    needed = tensor.offset_bytes + span_bytes
    if span_bytes and needed > storage.size_bytes:
        raise ForgedPickleError(
            f"it has a tensor of shape {shape} that needs {needed:,} bytes of storage {shown(storage.key)}, "
            f"which has {storage.size_bytes:,}"
        )
    return tensor


# A tensor with metadata is a lazy view: PyTorch changes the sign of its numbers ("neg"), or of their imaginary parts
# ("conj"), when it reads them. What lies in the storage is not what the tensor is.


def _rebuild_tensor(_machine: PickleMachine, arguments: tuple[object, ...]) -> TensorEntry | OtherTensor:
    """(storage, offset, shape, stride[, requires_grad, hooks[, metadata]])."""
    if any(arguments[6:]):
        return _LAZY_VIEW
    reference = arguments[0] if arguments else None
    dtype = reference.dtype if isinstance(reference, StorageReference) else None
    return tensor_entry(reference, dtype, arguments[1:4])


def _rebuild_tensor_v3(_machine: PickleMachine, arguments: tuple[object, ...]) -> TensorEntry | OtherTensor:
    """(untyped storage, offset, shape, stride, requires_grad, hooks, dtype[, metadata])."""
    if any(arguments[7:]):
        return _LAZY_VIEW
    match arguments:
        case (reference, offset, shape, stride, _, _, Global(module="torch", name=name), *_):
            return tensor_entry(reference, BY_TORCH_NAME.get(name), (offset, shape, stride))
        case _:
            raise MalformedPickleError("it describes a tensor in a way that PyTorch does not")


def _rebuild_parameter(_machine: PickleMachine, arguments: tuple[object, ...]) -> object:
    """(tensor, requires_grad, hooks): the tensor is all that counts."""
    if not arguments:
        raise MalformedPickleError("it describes a parameter without a tensor")
    return arguments[0]


def _rebuild_parameter_with_state(machine: PickleMachine, arguments: tuple[object, ...]) -> object:
    """(tensor, requires_grad, hooks, state): a parameter with attributes."""
    match arguments:
        case (TensorEntry() as tensor, _, _, dict(state)):
            return replace(tensor, attributes=_attributes(machine, state))
        case _:
            return _rebuild_parameter(machine, arguments)


def _rebuild_from_type(machine: PickleMachine, arguments: tuple[object, ...]) -> object:
    """(function, class, arguments, state): a tensor of a subclass, or with attributes, as DeepSpeed's `ds_shape`."""
    match arguments:
        case (Global() as function, Global(), tuple(inner), state) if function in _REBUILD_TENSOR:
            tensor = _REBUILD_TENSOR[function](machine, inner)
        case _:
            return Record(Global("torch._tensor", "_rebuild_from_type_v2"), arguments)
    if isinstance(state, tuple) and state:  # (attributes, slots)
        state = state[0]
    if isinstance(tensor, TensorEntry) and isinstance(state, dict):
        return replace(tensor, attributes=_attributes(machine, state))
    return tensor


def _attributes(machine: PickleMachine, state: dict[object, object]) -> dict[str, object]:
    machine.spend(len(state))
    return {name: value for name, value in state.items() if isinstance(name, str)}


def _size(_machine: PickleMachine, arguments: tuple[object, ...]) -> object:
    """((int, …),): a torch.Size is a tuple."""
    match arguments:
        case (tuple(shape),) if can_be_shape(shape):
            return shape
        case _:
            return Record(Global("torch", "Size"), arguments)


# Tensors that are not a view of one storage


_LAZY_VIEW = OtherTensor("a conjugated or negated view of a tensor")
_META = OtherTensor(
    "a tensor of the meta device, without values",
    "save the model once its weights are loaded: a model that was made on the meta device, or is offloaded, has none",
)
_DISTRIBUTED = OtherTensor(
    "a part of a tensor that is spread over processes (DTensor)",
    "save whole tensors in the training: torch.distributed.checkpoint.state_dict.get_model_state_dict with "
    "StateDictOptions(full_state_dict=True), or full_tensor() of each",
)
_OTHER_DEVICE = OtherTensor("a tensor of another device, as a NumPy array")
_SUBCLASS = OtherTensor("a tensor of a class of its own")

_DISTRIBUTED_CLASSES = {
    Global("torch.distributed.tensor", "DTensor"),
    Global("torch.distributed._tensor.api", "DTensor"),
    Global("torch.distributed.tensor._api", "DTensor"),
    Global("torch.distributed._tensor", "DTensor"),
}


def _always(tensor: OtherTensor) -> Callable[[PickleMachine, tuple[object, ...]], OtherTensor]:
    return lambda _machine, _arguments: tensor


def _rebuild_wrapper(_machine: PickleMachine, arguments: tuple[object, ...]) -> OtherTensor:
    """(class, dtype, size, stride, offset, layout, device, requires_grad): what it wraps is in its attributes."""
    match arguments:
        case (Global() as name, *_) if name in _DISTRIBUTED_CLASSES:
            return _DISTRIBUTED
        case _:
            return _SUBCLASS


def _rebuild_from_cpu(_machine: PickleMachine, arguments: tuple[object, ...]) -> object:
    """(tensor, dtype, device, requires_grad): a tensor of a device without storages, saved as its copy on the CPU."""
    match arguments:
        case (TensorEntry() as tensor, Global(module="torch", name=name), *_) if name == tensor.dtype.name:
            return tensor
        case _:
            return _OTHER_DEVICE


def _layout(_machine: PickleMachine, arguments: tuple[object, ...]) -> object:
    """("torch.sparse_coo",): the layout of a sparse tensor, by its name."""
    return arguments[0] if len(arguments) == 1 else None


Rebuild: TypeAlias = "Callable[[PickleMachine, tuple[object, ...]], object]"

_REBUILD_TENSOR: dict[Global, Rebuild] = {
    Global("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    Global("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    Global("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    Global("torch._utils", "_rebuild_sparse_tensor"): _always(OtherTensor("a sparse tensor")),
    Global("torch._utils", "_rebuild_qtensor"): _always(OtherTensor("a quantized tensor")),
    Global("torch._utils", "_rebuild_nested_tensor"): _always(OtherTensor("a nested tensor")),
    Global("torch._utils", "_rebuild_meta_tensor_no_storage"): _always(_META),
    Global("torch._utils", "_rebuild_wrapper_subclass"): _rebuild_wrapper,
    Global("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _rebuild_from_cpu,
    Global("torch._utils", "_rebuild_device_tensor_from_numpy"): _always(_OTHER_DEVICE),
    Global("torch._utils", "_rebuild_xla_tensor"): _always(_OTHER_DEVICE),
    Global("torch.nested._internal.nested_tensor", "_rebuild_njt"): _always(OtherTensor("a nested tensor")),
}
"""The functions by which PyTorch writes a tensor of any kind (torch/_tensor.py, `_reduce_ex_internal`)."""

_CALLS: dict[Global, Rebuild] = {
    **PLAIN_CALLS,
    **_REBUILD_TENSOR,
    Global("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    Global("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter_with_state,
    Global("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    Global("torch", "Size"): _size,
    Global("torch.serialization", "_get_layout"): _layout,
}

ORDINARY_NAMES = frozenset(
    {
        Global("torch", "Tensor"),
        Global("torch.nn.parameter", "Parameter"),
        Global("torch.storage", UNTYPED_STORAGE_CLASS),
        *(Global("torch", name) for name in BY_STORAGE_CLASS),
        *(Global("torch", name) for name in BY_TORCH_NAME),
        Global("torch", "per_tensor_affine"),
        Global("torch", "per_tensor_symmetric"),
        Global("torch", "per_channel_affine"),
        Global("torch", "per_channel_symmetric"),
        Global("torch", "per_channel_affine_float_qparams"),
        *_DISTRIBUTED_CLASSES,
    }
)


def malformed(path: AnyPath, error: MalformedPickleError, *, intact: bool = False) -> CheckpointError:
    """The error for a file whose pickle is broken.

    Args:
        path: the file.
        error: what is wrong with it.
        intact: whether the file records a CRC-32 of the pickle, and it fits: then the pickle was written like this.
    """
    if not intact or isinstance(error, MismatchError):
        hint = "copy or download it again"
    elif isinstance(error, ForgedPickleError):
        hint = "it is not damaged: it was made to look like a checkpoint. Do not torch.load it"
    else:
        hint = "it is not damaged, but not as torch.save writes it: save the weights again, with torch.save"
    names = [short_name(name) for name in islice(error.foreign, SHOWN_PROBLEMS)]
    return CheckpointError(
        "the checkpoint's pickle cannot be read",
        file=path,
        found=str(error) + (f"; it names {', '.join(names)}" if names else ""),
        hint=hint,
    )
