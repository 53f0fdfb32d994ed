"""Really loading a model with diffusers and transformers: each part with `from_pretrained`, then the pipeline of them.

What the libraries warn of is what is found. The libraries are imported here and nowhere else; all of it happens in
`load_model`.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cogtools.errors import OptionError, Problem
from cogtools.layouts.pipeline import PARTS
from cogtools.verification.report import Check

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cogtools.verification.model_written import WrittenModel

_LIBRARIES = ("diffusers", "transformers")
_PROMPT = "a cat sits on the mat"


class LoadedModel(NamedTuple):
    """What came of loading a model.

    Attributes:
        check: the check.
        libraries: the versions of the libraries.
    """

    check: Check
    libraries: dict[str, str]


def load_model(written: WrittenModel) -> LoadedModel:
    """Load every part of a model as its users do, in the dtype that it has.

    Takes the memory of one part after the other; a pipeline is then put together without weights.

    Raises:
        OptionError: if a library is not installed.
    """
    if written.kind in ("file", "sat"):
        return LoadedModel(_load_file(written), {})
    versions = _versions()
    folders = {name: folder for name, folder in written.folders.items() if name in PARTS}
    problems: list[Problem] = []
    loaded: list[str] = []
    for name, folder in folders.items():
        try:
            with _everything_said() as said:
                problems += [
                    Problem(kind, name, text)
                    for kind, text in _load_part(name, Path(str(folder)), _dtype(written, name))
                ]
        except Exception as error:  # noqa: BLE001 - whatever a library raises is what is found
            problems.append(Problem("error", name, _one_line(f"{type(error).__name__}: {error}")))
        else:
            loaded.append(name)
        problems += [Problem("library_warning", f"{name}, {library}", _one_line(text)) for library, text in said]
    what = " and ".join(f"{name} {version}" for name, version in versions.items())
    seen = f"{what}: {', '.join(loaded) or 'nothing'} loaded"
    check = (
        Check("load", "fail", seen, tuple(problems))
        if problems
        else Check("load", "pass", f"{seen}, without a warning")
    )
    return LoadedModel(check, versions)


def _load_part(name: str, folder: Path, dtype: str | None) -> Iterator[tuple[Any, str]]:
    """Load a part; what is wrong with it, though nothing was raised: a kind of problem, and what it is."""
    import diffusers
    import torch
    import transformers

    part = PARTS[name]
    owner = {"diffusers": diffusers, "transformers": transformers}[part.library]
    if part.stem is None:
        made = getattr(owner, part.class_name).from_pretrained(folder)
        if name == "tokenizer":
            ids = made(_PROMPT).input_ids
            known = [number for number in ids if number not in (made.unk_token_id, made.eos_token_id)]
            if not known:
                yield "value", f"every word of {_PROMPT!r} is unknown to a vocabulary of {len(made)} tokens"
        return
    options: dict[str, Any] = {"output_loading_info": True}
    options |= {"torch_dtype": getattr(torch, dtype)} if dtype is not None else {}
    made, info = getattr(owner, part.class_name).from_pretrained(folder, **options)
    for what, kind in (("missing_keys", "missing"), ("unexpected_keys", "unexpected"), ("mismatched_keys", "shape")):
        for key in sorted(map(str, info.get(what, ()))):
            if key not in ("encoder.embed_tokens.weight",):  # transformers ties it
                yield kind, key
    del made


def _dtype(written: WrittenModel, name: str) -> str | None:
    """The dtype of a part's tensors, where they have one."""
    part = written.parts[name].part if name in written.parts else None
    found = set() if part is None else {entry.dtype.name for entry in part.tensors.values()}
    return found.pop() if len(found) == 1 else None


def _load_file(written: WrittenModel) -> Check:
    """A file alone: opened as its library opens it, without running anything that it says."""
    paths = sorted({part.part.checkpoint.path for part in written.parts.values() if part.part is not None})
    try:
        for path in paths:
            if path.suffix == ".safetensors":
                from safetensors import safe_open

                with safe_open(path, "np"):
                    pass
            else:
                import torch

                torch.load(str(path), weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # noqa: BLE001 - whatever a library raises is what is found
        text = _one_line(f"{type(error).__name__}: {error}")
        return Check("load", "fail", "its library does not open it", (Problem("error", paths[0].name, text),))
    if written.kind == "sat":
        return Check("load", "pass", "torch.load(weights_only=True) opens it; SAT itself is not run")
    return Check("load", "pass", "its library opens it: for diffusers it needs a config.json beside it")


def _versions() -> dict[str, str]:
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise OptionError(
            f"--load needs diffusers and transformers: {error}", hint="pip install diffusers transformers"
        ) from error
    return {"diffusers": diffusers.__version__, "transformers": transformers.__version__}


@contextlib.contextmanager
def _everything_said() -> Iterator[list[tuple[str, str]]]:
    """Collect (library, text) of what the libraries warn of, by their loggers and by `warnings`; print nothing."""
    from transformers.utils import logging as bars

    said: list[tuple[str, str]] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append((record.name.split(".")[0], record.getMessage()))

    listener = Listener(logging.WARNING)
    loggers = [logging.getLogger(name) for name in _LIBRARIES]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    has_bars = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()  # type: ignore[no-untyped-call]
    for logger in loggers:
        logger.handlers[:], logger.propagate = [listener], False
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield said
    finally:
        said += [(Path(warning.filename).name, str(warning.message)) for warning in warned]
        for logger, handlers, level, propagate in before:
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)
        if has_bars:
            bars.enable_progress_bar()  # type: ignore[no-untyped-call]


def _one_line(text: str, length: int = 300) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
