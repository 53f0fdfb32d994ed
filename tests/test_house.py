"""Which room of the package may know which: read from the imports, those for type checkers and in functions too."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import cogtools

PACKAGE = Path(cogtools.__file__).parent

GROUND = frozenset({"errors", "formatting", "interruption", "system", "version"})
"""The modules of the root that every room stands on."""

CORE = GROUND | {"checkpoint", "layouts", "conversion"}

MAY_IMPORT = {
    # the ground
    "errors": set(),
    "formatting": set(),
    "version": set(),
    "interruption": {"errors", "formatting"},
    "system": {"errors", "formatting", "interruption"},
    # the core
    "layouts": {"errors", "formatting"},
    "checkpoint": GROUND,
    "conversion": GROUND | {"checkpoint", "layouts"},
    # the commands: one may ask another, to resume a batch and for --verify
    "export": CORE | {"verification"},
    "inspection": CORE,
    "verification": CORE,
    # what the user sees
    "render": GROUND | {"layouts", "conversion", "export", "inspection", "verification"},
    "cli": CORE | {"export", "inspection", "verification", "render"},
    "__main__": GROUND | {"cli"},
    "__init__": CORE | {"export", "inspection", "verification"},
}
"""By room, or by module of the root, the others that it may import."""

SHOWN = frozenset({"scale", "options", "readers", "loss"})
"""The modules of conversion/ that render/ may import: reports, and the words for what stands in them. It never sees a
Checkpoint, a Lora or a plan."""


def imports_of(source: str) -> Iterator[str]:
    """The modules of the package that a source text imports, wherever in it that is.

    What is imported from a module may be a module itself: both are given.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "cogtools")


def name_of(path: Path) -> str:
    parts = ("cogtools", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


MODULES = {name_of(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
IMPORTS = {name: {found for found in imports_of(source) if found in MODULES} for name, source in MODULES.items()}


def room_of(module: str) -> str:
    """The room of a module, or the module itself where it is one of the root."""
    return (*module.split("."), "__init__")[1]


def between_rooms() -> list[tuple[str, str]]:
    """Who imports what of another room."""
    pairs = ((name, found) for name, imports in IMPORTS.items() for found in imports)
    # The package itself is the public API: importing a module of it runs it first, whoever does.
    return [(name, found) for name, found in pairs if room_of(name) != room_of(found) and found != "cogtools"]


def test_imports_are_found_wherever_they_are() -> None:
    source = """
import cogtools.errors
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from cogtools.conversion.plan import LoraPlan
def late():
    from cogtools import layouts
    import numpy
"""
    assert set(imports_of(source)) == {
        *("cogtools.errors", "cogtools.conversion.plan", "cogtools.conversion.plan.LoraPlan"),
        *("cogtools", "cogtools.layouts"),
    }


def test_every_module_has_its_place() -> None:
    assert {room_of(name) for name in MODULES} == MAY_IMPORT.keys()


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_knows_those_below_it_only(room: str) -> None:
    beyond = [
        f"{name} imports {found}"
        for name, found in between_rooms()
        if room_of(name) == room and room_of(found) not in MAY_IMPORT[room]
    ]
    assert beyond == []


def test_what_is_shown_is_a_report() -> None:
    seen = {found.split(".")[2] for name, found in between_rooms()
            if room_of(name) == "render" and found.startswith("cogtools.conversion.")}  # fmt: skip
    assert seen <= SHOWN


def test_nothing_imports_in_a_circle() -> None:
    modules = {name: imports - {name, "cogtools"} for name, imports in IMPORTS.items()}
    try:
        tuple(TopologicalSorter(modules).static_order())
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' <- '.join(error.args[1])}")
