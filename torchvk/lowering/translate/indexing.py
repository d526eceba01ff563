"""Reads at positions that are data: embedding, gather, advanced indexing."""

from __future__ import annotations

from collections.abc import Sequence

from torchvk.graph import DType
from torchvk.lowering.draft import Value
from torchvk.lowering.refusal import Refused
from torchvk.lowering.translate.registry import Translator, dim_of, translates


@translates("aten.embedding.default")
def embedding(t: Translator, weight: Value, indices: Value) -> Value:
    return t.op("embedding", weight, indices)


@translates("aten.gather.default")
def gather(t: Translator, self: Value, dim: int, index: Value) -> Value:
    return t.op("gather", self, index, dim=dim_of(dim, len(self.shape)))


@translates("aten.index.Tensor", "aten._unsafe_index.Tensor")
def index(t: Translator, self: Value, indices: Sequence[Value | None]) -> Value:
    if any(i is not None and i.dtype in (DType.BOOL, DType.UINT8) for i in indices):
        raise Refused("indexing with a mask is not supported: the shape of its result depends on the data")
    given = list(indices)
    while given and given[-1] is None:
        given.pop()
    return t.op("index", self, *given) if given else self


@translates("aten.index_select.default")
def index_select(t: Translator, self: Value, dim: int, index: Value) -> Value:
    return t.op("index_select", self, index, dim=dim_of(dim, len(self.shape)))
