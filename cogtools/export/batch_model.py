"""Exporting the whole model of one checkpoint of a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cogtools.checkpoint.places import is_file, is_folder
from cogtools.conversion.manifest import is_whole
from cogtools.errors import CheckpointError
from cogtools.export.batch_lora import not_right
from cogtools.export.export_model import export_model_checkpoint
from cogtools.export.names import Target
from cogtools.layouts.pipeline import INDEX

if TYPE_CHECKING:
    from cogtools.checkpoint.paths import AnyPath
    from cogtools.conversion.options import ModelOptions
    from cogtools.export.model_report import ModelExportReport, PartReport


@dataclass(frozen=True, slots=True)
class ModelWork:
    """Exporting whole models, with these options."""

    options: ModelOptions

    def target(self, folder: AnyPath, _file: AnyPath) -> Target:
        """Where the model of a file is written: a folder of its own."""
        return Target(folder, folder, is_folder=True)

    def is_done(self, file: AnyPath, target: Target) -> bool:
        """Whether the output exists already, all of it, and verifies against the checkpoint.

        Raises:
            OutputError: if it exists, or a part of it, and does not verify.
        """
        if not is_folder(target.folder):
            return False
        # What is there may be replaced by it only if cogtools wrote it.
        options = replace(self._options, overwrite=True, dry_run=True)
        planned = export_model_checkpoint(file, target.folder, options)
        whole = [part for part in planned.parts if is_whole(part.folder)]
        for part in whole:
            if part.tensors:
                self._refuse_other(part, file)
        return len(whole) == len(planned.parts) and (not planned.pipeline or is_file(target.folder / INDEX))

    def _refuse_other(self, part: PartReport, file: AnyPath) -> None:
        from cogtools.verification.verify_model import verify_model

        source = self.options.vae if part.name == "vae" and self.options.vae is not None else file
        try:
            report = verify_model(part.folder, against=source, model=self.options.model)
        except CheckpointError as error:
            if not f"{error.file}/".startswith(f"{part.folder}/"):
                raise
            raise not_right(file, part.folder, error.what) from error
        # Positions that go with other sizes are what the export warns of, and no reason to write the same again.
        failed = [check for check in report.checks if check.status == "fail" and not check.name.endswith("positions")]
        if failed:
            raise not_right(file, part.folder, f"{failed[0].name}: {failed[0].seen}")

    def export(self, file: AnyPath, target: Target) -> ModelExportReport:
        """Export it.

        What is there of it after `is_done` equals the checkpoint, or was cut off: a run has left it that was ended
        between two parts, or while it put them into a store. It is replaced.
        """
        overwrite = self.options.overwrite or is_folder(target.folder)
        return export_model_checkpoint(file, target.folder, replace(self._options, overwrite=overwrite))

    @property
    def _options(self) -> ModelOptions:
        """The file says which iteration it is."""
        return replace(self.options, iteration=None, ema=False)
