"""Export, inspect and verify CogVideoX checkpoints, LoRAs and whole models.

    >>> import cogtools
    >>> report = cogtools.export_lora("ckpts/lora-disney/1000/mp_rank_00_model_states.pt", "out")

Importing this package is instant: what it offers is imported when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cogtools.version import __version__

if TYPE_CHECKING:
    from cogtools.checkpoint.opening import open_checkpoint
    from cogtools.conversion.summary import LoraModule, LoraSummary, read_lora
    from cogtools.errors import CogtoolsError
    from cogtools.export.export import ExportReport, export_lora
    from cogtools.export.export_model import export_model
    from cogtools.export.merge import MergeReport, merge
    from cogtools.export.model_report import ModelExportReport
    from cogtools.inspection.inspect import inspect_checkpoint
    from cogtools.inspection.report import CheckpointReport
    from cogtools.inspection.selection import Selection
    from cogtools.verification.model_report import ModelVerifyReport
    from cogtools.verification.report import VerifyReport
    from cogtools.verification.verify import verify_lora
    from cogtools.verification.verify_model import verify_model

_HOME = {
    "CheckpointReport": "cogtools.inspection.report",
    "CogtoolsError": "cogtools.errors",
    "ExportReport": "cogtools.export.export",
    "MergeReport": "cogtools.export.merge",
    "LoraModule": "cogtools.conversion.summary",
    "LoraSummary": "cogtools.conversion.summary",
    "ModelVerifyReport": "cogtools.verification.model_report",
    "VerifyReport": "cogtools.verification.report",
    "ModelExportReport": "cogtools.export.model_report",
    "Selection": "cogtools.inspection.selection",
    "export_lora": "cogtools.export.export",
    "merge": "cogtools.export.merge",
    "export_model": "cogtools.export.export_model",
    "inspect_checkpoint": "cogtools.inspection.inspect",
    "open_checkpoint": "cogtools.checkpoint.opening",
    "read_lora": "cogtools.conversion.summary",
    "verify_lora": "cogtools.verification.verify",
    "verify_model": "cogtools.verification.verify_model",
}

__all__ = [
    "CheckpointReport",
    "CogtoolsError",
    "ExportReport",
    "LoraModule",
    "LoraSummary",
    "MergeReport",
    "ModelExportReport",
    "ModelVerifyReport",
    "Selection",
    "VerifyReport",
    "__version__",
    "export_lora",
    "export_model",
    "inspect_checkpoint",
    "merge",
    "open_checkpoint",
    "read_lora",
    "verify_lora",
    "verify_model",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
