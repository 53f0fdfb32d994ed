"""Outputs in an object store: written on this machine, put there when they are complete.

A store puts an object in one step, so that it appears whole or not at all. Of several, what others are found by comes
last: configurations, then indices, then a pipeline's model_index.json; so that a part is never taken for a whole.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cogtools.checkpoint.files import is_file, is_folder
from cogtools.checkpoint.names import PIPELINE_INDEX, SHARD_INDEX_SUFFIXES
from cogtools.conversion.output import GrowingFile
from cogtools.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

    from cogtools.checkpoint.files import SourceFile
    from cogtools.checkpoint.paths import RemotePath


class _Member(NamedTuple):
    """A file that is written here, and where it will be."""

    file: GrowingFile
    here: Path
    there: RemotePath


class Upload:
    """Files that appear in a store when all of them are complete, or never.

    Use it as an `AtomicFolder`: in a `with` statement, create the files, `publish` them.

    Attributes:
        target: where the output will be.
        overwrite: whether what is there already may be replaced.
        is_folder: whether it is a folder of files, or one file.
    """

    def __init__(self, target: RemotePath, *, overwrite: bool = False, is_folder: bool) -> None:
        self.target = target
        self.overwrite = overwrite
        self.is_folder = is_folder
        self._members: list[_Member] = []
        self._here: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        self.refuse_existing()
        try:
            self._here = tempfile.TemporaryDirectory(prefix="cogtools-")
        except OSError as error:
            raise OutputError(
                f"the output cannot be written into the folder for temporary files: {error.strerror}",
                file=self.target,
                hint="set TMPDIR to a folder with enough space",
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._members:
            member.file.close()
        if self._here is not None:
            self._here.cleanup()
            self._here = None

    def refuse_existing(self) -> None:
        """Raise an `OutputError` if the target is there and may not be replaced, or nothing can be put there."""
        self.target.store.refuse_put(self.target)
        if not self.overwrite and (is_file(self.target) or (self.is_folder and is_folder(self.target))):
            raise _exists(self.target)

    def refuse_source(self, sources: Iterable[SourceFile]) -> None:
        """Raise an `OutputError` if one of the files that are read would be replaced."""
        for source in sources:
            if source.path == self.target or (self.is_folder and source.path.parent == self.target):
                what = "the output would replace the checkpoint that it is made of"
                raise OutputError(what, file=self.target, hint="choose another place")

    def create(self, name: str) -> GrowingFile:
        """A new file of the output; one alone has the name of the target."""
        if self._here is None:
            raise ValueError("files are created inside the with statement")
        there = self.target / name if self.is_folder else self.target
        file, here = GrowingFile(there), Path(self._here.name, str(len(self._members)))
        file.begin(here)
        self._members.append(_Member(file, here, there))
        return file

    def publish(self) -> None:
        """Put the files where they belong.

        Raises:
            OutputError: if that fails, or a file has appeared there meanwhile that may not be replaced. What was put
                there of a new output is removed again.
        """
        put: list[RemotePath] = []
        try:
            for member in sorted(self._members, key=lambda member: _order(member.there.name)):
                self.target.store.put(member.here, member.there, overwrite=self.overwrite)
                put.append(member.there)
        except FileExistsError as error:
            self._remove(put)
            raise _exists(self.target) from error
        except BaseException:
            self._remove(put)
            raise

    def _remove(self, put: Iterable[RemotePath]) -> None:
        if not self.overwrite:
            for path in put:
                with contextlib.suppress(OutputError):
                    path.store.remove(path)


def _order(name: str) -> int:
    """Which files are put first."""
    if name == PIPELINE_INDEX:
        return 3
    return 2 if name.endswith(SHARD_INDEX_SUFFIXES) else 1 if name.endswith(".json") else 0


def _exists(target: RemotePath) -> OutputError:
    return OutputError(
        "the output exists already", file=target, hint="give another folder, or --overwrite to replace it"
    )
