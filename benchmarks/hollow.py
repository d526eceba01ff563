"""Model files without their weights, for machines that have a GPU but not what writes such files.

A hollow file is a .pte whose large constants are taken out; ``fill`` puts random numbers of the same dtype, mean and
deviation in their place. That changes results, and nothing of the work.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from pathlib import Path

import numpy as np

from torchvk.graph import DType
from torchvk.graph.serialize import _PREFIX
from torchvk.program.describe import Graphs
from torchvk.program.pte import decode

SMALLEST = 1 << 15  # bytes; smaller constants stay: indices and masks are among them


def hollow(pte: bytes, path: Path) -> None:
    """Write ``pte`` to ``path`` without its large constants."""
    data = bytearray(pte)
    holes, graphs = [], []
    file = decode(memoryview(pte))
    graph_of = Graphs()
    for plan in file.plans:
        for delegate in plan.delegates:
            graph = graph_of(delegate)
            graphs.append((pte.find(bytes(delegate.data)), len(delegate.data)))
            ranges = {tensor.data: index for index, tensor in enumerate(graph.tensors) if tensor.data is not None}
            for where, index in ranges.items():
                tensor = graph.tensors[index]
                if where.size < SMALLEST or not (
                    tensor.dtype.is_float or tensor.dtype is DType.INT8 or tensor.dtype.packed
                ):
                    continue
                at = pte.find(bytes(graph.constants[where.offset : where.offset + where.size]))
                assert at >= 0, "a constant that is not in its file"
                floats = tensor.dtype.is_float
                values = graph.constant_array(index).astype(np.float32) if floats else np.zeros(1, np.float32)
                holes.append((at, where.size, tensor.dtype.value, float(values.mean()), float(values.std())))
                data[at : at + where.size] = bytes(where.size)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("holes.json", json.dumps({"holes": holes, "graphs": graphs}))
        archive.writestr("model.pte", bytes(data))


def fill(path: Path, seed: int = 0) -> bytes:
    """The .pte of a hollow file, with random weights."""
    rng = np.random.default_rng(seed)
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
        facts = json.loads(archive.read("holes.json"))
        data = bytearray(archive.read("model.pte"))
    for at, size, dtype, mean, deviation in facts["holes"]:
        type = DType(dtype)
        if type.is_float:
            count = size * 8 // type.bits
            values = (mean + deviation * rng.standard_normal(count, np.float32)).astype(type.numpy).tobytes()
        else:
            values = rng.bytes(size)
        data[at : at + size] = values
    for at, size in facts["graphs"]:
        magic, version, header, _ = _PREFIX.unpack_from(data, at)
        checksum = zlib.crc32(memoryview(data)[at + _PREFIX.size : at + size])
        _PREFIX.pack_into(data, at, magic, version, header, checksum)
    return bytes(data)
