"""Outputs in an object store: written on this machine, put there when they are complete.

A store puts an object in one step, so that it appears whole or not at all. Of several, what others are found by comes
last: configurations, then indices, then a pipeline's model_index.json; so that a part is never taken for a whole. What
was cut off in between is replaced by the next run.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cogtools.checkpoint.names import PIPELINE_INDEX, SHARD_INDEX_SUFFIXES
from cogtools.checkpoint.places import is_file, is_folder, list_folder, store_of
from cogtools.conversion import manifest
from cogtools.conversion.output import GrowingFile, output_exists, replaces_source
from cogtools.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from typing import Self

    from cogtools.checkpoint.files import SourceFile
    from cogtools.checkpoint.paths import RemotePath


_NAMED = 3


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
        names: of the files, where the target is a folder; () where it is one file.
    """

    def __init__(self, target: RemotePath, *, overwrite: bool = False, names: Collection[str] = ()) -> None:
        self.target = target
        self.overwrite = overwrite
        self.names = names
        self._is_cut_off = False
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
        """Raise an `OutputError` if the target is there and may not be replaced, or nothing can be put there.

        A folder that holds anything else is never written into: an old index beside new weights would be read.
        """
        store_of(self.target).refuse_put(self.target)
        is_folder_there = bool(self.names) and is_folder(self.target)
        self._is_cut_off = is_folder_there and manifest.is_cut_off(self.target, self.names)
        if not self._may_replace and (is_file(self.target) or is_folder_there):
            raise output_exists(self.target)
        own = {name.partition("/")[0] for name in self.names}
        entries = list_folder(self.target) if is_folder_there else []
        names = [entry.path.name for entry in entries if entry.path.name not in own]
        if names:
            raise OutputError(
                "the folder holds other files than this output has, which would be taken for a part of it",
                file=self.target,
                found=", ".join(names[:_NAMED]) + (" …" if len(names) > _NAMED else ""),
                hint="remove them, or give another folder",
            )

    @property
    def _may_replace(self) -> bool:
        """Whether what is there may be replaced: also where it is what another run had not put there in full."""
        return self.overwrite or self._is_cut_off

    def refuse_source(self, sources: Iterable[SourceFile]) -> None:
        """Raise an `OutputError` if one of the files that are read would be replaced."""
        for source in sources:
            if source.path == self.target or (self.names and source.path.parent == self.target):
                raise replaces_source(self.target)

    def create(self, name: str) -> GrowingFile:
        """A new file of the output; one alone has the name of the target."""
        if self._here is None:
            raise ValueError("files are created inside the with statement")
        there = self.target / name if self.names else self.target
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
                store_of(self.target).put(member.here, member.there, overwrite=self._may_replace)
                put.append(member.there)
        except FileExistsError as error:
            self._remove(put)
            raise output_exists(self.target) from error
        except BaseException:
            self._remove(put)
            raise

    def _remove(self, put: Iterable[RemotePath]) -> None:
        if not self._may_replace:
            for path in put:
                with contextlib.suppress(OutputError):
                    store_of(path).remove(path)


def _order(name: str) -> int:
    """Which files are put first: the list of them, which tells what is missing if the rest does not come."""
    if name == manifest.NAME:
        return -1
    if name == PIPELINE_INDEX:
        return 3
    return 2 if name.endswith(SHARD_INDEX_SUFFIXES) else 1 if name.endswith(".json") else 0
