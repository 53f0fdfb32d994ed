"""The names that `torch.load(weights_only=True)` allows: to call them, whatever the arguments, runs no code of a file.

Written by tools/torch_names.py from PyTorch 2.13.0: `_get_allowed_globals` of torch/_weights_only_unpickler.py, and
what PyTorch's own modules add with `torch.serialization.add_safe_globals`.
"""

# fmt: off
TORCH_NAMES = {
    "_codecs": frozenset({
        "encode",
    }),
    "builtins": frozenset({
        "bytearray", "complex", "set",
    }),
    "collections": frozenset({
        "Counter", "OrderedDict",
    }),
    "torch": frozenset({
        "BFloat16Storage", "BFloat16Tensor", "BoolStorage", "BoolTensor", "ByteStorage", "ByteTensor",
        "CharStorage", "CharTensor", "ComplexDoubleStorage", "ComplexFloatStorage", "DoubleStorage", "DoubleTensor",
        "FloatStorage", "FloatTensor", "HalfStorage", "HalfTensor", "IntStorage", "IntTensor", "LongStorage",
        "LongTensor", "QInt32Storage", "QInt8Storage", "QUInt2x4Storage", "QUInt4x2Storage", "QUInt8Storage",
        "ShortStorage", "ShortTensor", "Size", "Tensor", "bfloat16", "bits16", "bits1x8", "bits2x4", "bits4x2",
        "bits8", "bool", "complex128", "complex32", "complex64", "device", "float16", "float32", "float4_e2m1fn_x2",
        "float64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "int1",
        "int16", "int2", "int3", "int32", "int4", "int5", "int6", "int64", "int7", "int8", "per_channel_affine",
        "per_channel_affine_float_qparams", "per_channel_symmetric", "per_tensor_affine", "per_tensor_symmetric",
        "qint32", "qint8", "quint2x4", "quint4x2", "quint8", "uint1", "uint16", "uint2", "uint3", "uint32", "uint4",
        "uint5", "uint6", "uint64", "uint7", "uint8",
    }),
    "torch._dynamo.decorators": frozenset({
        "_DimRange",
    }),
    "torch._tensor": frozenset({
        "_rebuild_from_type_v2",
    }),
    "torch._utils": frozenset({
        "_rebuild_device_tensor_from_cpu_tensor", "_rebuild_device_tensor_from_numpy",
        "_rebuild_meta_tensor_no_storage", "_rebuild_nested_tensor", "_rebuild_parameter",
        "_rebuild_parameter_with_state", "_rebuild_qtensor", "_rebuild_sparse_tensor", "_rebuild_tensor",
        "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_wrapper_subclass",
    }),
    "torch.cuda": frozenset({
        "BFloat16Storage", "BFloat16Tensor", "BoolStorage", "BoolTensor", "ByteStorage", "ByteTensor",
        "CharStorage", "CharTensor", "ComplexDoubleStorage", "ComplexFloatStorage", "DoubleStorage", "DoubleTensor",
        "FloatStorage", "FloatTensor", "HalfStorage", "HalfTensor", "IntStorage", "IntTensor", "LongStorage",
        "LongTensor", "ShortStorage", "ShortTensor",
    }),
    "torch.cuda.sparse": frozenset({
        "BFloat16Tensor", "ByteTensor", "CharTensor", "DoubleTensor", "FloatTensor", "HalfTensor", "IntTensor",
        "LongTensor", "ShortTensor",
    }),
    "torch.distributed._mesh_layout": frozenset({
        "_FlatLayout", "_MeshLayout",
    }),
    "torch.distributed._serialization": frozenset({
        "_Entry",
    }),
    "torch.distributed.device_mesh": frozenset({
        "DeviceMesh",
    }),
    "torch.distributed.tensor": frozenset({
        "DTensor",
    }),
    "torch.distributed.tensor._dtensor_spec": frozenset({
        "DTensorSpec", "ShardOrderEntry", "TensorMeta",
    }),
    "torch.distributed.tensor.placement_types": frozenset({
        "Partial", "Replicate", "Shard", "_StridedShard",
    }),
    "torch.nested._internal.nested_tensor": frozenset({
        "NestedTensor", "_rebuild_njt",
    }),
    "torch.nn.parameter": frozenset({
        "Parameter",
    }),
    "torch.serialization": frozenset({
        "_get_layout",
    }),
    "torch.sparse": frozenset({
        "BFloat16Tensor", "ByteTensor", "CharTensor", "DoubleTensor", "FloatTensor", "HalfTensor", "IntTensor",
        "LongTensor", "ShortTensor",
    }),
    "torch.storage": frozenset({
        "TypedStorage", "UntypedStorage",
    }),
}
"""By module."""
# fmt: on
