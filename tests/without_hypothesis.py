"""In the place of hypothesis, where it is not installed: modules with tests of it can be imported, and those tests get
a mark by which conftest.py leaves them out. (A machine with a GPU need not have more than torch and pytest.)"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest


class Anything:
    """Strategies, settings, and what is done with them."""

    def __getattr__(self, name: str) -> Anything:
        return self

    def __call__(self, *arguments: Any, **keywords: Any) -> Anything:
        return self

    def __or__(self, other: Any) -> Anything:
        return self


def given(*strategies: Any, **keywords: Any) -> Callable[[Any], Any]:
    return pytest.mark.hypothesis


def settings(*arguments: Any, **keywords: Any) -> Callable[[Any], Any]:
    return lambda test: test


modules: dict[str, dict[str, Any]] = {
    "hypothesis": {"given": given, "settings": settings, "HealthCheck": Anything(), "strategies": Anything()},
    "hypothesis.extra": {"numpy": Anything()},
}
for name, contents in modules.items():
    module = types.ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module
