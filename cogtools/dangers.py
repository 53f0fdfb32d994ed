"""Which names in a pickle are known and harmless, and which can run code when the file is unpickled.

`torch.load(weights_only=False)` and `pickle.load` import and call what a pickle names. cogtools does neither; it
lists the names and says what loading them elsewhere would mean. A name in neither table is unknown.
"""

from __future__ import annotations

from typing import Literal

Danger = Literal["harmless", "unknown", "dangerous"]

_PLAIN_BUILTINS = {
    *("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "long"),
    *("object", "range", "set", "slice", "str", "tuple", "unicode", "xrange"),
}

HARMLESS = {
    # Trainers and libraries, in the state that they save beside weights
    "argparse": {"Namespace"},
    "deepspeed.runtime.fp16.loss_scaler": {"DynamicLossScaler", "LossScaler"},
    "deepspeed.runtime.zero.config": {"ZeroStageEnum"},
    "deepspeed.utils.tensor_fragment": {"fragment_address"},
    "numpy": {"bool_", "dtype", "float32", "float64", "int32", "int64", "ndarray", "uint8"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy.random._mt19937": {"MT19937"},
    "omegaconf.base": {"ContainerMetadata", "Metadata"},
    "omegaconf.dictconfig": {"DictConfig"},
    "omegaconf.listconfig": {"ListConfig"},
    "omegaconf.nodes": {"AnyNode"},
    "torch": {"device", "dtype"},
    "torch._utils": {"_rebuild_device_tensor_from_numpy", "_rebuild_qtensor", "_rebuild_sparse_tensor"},
    # Plain data
    "builtins": _PLAIN_BUILTINS,
    "__builtin__": _PLAIN_BUILTINS,
    "_codecs": {"encode"},
    "collections": {"Counter", "OrderedDict", "defaultdict", "deque"},
    "copy_reg": {"_reconstructor"},
    "copyreg": {"_reconstructor"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "types": {"SimpleNamespace"},
    "typing": {"Any", "Dict", "List"},
    "uuid": {"UUID"},
}
"""By module: classes and functions that make data when they are called, whatever the arguments."""

DANGEROUS_MODULES = frozenset(
    {
        # The system and its processes
        *("_posixsubprocess", "_winapi", "commands", "mmap", "multiprocessing", "nt", "ntpath", "os", "platform"),
        *("popen2", "posix", "posixpath", "pty", "signal", "subprocess", "sys", "_thread", "threading"),
        *("concurrent", "asyncio", "sched", "venv", "ensurepip", "pip", "setuptools", "distutils", "pkg_resources"),
        # Running, compiling and importing code
        *("_frozen_importlib", "_imp", "bdb", "builtins", "__builtin__", "cProfile", "code", "codeop", "ctypes"),
        *("_ctypes", "cffi", "doctest", "imp", "importlib", "marshal", "pdb", "pkgutil", "profile", "pstats"),
        *("py_compile", "pydoc", "runpy", "site", "test", "timeit", "trace", "types", "unittest", "zipimport"),
        *("idlelib", "lib2to3", "numba", "llvmlite", "cython", "IPython", "pytest", "tkinter", "turtle"),
        # Calling what it is given, or reaching any attribute
        *("_functools", "_operator", "functools", "gc", "inspect", "itertools", "operator", "weakref", "atexit"),
        # Pickles inside of pickles
        *("_pickle", "cPickle", "cloudpickle", "dill", "joblib", "pandas", "pickle", "shelve", "yaml"),
        # Files and the network
        *("_io", "_socket", "aiohttp", "fileinput", "ftplib", "glob", "http", "httplib", "httpx", "imaplib", "io"),
        *("linecache", "logging", "nntplib", "poplib", "requests", "shutil", "smtplib", "socket", "socketserver"),
        *("sqlite3", "ssl", "telnetlib", "tempfile", "urllib", "urllib2", "webbrowser", "xmlrpc", "zipfile"),
        *("tarfile", "antigravity"),
        # Libraries that run or load code
        *("torch.hub", "torch.jit", "torch.package", "torch.serialization", "torch.utils", "torch._dynamo"),
        *("torch._inductor", "torch.fx", "torch.distributed", "torch.multiprocessing", "torch._classes", "torch.ops"),
        *("torch._ops", "torch.library", "numpy.f2py", "numpy.testing", "numpy.distutils", "numpy.ctypeslib"),
        *("transformers.dynamic_module_utils", "huggingface_hub", "keras", "tensorflow"),
    }
)
"""Every name in these modules, and in the modules inside of them, except those that are harmless."""

DANGEROUS_NAMES = {
    "numpy": {"fromfile", "fromregex", "genfromtxt", "load", "loadtxt", "memmap", "save", "savetxt", "savez"},
    "torch": {"compile", "from_file", "load", "save"},
    "torch.storage": {"_load_from_bytes"},
    "codecs": {"open"},
    "bz2": {"open"},
    "gzip": {"open"},
    "lzma": {"open"},
    "pathlib": {"os", "io"},
    "collections": {"namedtuple", "_sys"},
    "copyreg": {"pickle", "add_extension"},
    "random": {"_os"},
    "uuid": {"_popen", "os"},
}
"""Single names in other modules."""


def danger_of(module: str, name: str) -> Danger:
    """What importing and calling this name can do."""
    if name in HARMLESS.get(module, ()):
        return "harmless"
    if name in DANGEROUS_NAMES.get(module, ()):
        return "dangerous"
    parts = name.split(".", 16)
    # A dotted name climbs from a harmless object to any other.
    climbs = len(parts) > 1 and (module in HARMLESS or not DANGEROUS_MODULES.isdisjoint(parts))
    if climbs or any(part.startswith("__") for part in parts):
        return "dangerous"
    return "dangerous" if _is_inside(module) else "unknown"


def _is_inside(module: str) -> bool:
    """Whether a module, or one that it is inside of, is dangerous."""
    parts = module.split(".", 4)[:4]
    return any(".".join(parts[:depth]) in DANGEROUS_MODULES for depth in range(1, len(parts) + 1))
