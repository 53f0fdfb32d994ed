"""Fuzzing of what a user runs: `inspect` and `verify`, as the command line has them, on a terminal and into a pipe.

Whatever the files say, a command ends with one of its exit codes and one error at most, its JSON is JSON as the
standard has it, and nothing but text goes into a pipe. The first byte of an input chooses the command.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tests.support import hostile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

INSPECT = (
    ("inspect",),
    ("inspect", "on a terminal"),
    ("inspect", "--tree"),
    ("inspect", "--tree", "on a terminal"),
    ("inspect", "--stats", "on a terminal"),
    ("inspect", "--stats", "--offsets", "--json"),
    ("inspect", "--json"),
)
VERIFY = (
    ("verify",),
    ("verify", "on a terminal"),
    ("verify", "--json"),
    ("verify", "--json", "--against"),
    ("verify", "--against"),
)
COMMANDS = (*INSPECT, *VERIFY)


class Output(io.StringIO):
    """Standard output: a terminal of 80 columns, or a pipe."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def run(command: tuple[str, ...], path: Path, checkpoint: Path | None = None) -> str:
    """Run a command on a file, look at what it says, and return that. `checkpoint` is for `--against`."""
    from cogtools import cli

    words = [command[0], str(path), *(word for word in command[1:] if word.startswith("--"))]
    if "--against" in words:
        words.insert(words.index("--against") + 1, str(checkpoint))
    output, errors = Output(terminal="on a terminal" in command), Output(terminal=False)
    os.environ["COLUMNS"] = "80"
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = cli.run(words)
    assert code in (cli.DONE, cli.WRONG, cli.COULD_NOT), code
    said, talk = output.getvalue(), errors.getvalue()
    if "--json" in words:
        json.loads(said.encode(), parse_constant=_no_constant)
    elif not output.terminal:
        assert all(line.isprintable() for line in said.split("\n")), said
    assert all(line.isprintable() for line in talk.split("\n")), talk
    assert said or talk
    return said


def _no_constant(name: str) -> NoReturn:
    raise AssertionError(f"{name} is no JSON")


def inspect_file(content: bytes, folder: Path) -> None:
    """`inspect` of any file; one that begins as a pickle is packed as `torch.save` does."""
    choice, content = (content[0], content[1:]) if content else (0, b"")
    path = folder / "checkpoint.pt"
    path.write_bytes(hostile.torch_zip(content) if content.startswith(b"\x80") else content)
    run(INSPECT[choice % len(INSPECT)], path)


def verify_file(content: bytes, folder: Path) -> None:
    """`verify` of any safetensors file."""
    choice, content = (content[0], content[1:]) if content else (0, b"")
    path = folder / "pytorch_lora_weights.safetensors"
    path.write_bytes(content)
    run(VERIFY[choice % len(VERIFY)], path, _checkpoint(folder))


def stated(content: bytes, folder: Path) -> None:
    """A good LoRA one of whose parts of JSON, or whose training configuration, is not as it was.

    The second byte chooses the part, and four bytes each of the rest make a change in it.
    """
    choice, part, edits = (content[0], content[1], content[2:]) if len(content) > 1 else (0, 0, b"")
    command = COMMANDS[choice % len(COMMANDS)]
    name = list(PARTS)[part % len(PARTS)]
    place = folder / name
    place.mkdir(exist_ok=True)
    path, checkpoint = PARTS[name](place, edits), _checkpoint(place)
    run(command, checkpoint if (name, command[0]) == ("training-config", "inspect") else path, checkpoint)


def _checkpoint(folder: Path) -> Path:
    """A good checkpoint, in a folder below."""
    path = folder / "good" / "checkpoint.pt"
    if not path.exists():
        from tests.support.fuzz_readers import lora_pickle

        path.parent.mkdir(exist_ok=True)
        path.write_bytes(hostile.torch_zip(lora_pickle()))
    return path


@cache
def _exported() -> tuple[str, bytes]:
    """The header and the data of a LoRA file that was made of the good checkpoint."""
    from cogtools.export.export import export_lora

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "out.safetensors")
        export_lora(_checkpoint(Path(scratch)), out)
        content = out.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return content[8 : 8 + size].decode(), content[8 + size :]


def good_lora() -> bytes:
    """That file."""
    header, data = _exported()
    return hostile.safetensors(header.encode(), data)


def _header(folder: Path, edits: bytes) -> Path:
    header, data = _exported()
    return _written(folder, edited(json.loads(header), edits), data)


def _metadata(folder: Path, edits: bytes) -> Path:
    return _entry(folder, edits, "lora_adapter_metadata")


def _record(folder: Path, edits: bytes) -> Path:
    return _entry(folder, edits, "cogtools")


def _entry(folder: Path, edits: bytes, name: str) -> Path:
    text, data = _exported()
    header = json.loads(text)
    metadata = header["__metadata__"]
    metadata[name] = dumped(edited(json.loads(metadata[name]), edits))
    return _written(folder, header, data)


def _adapter_config(folder: Path, edits: bytes) -> Path:
    text, data = _exported()
    header = json.loads(text)
    stated_there = json.loads(header.pop("__metadata__")["lora_adapter_metadata"])
    config = {key.removeprefix("transformer."): value for key, value in stated_there.items()}
    tensors = {f"base_model.model.{key.removeprefix('transformer.')}": value for key, value in header.items()}
    (folder / "adapter_config.json").write_text(dumped(edited(config, edits)))
    return _written(folder, tensors, data, "adapter_model.safetensors")


def _training_config(folder: Path, edits: bytes) -> Path:
    config: object = {"r": 2, "lora_alpha": 1, "layer_range": [0], "p": 0.5}
    for name in ("params", "lora_config", "modules", "params", "network_config", "model"):
        config = {name: config}
    _checkpoint(folder).with_name("training_config.yaml").write_text(dumped(edited(config, edits)))  # is YAML too
    header, data = _exported()
    return _written(folder, json.loads(header), data)


def _written(folder: Path, header: object, data: bytes, name: str = "pytorch_lora_weights.safetensors") -> Path:
    path = folder / name
    path.write_bytes(hostile.safetensors(dumped(header).encode(), data))
    return path


PARTS: dict[str, Callable[[Path, bytes], Path]] = {
    "header": _header,
    "metadata": _metadata,
    "record": _record,
    "adapter-config": _adapter_config,
    "training-config": _training_config,
}


# Changes in JSON

VALUES = (
    *("null", "true", "false", "0", "1", "2", "4", "-1", "7", "64", str(2**31), str(2**62), str(2**63), str(2**64)),
    *("1" + "0" * 400, "-1" + "0" * 400, "0.5", "1.0", "1e-320", "1e308", "1e999", "-1e999", "NaN"),
    *('""', '"1"', '"pwned"', '"F32"', '"F16"', '"BF16"', '"fold"', '"none"', '"keep"', '"--alpha"', '"float16"'),
    *('"cogvideox-2b"', r'"\u001b[31m"', r'"a\nb"', r'"\ud800"', r'"\u0000"', r'"\u202e"', '"(a+)+$"', '"*"'),
    *(f'"{"a" * 2000}"', f'"{"." * 200}"', f'"{"module." * 50}"', '"{0}%s"', '"to_q"', '"deep 500"', '"deep 900"'),
    *('"deep 940"', '"deep 960"', '"deep 980"', '"deep 10000"'),
    *("[]", "{}", "[0]", "[1, 2]", "[2, 4]", "[4, 2]", "[[]]", '{"a": {}}', "[null]", '["to_q"]', '{"": 1}'),
    *("[0, 32]", "[32, 64]", '{"to_q": 4}', '{"(a+)+": 1}', '{"^a$": 0.5}', f"[{2**62}, {2**62}, {2**62}]"),
    *(f"[0, {2**62}]", f"[{', '.join(['1'] * 40)}]", f"[{', '.join([str(2**62)] * 40)}]"),
)
"""What is put in the place of something else. What is deep cannot be made by json.dumps: `dumped` puts it in."""


def _places(document: object) -> Iterator[tuple[Any, Any]]:
    """Every place in a document: what holds it, and under which key or index."""
    pending = [document]
    while pending:
        holder = pending.pop()
        if isinstance(holder, (dict, list)):
            for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
                yield holder, key
                pending.append(holder[key])


def edited(document: object, edits: bytes) -> object:
    """A document with up to ten changes: four bytes say where, whether to replace, remove, add or rename, by what."""
    root = [document]
    for at in range(0, min(len(edits) - 3, 40), 4):
        places = list(_places(root))
        holder, key = places[int.from_bytes(edits[at : at + 2], "little") % len(places)]
        value = json.loads(VALUES[edits[at + 3] % len(VALUES)])
        kind = edits[at + 2] % 4
        if kind == 0:
            holder[key] = value
        elif kind == 1 and holder is not root:
            del holder[key]
        elif kind == 2 and isinstance(holder, dict):
            holder[f"{key}{edits[at + 3]}"] = value
        elif kind == 3 and isinstance(holder, dict) and isinstance(value, str):
            holder[value] = holder.pop(key)
    return root[0]


def dumped(document: object) -> str:
    """A document as JSON, some of it deeper than json.dumps goes."""
    return re.sub('"deep ([0-9]+)"', lambda found: "[" * int(found[1]) + "]" * int(found[1]), json.dumps(document))
