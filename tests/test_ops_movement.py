"""Movement operators and tensors made from nothing, against torch and NumPy; shapes and strides."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_op
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import ALL, FLOATS, INTS, Array, assert_same, random, shapes, special

from torchvk import ops
from torchvk.graph import DType, TensorType
from torchvk.ops.codes import DTYPE
from torchvk.ops.creation import ArangeAttributes, FullAttributes, pattern, scalar
from torchvk.ops.movement import (
    CatAttributes,
    ExpandAttributes,
    FlipAttributes,
    PadAttributes,
    PermuteAttributes,
    RepeatAttributes,
    ReshapeAttributes,
    SelectAttributes,
    SliceAttributes,
)
from torchvk.ops.shapes import Walk, broadcast, broadcast_strides, collapse, dense_strides

GPU = ops.Capabilities(0, "discrete", 32, 1024, (1024, 1024, 64), (65535, 65535, 65535), 49152, 2**32 - 1)


def check(name: str, attributes: Any, inputs: list[Array], want: Array) -> None:
    """Reference and kernel against ``want``."""
    (got,) = ops.get(name).reference(attributes, inputs)
    assert_same(got, want)
    assert_same(run_op(name, attributes, inputs)[0], want)


def numpy(x: torch.Tensor) -> Array:
    return np.asarray(x.contiguous().numpy())


dtypes = st.sampled_from(ALL)
quick = settings(max_examples=25, deadline=None)


@pytest.mark.parametrize("dtype", ALL)
def test_permute_of_every_dtype(dtype: str) -> None:
    x = random(dtype, [3, 5, 7])
    check("permute", PermuteAttributes([2, 0, 1]), [x], np.ascontiguousarray(x.transpose(2, 0, 1)))


@pytest.mark.tier
@quick
@given(st.data(), shapes(), dtypes)
def test_permute(data: st.DataObject, shape: tuple[int, ...], dtype: str) -> None:
    x, dims = random(dtype, shape), data.draw(st.permutations(range(len(shape))))
    check("permute", PermuteAttributes(list(dims)), [x], numpy(torch.from_numpy(x).permute(dims)))


@quick
@given(st.data(), shapes(), dtypes)
def test_expand(data: st.DataObject, target: tuple[int, ...], dtype: str) -> None:
    source = tuple(1 if data.draw(st.booleans()) else size for size in target)
    source = source[data.draw(st.integers(0, len(source))) :]
    x = random(dtype, source)
    check("expand", ExpandAttributes(list(target)), [x], np.array(np.broadcast_to(x, target), order="C"))


@pytest.mark.tier
@quick
@given(st.data(), shapes().filter(bool), dtypes)
def test_slice(data: st.DataObject, shape: tuple[int, ...], dtype: str) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    start = data.draw(st.integers(0, shape[dim]))
    end, step = data.draw(st.integers(start, shape[dim])), data.draw(st.integers(1, 3))
    x = random(dtype, shape)
    want = np.array(x[(slice(None),) * dim + (slice(start, end, step),)])
    check("slice", SliceAttributes(dim, start, end, step), [x], want)


@quick
@given(st.data(), shapes(min_size=1).filter(bool), dtypes)
def test_select(data: st.DataObject, shape: tuple[int, ...], dtype: str) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    index = data.draw(st.integers(0, shape[dim] - 1))
    x = random(dtype, shape)
    check("select", SelectAttributes(dim, index), [x], numpy(torch.from_numpy(x).select(dim, index)))


@quick
@given(st.data(), shapes(), dtypes)
def test_flip(data: st.DataObject, shape: tuple[int, ...], dtype: str) -> None:
    dims = [d for d in range(len(shape)) if data.draw(st.booleans())]
    x = random(dtype, shape)
    check("flip", FlipAttributes(dims), [x], numpy(torch.from_numpy(x).flip(dims)))


def test_reshape_moves_nothing() -> None:
    x = random("float16", [3, 4, 5])
    check("reshape", ReshapeAttributes([2, 30]), [x], x.reshape(2, 30))
    assert ops.get("reshape").alias


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("sizes", [[1, 2], [3, 4, 1], [1, 1, 1, 1], [5, 0, 3, 2, 7, 1, 4], [4, 8, 4, 12]])
def test_cat(sizes: list[int], dtype: str) -> None:
    """Pieces of 8 and 16 bits that share words with their neighbours, more inputs than a dispatch takes."""
    for dim, rest in ((0, ()), (0, (3,)), (1, (3,)), (2, (2, 2))):
        pieces = []
        for seed, size in enumerate(sizes):
            shape = [*rest[:dim], size, *rest[dim:]]
            pieces.append(random(dtype, shape, seed))
        check("cat", CatAttributes(dim), pieces, np.concatenate(pieces, dim))


@pytest.mark.tier
@quick
@given(st.data(), shapes(max_rank=5).filter(bool), dtypes)
def test_cat_of_any_shapes(data: st.DataObject, shape: tuple[int, ...], dtype: str) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    sizes = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=7))
    pieces = [random(dtype, (*shape[:dim], size, *shape[dim + 1 :]), seed) for seed, size in enumerate(sizes)]
    check("cat", CatAttributes(dim), pieces, np.concatenate(pieces, dim))


def test_cat_of_one_tensor_with_itself() -> None:
    x = random("int8", [5])
    check("cat", CatAttributes(0), [x, x], np.concatenate([x, x]))


@quick
@given(st.data(), shapes(max_size=3), dtypes)
def test_repeat(data: st.DataObject, shape: tuple[int, ...], dtype: str) -> None:
    new = data.draw(st.integers(0, 8 - len(shape)))
    numbers = st.sampled_from((1, 1, 2, 3, 0)) if len(shape) + new < 6 else st.sampled_from((1, 1, 2))
    repeats = data.draw(st.lists(numbers, min_size=len(shape) + new, max_size=len(shape) + new))
    x = random(dtype, shape)
    check("repeat", RepeatAttributes(repeats), [x], numpy(torch.from_numpy(x).repeat(repeats)))


@pytest.mark.tier
@quick
@given(st.data(), shapes(max_rank=6), dtypes)
def test_pad(data: st.DataObject, shape: tuple[int, ...], dtype: str) -> None:
    padding = []
    for size in shape:
        before = data.draw(st.integers(-min(size, 2), 2))
        padding += [before, data.draw(st.integers(-min(size + min(before, 0), 2), 2))]
    value = {"bool": True, "uint8": 200}.get(dtype, -3)
    x = random(dtype, shape)
    # torch takes pairs from the last dimension on.
    backwards = [number for d in reversed(range(len(shape))) for number in padding[2 * d : 2 * d + 2]]
    want = torch.constant_pad_nd(torch.from_numpy(x), backwards, value)
    check("pad", PadAttributes(padding, value), [x], numpy(want))


def test_pad_crops_more_than_there_is() -> None:
    """Beyond torch: what is left is padding alone."""
    x = random("float32", [2, 3])
    check("pad", PadAttributes([-5, 7, 0, 0], 1.5), [x], np.full((4, 3), 1.5, np.float32))


@pytest.mark.parametrize("dtype", ALL)
def test_full(dtype: str) -> None:
    value = {"bool": True, "uint8": 255, "int64": -(2**40) - 7}.get(dtype, -100)
    for shape in ([], [0, 3], [7], [2, 3, 5]):
        want = np.full(shape, value, dtype)
        check("full", FullAttributes(shape, value, DType(dtype)), [], want)


@pytest.mark.parametrize("value", [0.1, -math.inf, math.nan, 3.4028234663852886e38, 7, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_full_of_floats(value: float, dtype: str) -> None:
    with np.errstate(all="ignore"):
        want = np.full([3], value).astype(dtype)
    check("full", FullAttributes([3], value, DType(dtype)), [], want)


@pytest.mark.parametrize("dtype", INTS)
def test_arange_of_integers(dtype: str) -> None:
    for start, step, size in ((0, 1, 77), (5, 3, 1), (100, -7, 14), (0, 1, 0)):
        want = (start + step * np.arange(size)).astype(dtype)
        check("arange", ArangeAttributes(start, step, size, DType(dtype)), [], want)


def test_arange_beyond_32_bits() -> None:
    want = 2**33 - 5 - (2**31 + 1) * np.arange(9)
    check("arange", ArangeAttributes(2**33 - 5, -(2**31) - 1, 9, DType.INT64), [], want)


@pytest.mark.parametrize("dtype", FLOATS)
def test_arange_of_floats(dtype: str) -> None:
    for start, step, size in ((0, 1, 77), (-1.0, 0.001, 3001), (0.1, 1e-9, 5), (1e6, -0.37, 1000)):
        with np.errstate(over="ignore"):
            want = (start + np.arange(size) * step).astype(np.float32).astype(dtype)
        check("arange", ArangeAttributes(start, step, size, DType(dtype)), [], want)


def test_special_floats_move_unchanged() -> None:
    """Bits move, whatever they mean: denormals, NaN payloads, negative zero."""
    bits = np.array([0x00000001, 0x80000000, 0x7F800001, 0xFFC12345, 0x7F800000], np.uint32)
    (got,) = run_op("flip", FlipAttributes([0]), [bits.view(np.float32)])
    assert got.view(np.uint32).tolist() == bits[::-1].tolist()
    x = special("float16")
    check("cat", CatAttributes(0), [x, x], np.concatenate([x, x]))


# --- shapes and strides, without a device


@given(shapes(max_size=3), st.data())
def test_collapse_keeps_the_walk(shape: tuple[int, ...], data: st.DataObject) -> None:
    """The collapsed walk visits the same places in the same order, and no two dimensions are left to join."""
    operands = []
    for _ in range(2):
        kept = tuple(1 if data.draw(st.booleans()) else size for size in shape)
        operands.append(broadcast_strides(kept, shape))

    def places(sizes: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
        return [
            sum(c * stride for c, stride in zip(at, strides, strict=True))
            for at in itertools.product(*map(range, sizes))
        ]

    sizes, strides = collapse(shape, *operands)
    assert 1 <= len(sizes) <= max(len(shape), 1)
    if 0 not in shape:
        for own, kept in zip(operands, strides, strict=True):
            assert places(shape, own) == places(sizes, kept)
        for d in range(len(sizes) - 1):
            assert any(own[d] != own[d + 1] * sizes[d + 1] for own in strides)


def test_collapse_of_usual_shapes() -> None:
    dense = dense_strides((2, 3, 4))
    assert collapse((2, 3, 4), dense, dense) == ((24,), ((1,), (1,)))
    assert collapse((2, 3, 4), dense, (0, 0, 1)) == ((6, 4), ((4, 1), (0, 1)))
    assert collapse((2, 3, 4), dense, (0, 0, 0)) == ((24,), ((1,), (0,)))
    assert collapse((), ()) == ((1,), ((0,),))
    assert collapse((1, 1), (1, 1)) == ((1,), ((0,),))


def test_push_constants_of_a_walk() -> None:
    push = Walk.over((2, 3), (1, 2)).push(operands=3)
    assert np.frombuffer(push, np.uint32).tolist() == [6, 3, 1, 1, 1, 1, 1, 1, 1, 2, *[0] * 22]
    assert len(push) == 128


def test_broadcast() -> None:
    assert broadcast([(3, 1), (1, 4), ()]) == (3, 4)
    assert broadcast([(0, 1), (1, 5)]) == (0, 5)
    with pytest.raises(ops.OperatorError, match="do not broadcast"):
        broadcast([(2,), (0,)])


def test_words_move_where_they_can() -> None:
    """Bytes in whole words are copied as words: a quarter of the threads."""
    operator = ops.get("permute")

    def constants(shape: tuple[int, ...], dims: list[int]) -> tuple[int | float, ...]:
        types = [TensorType(DType.INT8, shape)]
        attributes = PermuteAttributes(dims)
        (dispatch,) = operator.kernels(attributes, types, operator.infer(attributes, types), GPU).dispatches
        return dispatch.constants[1:]

    assert constants((6, 4, 8), [1, 0, 2]) == (DTYPE[DType.INT32], 3)
    assert constants((6, 4, 7), [1, 0, 2]) == (DTYPE[DType.INT8], 3)


def test_scalars() -> None:
    assert scalar(300.0, DType.INT16) == 300
    assert pattern(scalar(1, DType.INT8)) == (0x01010101, 0x01010101)
    assert pattern(scalar(-2, DType.INT64)) == (0xFFFFFFFE, 0xFFFFFFFF)
    for value, dtype in ((300, DType.UINT8), (1.5, DType.INT32), (math.inf, DType.INT64), (math.nan, DType.INT8)):
        with pytest.raises(ops.OperatorError, match="is not a number of dtype"):
            scalar(value, dtype)


def test_wrong_operands_are_refused_in_words() -> None:
    x = TensorType(DType.FLOAT32, (2, 3))
    cases: list[tuple[str, Any, list[TensorType | None], str]] = [
        ("reshape", ReshapeAttributes([4]), [x], "cannot become"),
        ("reshape", ReshapeAttributes([-1]), [x], "negative"),
        ("permute", PermuteAttributes([0, 0]), [x], "no permutation"),
        ("expand", ExpandAttributes([4, 3]), [x], "do not broadcast"),
        ("expand", ExpandAttributes([3]), [x], "does not expand"),
        ("expand", ExpandAttributes([1] * 9), [x], "rank 9"),
        ("slice", SliceAttributes(0, 1, 5, 1), [x], "not normalized"),
        ("slice", SliceAttributes(0, 0, 2, 0), [x], "not normalized"),
        ("slice", SliceAttributes(2, 0, 2, 1), [x], "dim 2"),
        ("select", SelectAttributes(0, 2), [x], "out of range"),
        ("flip", FlipAttributes([0, 0]), [x], "repeat themselves"),
        ("cat", CatAttributes(0), [], "at least 1"),
        ("cat", CatAttributes(0), [x, None], "input 1 is missing"),
        ("cat", CatAttributes(0), [x, TensorType(DType.FLOAT32, (2, 4))], "differ outside of dim 0"),
        ("cat", CatAttributes(0), [x, TensorType(DType.FLOAT16, (2, 3))], "one dtype"),
        ("repeat", RepeatAttributes([2]), [x], "fewer"),
        ("repeat", RepeatAttributes([2, -1]), [x], "negative"),
        ("pad", PadAttributes([1, 1]), [x], "two numbers for each"),
        ("pad", PadAttributes([0, -3, 0, 0]), [x], "negative"),
        ("full", FullAttributes([2], 2.5, DType.INT32), [], "2.5"),
        ("full", FullAttributes([2], 1, DType.INT32), [x], "takes 0 inputs"),
        ("arange", ArangeAttributes(0, 0.5, 3, DType.INT64), [], "not an integer"),
        ("arange", ArangeAttributes(0, 1, 3, DType.BOOL), [], "bool"),
        ("arange", ArangeAttributes(math.nan, 1, 3, DType.FLOAT32), [], "out of range"),
    ]
    for name, attributes, inputs, words in cases:
        reason = ops.supports(name, attributes, inputs)
        assert reason is not None
        assert words in reason
