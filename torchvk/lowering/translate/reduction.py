"""Reductions over dimensions, and running sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchvk.graph import DType
from torchvk.lowering.draft import Value
from torchvk.lowering.translate.registry import Translation, Translator, dim_of, register, torch_dtype, translates

Dims = int | Sequence[int] | None

# torch operator → operator; its overloads differ only in how they name dimensions.
REDUCTIONS = {
    "sum": ("aten.sum.dim_IntList", "aten.sum.default"),
    "mean": ("aten.mean.dim", "aten.mean.default"),
    "prod": ("aten.prod.dim_int", "aten.prod.default"),
    "amax": ("aten.amax.default", "aten.max.default"),
    "amin": ("aten.amin.default", "aten.min.default"),
    "any": ("aten.any.dim", "aten.any.dims", "aten.any.default"),
    "all": ("aten.all.dim", "aten.all.dims", "aten.all.default"),
}
ARG_REDUCTIONS = {"argmax": "aten.argmax.default", "argmin": "aten.argmin.default"}


def _reduce(t: Translator, op: str, x: Value, dim: Dims, keepdim: bool) -> Value:
    rank = len(x.shape)
    given = [dim] if isinstance(dim, int) else list(dim or ())
    if rank == 0:
        # Operators reduce named dimensions: give a number one, and take it away again.
        return t.op(op, t.reshape(x, (1,)), dims=[0], keepdim=False)
    dims = sorted({dim_of(d, rank) for d in given}) or list(range(rank))
    return t.op(op, x, dims=dims, keepdim=keepdim)


def reduction(op: str) -> Translation:
    def translate(
        t: Translator, self: Value, dim: Dims = None, keepdim: bool = False, dtype: torch.dtype | None = None
    ) -> Value:
        return _reduce(t, op, t.cast(self, torch_dtype(dtype, self.dtype)), dim, keepdim)

    return translate


def arg_reduction(op: str) -> Translation:
    def translate(t: Translator, self: Value, dim: int | None = None, keepdim: bool = False) -> Value:
        return _arg_reduce(t, op, self, dim, keepdim)

    return translate


def _arg_reduce(t: Translator, op: str, x: Value, dim: int | None, keepdim: bool) -> Value:
    if dim is None or not x.shape:
        flat = t.reshape(x, (x.type.numel,))
        return t.reshape(t.op(op, flat, dim=0, keepdim=False), t.out.shape)
    return t.op(op, x, dim=dim_of(dim, len(x.shape)), keepdim=keepdim)


for _op, _names in REDUCTIONS.items():
    register(reduction(_op), *_names)
for _op, _name in ARG_REDUCTIONS.items():
    register(arg_reduction(_op), _name)


def _extreme(value_op: str, index_op: str) -> Translation:
    def translate(t: Translator, self: Value, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
        return _reduce(t, value_op, self, dim, keepdim), _arg_reduce(t, index_op, self, dim, keepdim)

    return translate


register(_extreme("amax", "argmax"), "aten.max.dim")
register(_extreme("amin", "argmin"), "aten.min.dim")


@translates("aten.var.correction")
def var(t: Translator, self: Value, dim: Dims = None, correction: float | None = None, keepdim: bool = False) -> Value:
    """The mean of squared distances from the mean, in two passes over the data as torch takes them."""
    centred = t.op("sub", self, _reduce(t, "mean", self, dim, True))
    total = _reduce(t, "sum", t.op("mul", centred, centred), dim, keepdim)
    count = self.type.numel // max(total.type.numel, 1)
    left = max(count - (1 if correction is None else correction), 0)
    return t.op("div", total, t.scalar(left, total.dtype))


@translates("aten.cumsum.default")
def cumsum(t: Translator, self: Value, dim: int, dtype: torch.dtype | None = None) -> Value:
    default = self.dtype if self.dtype.is_float else DType.INT64
    x = t.cast(self, torch_dtype(dtype, default))
    return t.op("cumsum", x, dim=dim_of(dim, len(x.shape))) if x.shape else x
