"""Programs: .pte files in, callable methods out. Neither torch nor executorch is needed to run what is delegated."""

from torchvk.program.arguments import Parameter
from torchvk.program.describe import (
    DelegateDescription,
    MethodDescription,
    ProgramDescription,
    TensorDescription,
    describe,
)
from torchvk.program.profile import Measurement, Profile, Record, Row
from torchvk.program.program import Method, Program, load
from torchvk.program.source import ProgramSource

__all__ = [
    "DelegateDescription",
    "Measurement",
    "Method",
    "MethodDescription",
    "Parameter",
    "Profile",
    "Program",
    "ProgramDescription",
    "ProgramSource",
    "Record",
    "Row",
    "TensorDescription",
    "describe",
    "load",
]
