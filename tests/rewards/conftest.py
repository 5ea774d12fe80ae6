"""What tests of graders share."""

import pytest


@pytest.fixture(autouse=True)
def _patience(patient_graders) -> None:
    """A test of what hangs sets a deadline of its own."""
