"""Many keys in few lines: equal layers, and equal parts of a layer, folded into one.

What is still too much for a screen stays closed: parts with a LoRA are opened first, then upper levels before lower
ones and large parts before small ones, as long as there is room.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from cogtools.formatting import counted, fold_numbers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cogtools.inspection.report import TensorReport

MAX_DEPTH = 32
"""How many dots of a key are split at; the rest of a deeper key stays together."""


@dataclass(frozen=True, slots=True)
class TreeLine:
    """One line of a tree.

    Attributes:
        depth: how far it is indented.
        label: the part of the keys that it stands for: "layers.0-29".
        times: how many equal parts it stands for.
        detail: dtype and shape, or how many tensors are below.
        size_bytes: of all of them.
        has_lora: whether there is a LoRA in it.
        below: the lines below it.
    """

    depth: int
    label: str
    times: int
    detail: str
    size_bytes: int
    has_lora: bool = False
    below: tuple[TreeLine, ...] = ()


@dataclass(slots=True)
class _Node:
    """The keys that have a prefix in common."""

    children: dict[str, _Node] = field(default_factory=dict)
    tensor: TensorReport | None = None
    tensors: int = 0
    size_bytes: int = 0
    has_lora: bool = False


def open_lines(roots: Iterable[TreeLine], room: int | None = None) -> Iterator[tuple[TreeLine, bool]]:
    """The lines of a tree that there is room for, each with whether it is open: true where nothing is below it.

    Args:
        roots: the lines at its top, which are always shown.
        room: how many lines the tree may have by opening its parts; None opens all.
    """
    roots = list(roots)
    opened = None if room is None else _choose(roots, room)

    def walk(lines: Iterable[TreeLine]) -> Iterator[tuple[TreeLine, bool]]:
        for line in lines:
            is_open = opened is None or not line.below or id(line) in opened
            yield line, is_open
            if is_open:
                yield from walk(line.below)

    return walk(roots)


def _choose(roots: list[TreeLine], room: int) -> set[int]:
    """The lines that are opened, by their ids."""
    opened: set[int] = set()
    count = len(roots)
    waiting: list[tuple[bool, int, int, int, TreeLine]] = []

    def wait(lines: Iterable[TreeLine]) -> None:
        for line in lines:
            if line.below:
                heappush(waiting, (not line.has_lora, line.depth, -line.size_bytes, id(line), line))

    wait(roots)
    while waiting:
        *_, line = heappop(waiting)
        if count + len(line.below) <= room:
            count += len(line.below)
            opened.add(id(line))
            wait(line.below)
    return opened


def fold(tensors: Iterable[TensorReport]) -> list[TreeLine]:
    """The tree of these tensors' keys, as the lines at its top."""
    state_dict: list[TensorReport] = []
    beside: list[TensorReport] = []
    for tensor in tensors:
        (state_dict if tensor.in_state_dict else beside).append(tensor)
    keys = {tensor.key for tensor in state_dict}
    again: dict[str, list[TensorReport]] = defaultdict(list)
    others = []
    for tensor in beside:
        key = tensor.key.removeprefix(f"{tensor.container}.")
        if tensor.container and key in keys:
            again[tensor.container].append(tensor)
        else:
            others.append(tensor)
    root = _grow([*state_dict, *others])
    lines = list(_below(root, _signatures(root), 0, 1))
    for place, copies in again.items():
        size_bytes = sum(tensor.size_bytes for tensor in copies)
        lines.append(TreeLine(0, place, 1, f"{counted(len(copies), 'tensor')}, keys as above", size_bytes))
    return lines


def _grow(tensors: Iterable[TensorReport]) -> _Node:
    root = _Node()
    for tensor in tensors:
        path = [root]
        for part in tensor.key.split(".", MAX_DEPTH):
            path.append(path[-1].children.setdefault(part, _Node()))
        path[-1].tensor = tensor
        for node in path:
            node.tensors += 1
            node.size_bytes += tensor.size_bytes
            node.has_lora |= tensor.section == "lora"
    return root


def _signatures(root: _Node) -> dict[int, int]:
    """A number for each node, by its id: equal numbers mean equal keys, dtypes and shapes below it."""
    numbers: dict[object, int] = {}
    signatures: dict[int, int] = {}

    def sign(node: _Node) -> int:
        own = (node.tensor.dtype, node.tensor.shape) if node.tensor is not None else None
        content = (own, tuple((name, sign(child)) for name, child in node.children.items()))
        signatures[id(node)] = number = numbers.setdefault(content, len(numbers))
        return number

    sign(root)
    return signatures


def _below(node: _Node, signatures: dict[int, int], depth: int, times: int) -> Iterator[TreeLine]:
    for names, child in _groups(node, signatures):
        yield _branch(_joined(names), _counted(names, child), child, signatures, depth, times * len(names))


def _groups(node: _Node, signatures: dict[int, int]) -> list[tuple[list[str], _Node]]:
    """The children, those that are equal but for their names together. Numbers and words are kept apart."""
    groups: dict[tuple[int, bool], list[str]] = defaultdict(list)
    for name, child in node.children.items():
        groups[signatures[id(child)], _is_number(name)].append(name)
    return [(names, node.children[names[0]]) for names in groups.values()]


def _branch(label: str, folded: int, node: _Node, signatures: dict[int, int], depth: int, times: int) -> TreeLine:
    """The line of a node that stands for `times` equal ones, `folded` of them in its own label."""
    while node.tensor is None:
        groups = _groups(node, signatures)
        if len(groups) > 1:
            break
        names, node = groups[0]
        label = f"{label}.{_joined(names)}"
        folded *= _counted(names, node)
        times *= len(names)
    size_bytes = node.size_bytes * times
    if node.tensor is not None and not node.children:
        return TreeLine(depth, label, folded, f"{node.tensor.dtype} {node.tensor.shape}", size_bytes)
    leaves = [child.tensor for child in node.children.values() if child.tensor is not None and not child.children]
    if node.tensor is None and len(leaves) == len(node.children) and len({leaf.dtype for leaf in leaves}) == 1:
        label = f"{label}.{_joined(list(node.children))}"
        shapes = ", ".join(str(leaf.shape) for leaf in leaves)
        return TreeLine(depth, label, folded, f"{leaves[0].dtype} {shapes}", size_bytes)
    below = tuple(_below(node, signatures, depth + 1, times))
    return TreeLine(depth, label, folded, counted(node.tensors * times, "tensor"), size_bytes, node.has_lora, below)


def _counted(names: list[str], node: _Node) -> int:
    """How many parts a label counts: names of single tensors such as weight and bias are not counted."""
    return 1 if node.tensor is not None and not _is_number(names[0]) else len(names)


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal() and len(name) < 10 and (name == "0" or not name.startswith("0"))


def _joined(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    if all(map(_is_number, names)):
        return fold_numbers(sorted(map(int, names)))
    return "{" + ", ".join(names) + "}"
