"""Write cogtools/checkpoint/pickle/torch_names.py: the names that `torch.load(weights_only=True)` allows.

    python -m tools.torch_names

Run it with the newest PyTorch that is supported; `tests/checkpoint/test_dangers.py` fails where the installed one
allows more than the file has.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from pathlib import Path

TARGET = Path(__file__).parents[1] / "cogtools" / "checkpoint" / "pickle" / "torch_names.py"

REGISTERING = (
    "torch.nested",
    "torch.distributed._serialization",
    "torch.distributed.device_mesh",
    "torch.distributed.tensor",
    "torch._dynamo",
)
"""The modules of PyTorch that allow further names when they are imported."""

HEADER = '''\
"""The names that `torch.load(weights_only=True)` allows: to call them, whatever the arguments, runs no code of a file.

Written by tools/torch_names.py from PyTorch {version}: `_get_allowed_globals` of torch/_weights_only_unpickler.py, and
what PyTorch's own modules add with `torch.serialization.add_safe_globals`.
"""

# fmt: off
TORCH_NAMES = {{
'''


def allowed_names() -> dict[str, set[str]]:
    """The names that the installed PyTorch allows, by module."""
    from torch import _weights_only_unpickler as unpickler

    for module in REGISTERING:
        importlib.import_module(module)
    user_names = unpickler._get_user_allowed_globals()  # type: ignore[no-untyped-call]  # noqa: SLF001
    names: dict[str, set[str]] = defaultdict(set)
    for path in {*unpickler._get_allowed_globals(), *user_names}:  # noqa: SLF001
        module, _, name = path.rpartition(".")
        names[module].add(name)
    return dict(names)


def source(names: dict[str, set[str]], version: str) -> str:
    """The module that has these names."""
    lines = [HEADER.format(version=version)]
    for module in sorted(names):
        lines.append(f'    "{module}": frozenset({{\n')
        line = "       "
        for name in sorted(names[module]):
            if len(line) + len(name) > 112:
                lines.append(line + "\n")
                line = "       "
            line += f' "{name}",'
        lines += [line + "\n", "    }),\n"]
    return "".join([*lines, "}\n", '"""By module."""\n', "# fmt: on\n"])


def main() -> None:
    """Write the file."""
    import torch

    TARGET.write_text(source(allowed_names(), torch.__version__.partition("+")[0]))


if __name__ == "__main__":
    main()
