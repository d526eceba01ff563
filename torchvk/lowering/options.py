"""Compile options: what a user may ask of a delegate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torchvk.errors import ArgumentError, ArgumentTypeError


@dataclass(frozen=True)
class CompileOptions:
    """force_fp16: compute in float16 where the model says float32; inputs and outputs keep their dtype.

    require_dynamic_shapes: claim only what runs with other shapes than the exported ones; nothing does so far.
    """

    force_fp16: bool = False
    require_dynamic_shapes: bool = False

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> CompileOptions:
        """Raises ArgumentError for an unknown option and ArgumentTypeError for a value that is no bool."""
        if options is not None and not isinstance(options, Mapping):
            raise ArgumentTypeError(f"compile_options must be a dict, not {type(options).__name__}")
        known = [field.name for field in fields(cls)]
        for name, value in (options or {}).items():
            if name not in known:
                raise ArgumentError(f"unknown compile option {name!r}; the options are {', '.join(known)}")
            if not isinstance(value, bool):
                raise ArgumentTypeError(f"compile option {name!r} must be a bool, not {type(value).__name__}")
        return cls(**(options or {}))

    def to_specs(self) -> list[tuple[str, bytes]]:
        """The options that are on, as exir's compile specs carry them."""
        return [(name, b"\x01") for name, value in asdict(self).items() if value]

    @classmethod
    def from_specs(cls, specs: Iterable[tuple[str, bytes]]) -> CompileOptions:
        return cls.parse({key: value != b"\x00" for key, value in specs})
