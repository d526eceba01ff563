"""All tests run with the validation layers on; what the layers say fails the test in which they say it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest

os.environ["TORCHVK_VALIDATION"] = "1"
# Tests neither read nor fill the user's pipeline cache.
os.environ.setdefault("TORCHVK_CACHE_DIR", tempfile.mkdtemp(prefix="torchvk-tests-"))


@pytest.fixture(autouse=True)
def _no_validation_messages() -> Iterator[None]:
    from torchvk.runtime import validation_messages

    before = len(validation_messages())
    yield
    said = validation_messages()[before:]
    assert not said, "the validation layers said:\n" + "\n".join(said)
