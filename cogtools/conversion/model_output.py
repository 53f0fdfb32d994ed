"""Where a model is written: the folder of each part, the index of a pipeline, and what may be replaced there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cogtools.checkpoint.places import is_file
from cogtools.conversion.carry_out import Written, write_outputs
from cogtools.conversion.manifest import is_ours
from cogtools.conversion.output import AtomicFile, AtomicFolder, refuse_unwritable
from cogtools.conversion.part_config import read_config
from cogtools.errors import OutputError
from cogtools.layouts.pipeline import INDEX

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from cogtools.checkpoint.files import SourceFile
    from cogtools.checkpoint.paths import AnyPath
    from cogtools.conversion.carry_out import Output, PlannedFile


class ModelOutput:
    """The folders and files of a model that is to be written. Nothing is written before `write`.

    Each folder appears whole or not at all. Those that are replaced are replaced as a whole, so that no old index and
    no old shard is left beside new weights; whatever else lies beside them stays. In an object store each file does.

    Args:
        folders: the files of each folder, by its path.
        index: the index of the pipeline, and its path; None if there is none.
        overwrite: whether folders that cogtools wrote may be replaced.
    """

    def __init__(
        self,
        folders: Mapping[AnyPath, Sequence[PlannedFile]],
        index: tuple[AnyPath, PlannedFile] | None,
        *,
        overwrite: bool,
    ) -> None:
        self._outputs: list[tuple[Output, Sequence[PlannedFile]]] = [
            (_folder_at(folder, files, overwrite=overwrite), files) for folder, files in folders.items()
        ]
        if index is not None:
            self._outputs.append((_file_at(index[0], overwrite=overwrite), [index[1]]))

    @property
    def size_bytes(self) -> int:
        """How many bytes all files have together."""
        return sum(file.size_bytes for _, files in self._outputs for file in files)

    def refuse(self, sources: Sequence[SourceFile]) -> None:
        """Raise an `OutputError` if it can be seen that it cannot be written.

        Args:
            sources: the files that are read: none may be replaced.
        """
        for output, _ in self._outputs:
            output.refuse_existing()
            output.refuse_source(sources)
        for output, _ in self._outputs[:1]:
            refuse_unwritable(output.target, self.size_bytes)

    def write(self, sources: Sequence[SourceFile], progress: Callable[[int, int], None] | None) -> Written:
        """Write all of it; a part takes its place when all parts are complete.

        Raises:
            CogtoolsError: if it cannot be done. All is then as it was before.
        """
        return write_outputs(self._outputs, sources, progress)


def _folder_at(folder: AnyPath, files: Sequence[PlannedFile], *, overwrite: bool) -> Output:
    if isinstance(folder, Path):
        return AtomicFolder(folder, overwrite=overwrite, is_ours=is_ours)
    from cogtools.conversion.upload import Upload

    return Upload(folder, overwrite=overwrite, names=[file.path for file in files])


def _file_at(path: AnyPath, *, overwrite: bool) -> Output:
    if isinstance(path, Path):
        return AtomicFile(path, overwrite=overwrite)
    from cogtools.conversion.upload import Upload

    return Upload(path, overwrite=overwrite)


def refuse_other_pipeline(out: AnyPath, class_name: str) -> None:
    """Refuse to write parts into the folder of a pipeline of another class.

    Raises:
        OutputError: if it is one.
    """
    index = out / INDEX
    if not is_file(index):
        return
    found = read_config(index).get("_class_name")
    if found != class_name:
        raise OutputError(
            "the output lies in the folder of another pipeline",
            file=index,
            found=str(found)[:100],
            expected=class_name,
            hint="choose another place",
        )
