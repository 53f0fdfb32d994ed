"""A pipeline on this machine that gives what a checkpoint lacks: its text encoder, VAE and tokenizer, as copies."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from cogtools.checkpoint.files import FileRange, SourceFile
from cogtools.checkpoint.names import PIPELINE_INDEX
from cogtools.checkpoint.opening import open_checkpoint
from cogtools.checkpoint.places import is_file, is_folder, list_folder, open_file
from cogtools.checkpoint.shards import read_index
from cogtools.conversion import manifest
from cogtools.conversion.carry_out import PlannedFile
from cogtools.conversion.model_plan import with_manifest
from cogtools.conversion.part_config import read_config
from cogtools.errors import CheckpointError, ExportError, Problem
from cogtools.layouts import vae
from cogtools.layouts.pipeline import CONFIG, PARTS, TOKENIZER_FILES

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

    from cogtools.layouts.family import Model

GIVEN = ("vae", "text_encoder", "tokenizer")
"""The parts that it gives."""

_WRONG = "the pipeline given with --base does not go with this model"


class BasePipeline:
    """A pipeline, its files held open once they are asked for. Use it in a `with` statement.

    Args:
        folder: where it is.

    Raises:
        CheckpointError: if it is not a pipeline's folder.
    """

    def __init__(self, folder: Path) -> None:
        if not is_folder(folder) or not is_file(folder / PIPELINE_INDEX):
            raise CheckpointError(
                "this is not a pipeline of diffusers",
                file=folder,
                found="a folder without model_index.json" if is_folder(folder) else None,
                expected=f"a folder with {PIPELINE_INDEX}, for --base",
            )
        self.folder = folder
        self.files: list[SourceFile] = []
        read_index(folder / PIPELINE_INDEX)
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def part(self, name: str, model: Model, text_width: int) -> tuple[PlannedFile, ...] | None:
        """Copies of the files of a part's folder, links followed; None if it does not have that part.

        Args:
            name: the part.
            model: the model that it is for.
            text_width: the width of the text encoder's hidden states that this model takes.

        Raises:
            ExportError: if the part is one of another model, or is not whole.
            CheckpointError: if it cannot be read.
        """
        folder = self.folder / name
        if not is_folder(folder):
            return None
        if name == "tokenizer":
            self._refuse_incomplete(folder)
        else:
            open_checkpoint(folder).close()  # the weights are there, all shards of them
            self._refuse_other_model(folder, model, text_width)
        return self.copies(name)

    @property
    def index(self) -> dict[str, object]:
        """What its model_index.json says.

        Raises:
            CheckpointError: if it cannot be read.
        """
        return read_config(self.folder / PIPELINE_INDEX)

    def copies(self, name: str) -> tuple[PlannedFile, ...]:
        """Copies of the files of a part's folder, links followed.

        Raises:
            CheckpointError: if one cannot be read.
        """
        folder = self.folder / name
        found = []
        for entry in sorted(list_folder(folder), key=lambda entry: entry.path.name):
            if entry.is_file and entry.path.name != manifest.NAME and not entry.path.name.startswith("."):
                file = self._opened.enter_context(open_file(entry.path))
                self.files.append(file)
                found.append(PlannedFile(entry.path.name, copied=FileRange(file, 0, file.size_bytes)))
        return with_manifest(found)

    def _refuse_incomplete(self, folder: Path) -> None:
        if not any(is_file(folder / name) for name in TOKENIZER_FILES):
            raise ExportError(
                "the tokenizer of the pipeline given with --base is not complete",
                file=folder,
                found=", ".join(sorted(entry.path.name for entry in list_folder(folder))) or "an empty folder",
                expected=" or ".join(TOKENIZER_FILES),
                hint="download the pipeline again: without its vocabulary every prompt means the same",
            )

    def _refuse_other_model(self, folder: Path, model: Model, text_width: int) -> None:
        """Refuse a VAE that is configured for another model, and a text encoder of another size."""
        config = read_config(folder / CONFIG)
        part = PARTS[folder.name]
        classes = [config.get("_class_name"), *_listed(config.get("architectures"))]
        if part.class_name not in classes:
            found = next((str(name) for name in classes if name), "no class")
            raise ExportError(_WRONG, file=folder / CONFIG, found=found, expected=part.class_name)
        expected: dict[str, object] = {"d_model": text_width}
        if part.class_name == vae.CLASS_NAME:
            own = vae.Structure((), 0).config(model)
            expected = {name: own.get(name, False) for name in ("scaling_factor", "invert_scale_latents")}
        wrong = [
            Problem("value", name, str(config.get(name, False)), str(value))
            for name, value in expected.items()
            if config.get(name, False) != value
        ]
        if wrong:
            raise ExportError(
                _WRONG,
                file=folder / CONFIG,
                problems=wrong,
                hint=f"give the pipeline of {model.name}",
            )


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []
