"""What the tests share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder of checkpoints that the real trainer wrote."""
    folder = os.environ.get("COGTOOLS_REAL_CHECKPOINTS")
    if folder is None:
        pytest.skip("COGTOOLS_REAL_CHECKPOINTS does not name the folder of checkpoints that the real trainer wrote")
    return Path(folder)
