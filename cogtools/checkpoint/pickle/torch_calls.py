"""What the pickle of a `torch.save` file says about tensors: PyTorch's calls and persistent ids, and nothing else.

A tensor is written as a call of one of the functions in `_REBUILD_TENSOR` with a storage, an offset, a shape and
strides; the storage as a persistent id. Here such a call makes a `TensorEntry`: a description, no tensor.

Sources: torch/_utils.py and torch/_tensor.py (`_reduce_ex_internal`) for the calls, torch/serialization.py (`_save`,
`_legacy_save`) for the persistent ids.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from cogtools.checkpoint.dtypes import BY_STORAGE_CLASS, DTYPES, UNTYPED_STORAGE_CLASS, DType
from cogtools.checkpoint.pickle.machine import (
    Global,
    MalformedPickleError,
    PickleMachine,
    Record,
    Vocabulary,
    short_name,
)
from cogtools.checkpoint.pickle.plain_calls import PLAIN_CALLS
from cogtools.checkpoint.plausible import can_be_shape, can_be_steps
from cogtools.checkpoint.tensors import Storage, TensorEntry
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
        raise MalformedPickleError(
            f"it has a tensor of shape {shape} that needs {needed:,} bytes of storage {shown(storage.key)}, "
            f"which has {storage.size_bytes:,}"
        )
    return tensor


def _rebuild_tensor(_machine: PickleMachine, arguments: tuple[object, ...]) -> TensorEntry | Record:
    """(storage, offset, shape, stride[, requires_grad, hooks[, metadata]])."""
    if any(arguments[6:]):
        return Record(_REBUILD_TENSOR_V2, arguments)
    reference = arguments[0] if arguments else None
    dtype = reference.dtype if isinstance(reference, StorageReference) else None
    return tensor_entry(reference, dtype, arguments[1:4])


def _rebuild_tensor_v3(_machine: PickleMachine, arguments: tuple[object, ...]) -> TensorEntry | Record:
    """(untyped storage, offset, shape, stride, requires_grad, hooks, dtype[, metadata])."""
    if any(arguments[7:]):
        return Record(_REBUILD_TENSOR_V3, arguments)
    match arguments:
        case (reference, offset, shape, stride, _, _, Global(module="torch", name=name), *_):
            return tensor_entry(reference, DTYPES.get(name), (offset, shape, stride))
        case _:
            raise MalformedPickleError("it describes a tensor in a way that PyTorch does not")


# A tensor with metadata is a lazy view: PyTorch changes the sign of its numbers ("neg"), or of their imaginary parts
# ("conj"), when it reads them. What lies in the storage is not what the tensor is, so it stays a record.
_REBUILD_TENSOR_V2 = Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_TENSOR_V3 = Global("torch._utils", "_rebuild_tensor_v3")


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
    """(function, class, arguments, state): a tensor with attributes, such as DeepSpeed's `ds_shape`."""
    match arguments:
        case (Global() as function, Global(), tuple(inner), dict(state)) if function in _REBUILD_TENSOR:
            tensor = _REBUILD_TENSOR[function](machine, inner)
            if isinstance(tensor, TensorEntry):
                return replace(tensor, attributes=_attributes(machine, state))
            return tensor
        case _:
            return Record(Global("torch._tensor", "_rebuild_from_type_v2"), arguments)


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


_REBUILD_TENSOR: dict[Global, Callable[[PickleMachine, tuple[object, ...]], TensorEntry | Record]] = {
    Global("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    _REBUILD_TENSOR_V2: _rebuild_tensor,
    _REBUILD_TENSOR_V3: _rebuild_tensor_v3,
}

_CALLS: dict[Global, Callable[[PickleMachine, tuple[object, ...]], object]] = {
    **PLAIN_CALLS,
    **_REBUILD_TENSOR,
    Global("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    Global("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter_with_state,
    Global("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    Global("torch", "Size"): _size,
}

ORDINARY_NAMES = frozenset(
    {
        Global("torch", "Tensor"),
        Global("torch.nn.parameter", "Parameter"),
        Global("torch.storage", UNTYPED_STORAGE_CLASS),
        *(Global("torch", name) for name in BY_STORAGE_CLASS),
        *(Global("torch", name) for name in DTYPES),
    }
)


def malformed(path: AnyPath, error: MalformedPickleError) -> CheckpointError:
    """The error for a file whose pickle is broken."""
    names = [short_name(name) for name in islice(error.foreign, SHOWN_PROBLEMS)]
    return CheckpointError(
        "the checkpoint's pickle cannot be read",
        file=path,
        found=str(error) + (f"; it names {', '.join(names)}" if names else ""),
        hint="copy or download it again; if it stays so, it was made to look like a checkpoint: do not torch.load it",
    )
