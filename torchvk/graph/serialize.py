"""Graph ↔ bytes.

Layout, little-endian::

    0   8 bytes   magic "TORCHVK\\0"
    8   u32       format version
    12  u32       header size H
    16  u32       CRC-32 (zlib) of all that follows
    20  H bytes   header: the graph without its constants, as MessagePack
    ..            zeros up to the next multiple of 64
    ..            constants; the ranges in the header count from here

The constants stay a view into the given buffer: nothing is copied on load.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from torchvk.errors import FormatError
from torchvk.graph.ir import Graph, Node, Tensor
from torchvk.graph.validate import CONSTANT_ALIGNMENT

MAGIC = b"TORCHVK\0"
VERSION = 1
_PREFIX = struct.Struct("<8sIII")


@dataclass(frozen=True)
class _Header:
    tensors: tuple[Tensor, ...]
    nodes: tuple[Node, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


_decoder = msgspec.msgpack.Decoder(_Header, strict=True)


def align(offset: int, alignment: int = CONSTANT_ALIGNMENT) -> int:
    """``offset`` rounded up to a multiple of ``alignment``."""
    return -(-offset // alignment) * alignment


def to_bytes(graph: Graph) -> bytes:
    """Serialize; raises :class:`FormatError` if the graph is not sound."""
    graph.validate()
    return frame(
        msgspec.msgpack.encode(_Header(graph.tensors, graph.nodes, graph.inputs, graph.outputs)), graph.constants
    )


def frame(header: bytes, constants: memoryview, version: int = VERSION, magic: bytes = MAGIC) -> bytes:
    """Header and constants in the layout above, with their checksum."""
    padding = bytes(align(_PREFIX.size + len(header)) - _PREFIX.size - len(header))
    checksum = zlib.crc32(constants, zlib.crc32(header + padding))
    return b"".join([_PREFIX.pack(magic, version, len(header), checksum), header, padding, constants])


def from_bytes(blob: bytes | bytearray | memoryview) -> Graph:
    """Parse and validate; raises :class:`FormatError`. ``graph.constants`` is a view into ``blob``."""
    view = memoryview(blob).cast("B").toreadonly()
    if len(view) < _PREFIX.size:
        raise FormatError(f"torchvk graph is truncated: {len(view)} bytes, the header alone has {_PREFIX.size}")
    magic, version, size, checksum = _PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise FormatError(f"not a torchvk graph: it starts with {bytes(magic)!r}, not {MAGIC!r}")
    if version != VERSION:
        raise FormatError(f"torchvk graph has format version {version}; this torchvk reads version {VERSION}")
    end = _PREFIX.size + size
    if end > len(view):
        raise FormatError(f"torchvk graph is truncated: the header ends at byte {end} of {len(view)}")
    if zlib.crc32(view[_PREFIX.size :]) != checksum:
        raise FormatError("torchvk graph is damaged: its bytes do not have the checksum that the file gives")
    try:
        header = _decoder.decode(view[_PREFIX.size : end])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"torchvk graph header is damaged: {error}") from None
    begin = min(align(end), len(view))
    graph = Graph(header.tensors, header.nodes, header.inputs, header.outputs, view[begin:])
    graph.validate()
    return graph


def attributes_to_plain(attributes: Any) -> Mapping[str, Any]:
    """An operator's attribute dataclass as the plain mapping that a Node carries."""
    plain: Mapping[str, Any] = msgspec.to_builtins(attributes)
    return plain
