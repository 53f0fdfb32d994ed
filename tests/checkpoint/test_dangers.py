"""Names in a pickle that can run code where it is loaded are judged dangerous, those of honest checkpoints are not."""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cogtools.checkpoint.dtypes import DType
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.checkpoint.pickle.dangers import DANGEROUS_NAMES, danger_of
from cogtools.checkpoint.pickle.machine import Global, MalformedPickleError, read_pickle
from cogtools.checkpoint.pickle.torch_calls import torch_vocabulary
from cogtools.checkpoint.pickle.torch_names import TORCH_NAMES
from cogtools.checkpoint.tensors import Storage
from cogtools.errors import CheckpointError
from tests.support import hostile
from tools.torch_names import TARGET, allowed_names, source

OF_TORCH: dict[str, Callable[[], object]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "meta": lambda: torch.empty(3, device="meta"),
    "float4": lambda: torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "device": lambda: torch.device("cpu"),
    "counter": lambda: Counter("aab"),
}


def names_in(pickled: bytes) -> set[Global]:
    def open_storage(key: str, dtype: DType | None, numel: int) -> Storage:
        return Storage(key, numel * (dtype.itemsize if dtype else 1), None, pytest.fail)

    try:
        return set(read_pickle(pickled, torch_vocabulary(open_storage)).foreign)
    except MalformedPickleError as error:
        return set(error.foreign)


OLD = ("opcode-protocol-0", "opcode-old-", "opcode-python-2-inst")


def firing(scratch: Path) -> Iterator[tuple[str, set[Global]]]:
    """Every row of the corpus that runs code where it is loaded (shown by another test), and the names in it.

    Without those that are refused before any name is read: what is written in protocol 0 or 1.
    """
    for row in hostile.pickles():
        if row.fires and not row.id.startswith(OLD):
            yield row.id, names_in(row.pickle)
    for number, file in enumerate(file for file in hostile.files() if file.fires):
        folder = scratch / str(number)
        folder.mkdir()
        try:
            with open_checkpoint(file.write(folder)) as checkpoint:
                yield file.id, set(checkpoint.foreign)
        except CheckpointError:
            continue  # refused: what it names is in the error, whatever it is


def test_every_gadget_that_fires_is_judged_dangerous(tmp_path: Path) -> None:
    own = Global(hostile.CANARY, "canary")  # a module of the attacker's: nobody can know what is in it
    missed = [
        identifier
        for identifier, names in firing(tmp_path)
        if own not in names and not any(danger_of(*name) == "dangerous" for name in names)
    ]
    assert missed == []


def test_what_torch_allows_with_weights_only_is_harmless_and_in_no_table_of_dangers() -> None:
    names = [(module, name) for module, names in TORCH_NAMES.items() for name in names]

    assert len(names) >= 157
    assert [name for name in names if danger_of(*name) != "harmless"] == []
    assert [(module, name) for module, name in names if name in DANGEROUS_NAMES.get(module, ())] == []


def test_the_installed_torch_allows_nothing_that_is_not_known() -> None:
    # If this fails, PyTorch is newer than the list: run `python -m tools.torch_names`, and read what is new.
    more = {module: names - TORCH_NAMES.get(module, frozenset()) for module, names in allowed_names().items()}

    assert {module: names for module, names in more.items() if names} == {}


def test_the_list_of_torch_is_what_its_script_writes() -> None:
    version = re.search(r"from PyTorch ([0-9.]+[0-9]):", TARGET.read_text())

    assert version is not None
    assert TARGET.read_text() == source({module: set(names) for module, names in TORCH_NAMES.items()}, version[1])


@pytest.mark.parametrize("save", ["sparse", "csr", "quantized", "nested", "meta", "float4", "device", "counter"])
def test_no_tensor_that_torch_loads_with_weights_only_names_a_danger(save: str, tmp_path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):  # of kinds that PyTorch does not make any more, or not yet for good
        torch.save({"a": torch.arange(3), "b": OF_TORCH[save]()}, tmp_path / "x.pt")
        torch.load(tmp_path / "x.pt", weights_only=True)

    with open_checkpoint(tmp_path / "x.pt") as checkpoint:
        assert {str(name): danger_of(*name) for name in checkpoint.foreign if danger_of(*name) != "harmless"} == {}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *(("random", "_os"), ("random", "_os.system"), ("secrets", "random._os.system"), ("heapq", "sys")),
        *(("collections", "_sys"), ("collections", "_sys.modules"), ("uuid", "os"), ("mine", "_subprocess")),
        *(("cgitb", "lookup"), ("uuid", "_get_command_stdout"), ("_osx_support", "_read_output")),
        *(("_pyrepl.pager", "pipe_pager"), ("_aix_support", "_read_cmd_output"), ("_xxsubinterpreters", "create")),
        *(("__builtins__", "eval"), ("mailcap", "findmatch"), ("dataclasses", "make_dataclass"), ("gettext", "c2py")),
        *(("lzma", "LZMAFile"), ("gzip", "GzipFile"), ("typing", "get_type_hints"), ("xml.sax", "make_parser")),
        *(("numpy", "ndarray.tofile"), ("pathlib", "Path.touch"), ("mine", "Config.Inner"), ("mine", "__loader__")),
        *(("torch.ops", "load_library"), ("torch._ops", "load_library"), ("torch._utils", "_import_dotted_name")),
    ],
)
def test_what_can_run_code_or_reach_a_module_that_can_is_dangerous(module: str, name: str) -> None:
    assert danger_of(module, name) == "dangerous"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *(("__main__", "Config"), ("mine", "Config"), ("torch.nn.modules.linear", "Linear"), ("enum", "Enum")),
        *(("collections", "ChainMap"), ("random", "Random"), ("re", "_compile"), ("math", "sqrt")),
    ],
)
def test_what_is_not_known_to_do_either_is_unknown(module: str, name: str) -> None:
    assert danger_of(module, name) == "unknown"
