"""Build hook: compiles the shaders into the package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ShaderHook(BuildHookInterface):  # type: ignore[type-arg]
    """Wheels (plain and editable) carry SPIR-V; source distributions do not."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name == "sdist":
            return
        sys.path.insert(0, str(Path(self.root) / "tools"))
        import compile_shaders

        compile_shaders.build()
