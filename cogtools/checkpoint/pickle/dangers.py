"""Which names in a pickle are known and harmless, and which can run code when the file is unpickled.

`torch.load(weights_only=False)` and `pickle.load` import and call what a pickle names. cogtools does neither; it
lists the names and says what loading them elsewhere would mean. A name in none of the tables is unknown. What
`torch.load(weights_only=True)` allows is never called dangerous.

Python's standard library is dangerous as a whole, except for what is known to be harmless: most of its modules can be
made to run code, open files for writing, or reach a module that can.
"""

from __future__ import annotations

import sys
from typing import Literal

from cogtools.checkpoint.pickle.torch_names import TORCH_NAMES

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
    "torch": {"dtype"},
    "torch._utils": {"_rebuild_xla_tensor"},
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
    "typing": {"Any", "Dict", "List", "Optional", "Tuple", "Union"},
    "uuid": {"SafeUUID", "UUID"},
}
"""By module: classes and functions that make data when they are called, whatever the arguments. So do `TORCH_NAMES`."""

HARMLESS_MODULES = frozenset(
    {
        *("abc", "array", "base64", "binascii", "bisect", "calendar", "cmath", "collections", "colorsys", "copy"),
        *(
            "copyreg",
            "datetime",
            "decimal",
            "enum",
            "errno",
            "fractions",
            "graphlib",
            "hashlib",
            "heapq",
            "hmac",
            "html",
        ),
        *("ipaddress", "json", "keyword", "math", "numbers", "random", "re", "secrets", "statistics", "string"),
        *("struct", "textwrap", "time", "token", "unicodedata", "zlib", "zoneinfo"),
    }
)
"""Modules of the standard library that only compute: their other names are unknown, not dangerous."""

DANGEROUS_MODULES = frozenset(
    {
        *sys.stdlib_module_names - HARMLESS_MODULES - {f"_{module}" for module in HARMLESS_MODULES},
        # Not there in every version of Python
        *(
            "__builtin__",
            "__builtins__",
            "_aix_support",
            "_interpreters",
            "_osx_support",
            "_pyrepl",
            "_winapi",
            "_xxsubinterpreters",
        ),
        *("aifc", "asynchat", "asyncore", "cPickle", "cgi", "cgitb", "commands", "crypt", "distutils", "httplib"),
        *("idlelib", "imghdr", "imp", "lib2to3", "mailcap", "msilib", "nis", "nntplib", "nt", "pipes", "popen2"),
        *("posix", "smtpd", "sndhdr", "sunau", "telnetlib", "test", "urllib2", "uu", "xdrlib"),
        # Installers, and libraries that run or load code, or open files and connections
        *("IPython", "aiohttp", "cffi", "cloudpickle", "cython", "dill", "httpx", "huggingface_hub", "joblib", "keras"),
        *("llvmlite", "numba", "pandas", "pexpect", "pip", "pkg_resources", "pytest", "requests", "setuptools"),
        *("tensorflow", "transformers.dynamic_module_utils", "yaml"),
        *("numpy.ctypeslib", "numpy.distutils", "numpy.f2py", "numpy.testing"),
        *("torch._classes", "torch._dynamo", "torch._inductor", "torch._ops", "torch.distributed", "torch.fx"),
        *("torch.hub", "torch.jit", "torch.library", "torch.multiprocessing", "torch.ops", "torch.package"),
        *("torch.serialization", "torch.utils"),
    }
)
"""Every name in these modules, and in the modules inside of them, except those that are harmless."""

DANGEROUS_NAMES = {
    "numpy": {"fromfile", "fromregex", "genfromtxt", "load", "loadtxt", "memmap", "save", "savetxt", "savez"},
    "torch": {"compile", "from_file", "load", "save"},
    "torch._tensor": {"_rebuild_from_type"},
    "torch._utils": {"_import_dotted_name"},
    "torch.storage": {"_load_from_bytes"},
    "collections": {"namedtuple"},
    "copyreg": {"add_extension", "pickle"},
}
"""Single names in other modules."""


def danger_of(module: str, name: str) -> Danger:
    """What importing and calling this name can do."""
    if name in HARMLESS.get(module, ()) or name in TORCH_NAMES.get(module, ()):
        return "harmless"
    if name in DANGEROUS_NAMES.get(module, ()):
        return "dangerous"
    # A dotted name climbs from one object to any other; a name may be that of a module which another one imports.
    climbs = "." in name or name.startswith("__") or name.lstrip("_") in _BARE_MODULES
    return "dangerous" if climbs or _is_inside(module) else "unknown"


def _bare(module: str) -> str:
    """A module's name without leading underscores: Python names most of what is public a second time so."""
    return ".".join(part.lstrip("_") for part in module.split(".", 4)[:4])


_BARE_MODULES = frozenset(map(_bare, DANGEROUS_MODULES))


def _is_inside(module: str) -> bool:
    """Whether a module, or one that it is inside of, is dangerous."""
    parts = _bare(module).split(".")
    return any(".".join(parts[:depth]) in _BARE_MODULES for depth in range(1, len(parts) + 1))
