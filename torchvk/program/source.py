"""Where a program comes from: a path (memory-mapped), bytes, or ExecuTorch's own manager object."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Union, runtime_checkable

from torchvk.errors import ArgumentTypeError, FormatError, TorchVkError


@runtime_checkable
class HasBuffer(Protocol):
    """``executorch.exir.ExecutorchProgramManager``, known by what it has."""

    @property
    def buffer(self) -> bytes: ...


# Any object with the buffer protocol will do; typing.Buffer is newer than the oldest Python that is supported.
ProgramSource = Union[str, "os.PathLike[str]", bytes, bytearray, memoryview, mmap.mmap, HasBuffer]


@dataclass(frozen=True, slots=True)
class Source:
    """The bytes of a program, and the name that errors call it by. Nothing is copied."""

    name: str
    view: memoryview = field(repr=False)


def open_source(source: ProgramSource) -> Source:
    """Open a .pte file.

    A path is memory-mapped (privately: nothing that is done with the bytes reaches the file). Raises
    :class:`FormatError` for a missing, unreadable or empty file, :class:`ArgumentTypeError` for another type.
    """
    if isinstance(source, (str, os.PathLike)):
        return Source(os.fspath(source), _map(Path(source)))
    # ExecutorchProgramManager; the buffer of the class itself would be a property object, not bytes.
    buffer: Any = getattr(source, "buffer", source)
    try:
        return Source("program", memoryview(buffer).cast("B").toreadonly())
    except TypeError:
        raise ArgumentTypeError(
            f"source must be a path, (contiguous) bytes, or an ExecutorchProgramManager, not {type(source).__name__}; "
            "call .to_executorch() on the result of to_edge_transform_and_lower first"
        ) from None


def _map(path: Path) -> memoryview:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise FormatError(f"{path}: the file is empty")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except FormatError:
        raise
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read: {error}") from None


@contextmanager
def located(where: str) -> Iterator[None]:
    """Put ``where`` in front of the message of any torchvk error raised inside."""
    try:
        yield
    except TorchVkError as error:
        message = str(error)
        if message.startswith(where):
            raise
        raise type(error)(f"{where}: {message}") from error
