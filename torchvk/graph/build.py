"""A builder: the easy way to make a Graph by hand or from another representation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from torchvk.graph.ir import ByteRange, DType, Graph, Node, Role, Tensor, TensorType, pack_bits
from torchvk.graph.serialize import align, attributes_to_plain


class GraphBuilder:
    """Collects tensors, nodes and constants; :meth:`build` gives the validated Graph."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.nodes: list[Node] = []
        self._inputs: list[int] = []
        self._chunks: list[np.ndarray[Any, Any]] = []
        self._size = 0
        self._known: dict[tuple[str, tuple[int, ...], bytes], int] = {}

    def _add(self, name: str, type: TensorType, role: Role, data: ByteRange | None = None) -> int:
        self.tensors.append(Tensor(name, type.dtype, type.shape, role, data))
        return len(self.tensors) - 1

    def input(self, name: str, type: TensorType) -> int:
        index = self._add(name, type, Role.INPUT)
        self._inputs.append(index)
        return index

    def constant(self, name: str, array: np.ndarray[Any, Any], dtype: DType | None = None) -> int:
        """Add a constant; dtypes of less than 8 bits pack integers. Equal constants are stored once."""
        dtype = dtype or DType.of(array.dtype)
        shape = tuple(int(size) for size in array.shape)
        raw = np.ascontiguousarray(pack_bits(array, dtype.bits) if dtype.packed else array)
        # view() refuses 0-D arrays; reshape(-1) first.
        raw = raw.reshape(-1).view(np.uint8)
        key = (dtype.value, shape, hashlib.sha256(raw.data).digest())
        if key in self._known:
            return self._known[key]
        offset = align(self._size)
        self._chunks.append(np.zeros(offset - self._size, np.uint8))
        self._chunks.append(raw)
        self._size = offset + raw.size
        index = self._add(name, TensorType(dtype, shape), Role.CONSTANT, ByteRange(offset, raw.size))
        self._known[key] = index
        return index

    def node(
        self,
        op: str,
        inputs: Sequence[int | None],
        outputs: Sequence[TensorType],
        attributes: Any = None,
        name: str = "",
        source: str = "",
    ) -> tuple[int, ...]:
        """Append a node; ``attributes`` is the operator's attribute dataclass, a mapping or None.

        Returns the positions of its outputs.
        """
        indices = tuple(
            self._add(name if len(outputs) == 1 else f"{name}.{i}", type, Role.TEMPORARY)
            for i, type in enumerate(outputs)
        )
        plain = {} if attributes is None else attributes_to_plain(attributes)
        self.nodes.append(Node(op, tuple(inputs), indices, plain, source))
        return indices

    def build(self, outputs: Sequence[int]) -> Graph:
        tensors = list(self.tensors)
        for index in outputs:
            if tensors[index].role is Role.TEMPORARY:
                tensors[index] = replace(tensors[index], role=Role.OUTPUT)
        blob: np.ndarray[Any, Any] = np.concatenate([np.zeros(0, np.uint8), *self._chunks])
        graph = Graph(tuple(tensors), tuple(self.nodes), tuple(self._inputs), tuple(outputs), blob.data.toreadonly())
        graph.validate()
        return graph
