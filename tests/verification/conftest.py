"""What the tests of verify share."""

import pytest

from cogtools.verification import child
from tests.support.loading import ask_here


@pytest.fixture(autouse=True)
def loads_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load here what verify loads in a process of its own; a test of that process defines its own fixture."""
    monkeypatch.setattr(child, "ask", ask_here)
