"""The process that loads a model with the libraries that people load it with. What they warn of is a problem here."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, cast

from cogtools.layouts.pipeline import PARTS
from cogtools.layouts.text_encoder import TIED_EMBEDDING
from cogtools.verification.overheard import everything_said, one_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_PROMPT = "a cat sits on the mat"

_FOUND = {"missing_keys": "missing", "unexpected_keys": "unexpected", "mismatched_keys": "shape"}
"""What the libraries say of keys that did not fit, and the kind of problem that it is."""


def answer(question: dict[str, object]) -> dict[str, object]:
    """Answer the question of `model_load.load_model`: load the folders of parts that it names, or the files."""
    folders = cast("dict[str, str]", question["folders"])
    if not folders:
        return _of_files(str(question["kind"]), cast("list[str]", question["files"]))
    return _of_folders(folders, cast("dict[str, str]", question["dtypes"]), _import_libraries())


def _import_libraries() -> dict[str, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import transformers
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        for part in PARTS.values():  # both import their classes when they are asked for
            getattr({"diffusers": diffusers, "transformers": transformers}[part.library], part.class_name)
    return {"diffusers": diffusers.__version__, "transformers": transformers.__version__}


def _of_folders(folders: Mapping[str, str], dtypes: Mapping[str, str], versions: dict[str, str]) -> dict[str, object]:
    problems: list[tuple[str, str, str]] = []
    loaded = []
    for name, folder in folders.items():
        with everything_said() as said:
            try:
                problems += [(kind, name, text) for kind, text in _load_part(name, folder, dtypes.get(name))]
                loaded.append(name)
            except Exception as error:  # noqa: BLE001 - whatever they raise is what a user of the files would see
                problems.append(("error", name, one_line(f"{type(error).__name__}: {error}")))
        problems += [("library_warning", f"{name}, {library}", one_line(text)) for library, text in said]
    names = " and ".join(f"{name} {version}" for name, version in versions.items())
    seen = f"{names}: {', '.join(loaded) or 'nothing'} loaded" + ("" if problems else ", without a warning")
    return {"problems": problems, "seen": seen, "libraries": versions}


def _load_part(name: str, folder: str, dtype: str | None) -> Iterator[tuple[str, str]]:
    """Load a part; what is wrong with it, though nothing was raised: a kind of problem, and what it is."""
    import diffusers
    import torch
    import transformers

    part = PARTS[name]
    made_by = getattr({"diffusers": diffusers, "transformers": transformers}[part.library], part.class_name)
    if name == "tokenizer":
        yield from _of_tokenizer(made_by.from_pretrained(folder))
    elif part.stem is None:
        made_by.from_pretrained(folder)
    else:
        options: dict[str, Any] = {} if dtype is None else {"torch_dtype": getattr(torch, dtype)}
        _, info = made_by.from_pretrained(folder, output_loading_info=True, **options)
        for what, kind in _FOUND.items():
            keys = sorted(map(str, info.get(what, ())))
            yield from ((kind, key) for key in keys if key != TIED_EMBEDDING)  # transformers ties it


def _of_tokenizer(tokenizer: Any) -> Iterator[tuple[str, str]]:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(_PROMPT).input_ids)
    special = tokenizer.all_special_tokens
    if not any(char.isalpha() for token in tokens if token not in special for char in token):
        yield "value", f"every word of {_PROMPT!r} is unknown to a vocabulary of {len(tokenizer)} tokens"


def _of_files(kind: str, files: list[str]) -> dict[str, object]:
    """Files alone: opened as their library opens them, without running anything that they say."""
    problems = []
    for file in files:
        try:
            if file.endswith(".safetensors"):
                from safetensors import safe_open

                with safe_open(file, "np"):
                    pass
            else:
                import torch

                torch.load(file, weights_only=True, mmap=True, map_location="cpu")
        except Exception as error:  # noqa: BLE001 - whatever they raise is what a user of the file would see
            problems.append(("error", file.rpartition("/")[2], one_line(f"{type(error).__name__}: {error}")))
    how = "its library opens it: for diffusers it needs a config.json beside it"
    if kind == "sat":
        how = "torch.load(weights_only=True) opens it; SAT itself is not run"
    return {"problems": problems, "seen": "its library does not open it" if problems else how, "libraries": {}}
