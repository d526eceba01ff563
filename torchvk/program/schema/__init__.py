"""Accessors for ExecuTorch's .pte files, generated from its published FlatBuffers schema."""

from __future__ import annotations

from typing import Any

from flatbuffers.number_types import UOffsetTFlags


def checked_string(table: Any, offset: int) -> bytes:
    """The string that the field at ``offset`` refers to; ValueError if it ends outside the buffer."""
    offset += table.Get(UOffsetTFlags, offset)
    begin = offset + UOffsetTFlags.bytewidth
    end = begin + table.Get(UOffsetTFlags, offset)
    if end > len(table.Bytes):
        raise ValueError("a string ends outside the file")
    return bytes(table.Bytes[begin:end])
