"""Operators that move elements and compute nothing: views, permutations, slices, concatenation."""

from __future__ import annotations

from collections.abc import Sequence

from torchvk.lowering.draft import Value
from torchvk.lowering.refusal import Refused
from torchvk.lowering.translate.registry import Translator, as_number, dim_of, register, translates

# All that only give the same elements in the same order another shape.
VIEWS = (
    "aten.view_copy.default",
    "aten._unsafe_view.default",
    "aten.unsqueeze_copy.default",
    "aten.squeeze_copy.default",
    "aten.squeeze_copy.dim",
    "aten.squeeze_copy.dims",
)


def view(t: Translator, self: Value) -> Value:
    return t.reshape(self, t.out.shape)


register(view, *VIEWS)


@translates("aten.permute_copy.default")
def permute(t: Translator, self: Value, dims: Sequence[int]) -> Value:
    return t.op("permute", self, dims=[dim_of(dim, len(self.shape)) for dim in dims]) if self.shape else self


@translates("aten.transpose_copy.int")
def transpose(t: Translator, self: Value, dim0: int, dim1: int) -> Value:
    dims = list(range(len(self.shape)))
    if not dims:
        return self
    a, b = dim_of(dim0, len(dims)), dim_of(dim1, len(dims))
    dims[a], dims[b] = dims[b], dims[a]
    return t.op("permute", self, dims=dims)


@translates("aten.t_copy.default")
def matrix_transpose(t: Translator, self: Value) -> Value:
    return t.op("permute", self, dims=[1, 0]) if len(self.shape) == 2 else self


@translates("aten.expand_copy.default")
def expand(t: Translator, self: Value) -> Value:
    return t.expand(self, t.out.shape)


@translates("aten.slice_copy.Tensor")
def slice_(
    t: Translator, self: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Value:
    dim = dim_of(dim, len(self.shape))
    return _slice(t, self, dim, *slice(start, end, step).indices(self.shape[dim]))


def _slice(t: Translator, x: Value, dim: int, start: int, end: int, step: int = 1) -> Value:
    end = max(start, end)
    if (start, end, step) == (0, x.shape[dim], 1):
        return x
    return t.op("slice", x, dim=dim, start=start, end=end, step=step)


@translates("aten.select_copy.int")
def select(t: Translator, self: Value, dim: int, index: int) -> Value:
    dim = dim_of(dim, len(self.shape))
    return t.op("select", self, dim=dim, index=index % self.shape[dim])


@translates("aten.unbind_copy.int")
def unbind(t: Translator, self: Value, dim: int = 0) -> tuple[Value, ...]:
    dim = dim_of(dim, len(self.shape))
    return tuple(t.op("select", self, dim=dim, index=index) for index in range(self.shape[dim]))


@translates("aten.split_with_sizes_copy.default")
def split_with_sizes(t: Translator, self: Value, split_sizes: Sequence[int], dim: int = 0) -> tuple[Value, ...]:
    dim = dim_of(dim, len(self.shape))
    parts, start = [], 0
    for size in split_sizes:
        parts.append(_slice(t, self, dim, start, start + size))
        start += size
    return tuple(parts)


@translates("aten.split_copy.Tensor")
def split(t: Translator, self: Value, split_size: int, dim: int = 0) -> tuple[Value, ...]:
    total = self.shape[dim_of(dim, len(self.shape))]
    if split_size == 0 or total == 0:
        return (self,)
    sizes = [min(split_size, total - start) for start in range(0, total, split_size)]
    return split_with_sizes(t, self, sizes, dim)


@translates("aten.flip.default")
def flip(t: Translator, self: Value, dims: Sequence[int]) -> Value:
    return t.op("flip", self, dims=[dim_of(dim, len(self.shape)) for dim in dims]) if dims and self.shape else self


@translates("aten.cat.default")
def cat(t: Translator, tensors: Sequence[Value], dim: int = 0) -> Value:
    # torch lets empty 1-D tensors stand among tensors of any rank.
    parts = [part for part in tensors if part.shape != (0,)] or list(tensors[:1])
    parts = [t.cast(part, t.out.dtype) for part in parts]
    return parts[0] if len(parts) == 1 else t.op("cat", *parts, dim=dim_of(dim, len(parts[0].shape)))


@translates("aten.stack.default")
def stack(t: Translator, tensors: Sequence[Value], dim: int = 0) -> Value:
    dim = dim_of(dim, len(t.out.shape))
    shape = (*t.out.shape[:dim], 1, *t.out.shape[dim + 1 :])
    return cat(t, [t.reshape(part, shape) for part in tensors], dim)


@translates("aten.repeat.default")
def repeat(t: Translator, self: Value, repeats: Sequence[int]) -> Value:
    x = t.reshape(self, (1,) * (len(repeats) - len(self.shape)) + self.shape)
    return x if all(count == 1 for count in repeats) else t.op("repeat", x, repeats=list(repeats))


@translates("aten.constant_pad_nd.default")
def pad(t: Translator, self: Value, pad: Sequence[int], value: float = 0) -> Value:
    # torch lists (before, after) from the last dimension on; a negative number cuts off.
    rank = len(self.shape)
    pairs = [(0, 0)] * (rank - len(pad) // 2) + [(pad[i], pad[i + 1]) for i in range(len(pad) - 2, -1, -2)]
    for dim, (before, after) in enumerate(pairs):
        self = _slice(t, self, dim, max(-before, 0), self.shape[dim] - max(-after, 0))
    padding = [max(size, 0) for pair in pairs for size in pair]
    if not any(padding):
        return self
    return t.op("pad", self, padding=padding, value=as_number(value, self.dtype))


@translates("aten.slice_scatter.default")
def slice_scatter(
    t: Translator,
    self: Value,
    src: Value,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Value:
    dim = dim_of(dim, len(self.shape))
    begin, stop, step = slice(start, end, step).indices(self.shape[dim])
    if step != 1:
        raise Refused(f"a step of {step} is not supported, only 1 is")
    return _replace(t, self, src, dim, begin, max(begin, stop))


@translates("aten.select_scatter.default")
def select_scatter(t: Translator, self: Value, src: Value, dim: int, index: int) -> Value:
    dim = dim_of(dim, len(self.shape))
    index %= self.shape[dim]
    return _replace(t, self, t.reshape(src, (*src.shape[:dim], 1, *src.shape[dim:])), dim, index, index + 1)


def _replace(t: Translator, x: Value, new: Value, dim: int, start: int, end: int) -> Value:
    parts = [new] if end > start else []
    if start > 0:
        parts.insert(0, _slice(t, x, dim, 0, start))
    if end < x.shape[dim]:
        parts.append(_slice(t, x, dim, end, x.shape[dim]))
    return parts[0] if len(parts) == 1 else t.op("cat", *parts, dim=dim)
