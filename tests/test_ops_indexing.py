"""Indexing operators against torch; indices out of range are clamped, and never read elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from harness import run_op
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import ALL, Array, assert_same, random, shapes

from torchvk import ops
from torchvk.graph import DType, TensorType
from torchvk.ops.codes import DTYPE
from torchvk.ops.indexing import GatherAttributes, IndexSelectAttributes

quick = settings(max_examples=25, deadline=None)
dtypes = st.sampled_from(ALL)
index_dtypes = st.sampled_from(("int64", "int32"))
FAR = {"int64": [-(2**63), -(2**32) - 1, -1, 2**31, 2**32, 2**33 + 1, 2**63 - 1], "int32": [-(2**31), -1, 2**31 - 1]}


def check(name: str, attributes: Any, inputs: list[Array | None], want: Array) -> None:
    """Reference and kernel against ``want``."""
    (got,) = ops.get(name).reference(attributes, inputs)
    assert_same(got, want)
    assert_same(run_op(name, attributes, inputs)[0], want)


def indices(shape: tuple[int, ...] | list[int], low: int, high: int, dtype: str, seed: int = 0) -> Array:
    return np.asarray(np.random.default_rng(seed).integers(low, max(high, low + 1), shape)).astype(dtype)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("row", [(), (1,), (3,), (8,), (2, 6)])
def test_embedding(dtype: str, row: tuple[int, ...]) -> None:
    weight, ids = random(dtype, [11, *row]), indices([2, 5], 0, 11, "int64")
    want = torch.nn.functional.embedding(torch.from_numpy(ids), torch.from_numpy(weight.reshape(11, -1))).numpy()
    check("embedding", None, [weight, ids], want.reshape(2, 5, *row))


@pytest.mark.tier
@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_ids_out_of_range_read_the_first_or_last_row(dtype: str) -> None:
    weight, ids = random("float32", [5, 3]), np.array([*FAR[dtype], 4, 5], dtype)
    want = weight[np.clip(ids, 0, 4)]
    check("embedding", None, [weight, ids], want)
    check("index_select", IndexSelectAttributes(0), [weight, ids], want)
    columns = np.stack([ids, ids, ids], 1)
    check("gather", GatherAttributes(0), [weight, columns], np.take_along_axis(weight, np.clip(columns, 0, 4), 0))
    wrapped = np.clip(np.where(ids < 0, ids + 5, ids), 0, 4)
    check("index", None, [weight, ids], weight[wrapped])
    check("index", None, [weight, ids, ids], weight[wrapped, np.clip(np.where(ids < 0, ids + 3, ids), 0, 2)])


@quick
@given(shapes(max_rank=4), shapes(max_rank=4), dtypes, index_dtypes)
def test_embedding_of_any_shapes(row: tuple[int, ...], ids: tuple[int, ...], dtype: str, index_dtype: str) -> None:
    weight = random(dtype, [7, *row])
    chosen = indices(ids, 0, 7, index_dtype)
    check("embedding", None, [weight, chosen], np.array(weight[chosen]))


def test_no_ids_need_no_rows() -> None:
    weight, none = random("float32", [0, 3]), np.zeros([0, 2], np.int64)
    check("embedding", None, [weight, none], np.zeros([0, 2, 3], np.float32))


@pytest.mark.tier
@quick
@given(st.data(), shapes(min_size=1), dtypes, index_dtypes)
def test_gather(data: st.DataObject, shape: tuple[int, ...], dtype: str, index_dtype: str) -> None:
    dim = data.draw(st.integers(0, max(len(shape) - 1, 0)))
    own = tuple(data.draw(st.integers(0, 6 if d == dim else size)) for d, size in enumerate(shape))
    x, index = random(dtype, shape), indices(own, 0, shape[dim] if shape else 1, index_dtype)
    want = torch.gather(torch.from_numpy(x), dim, torch.from_numpy(index).long()).numpy()
    check("gather", GatherAttributes(dim), [x, index], want)


@quick
@given(st.data(), shapes(min_size=1).filter(bool), dtypes, index_dtypes)
def test_index_select(data: st.DataObject, shape: tuple[int, ...], dtype: str, index_dtype: str) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    own = data.draw(st.sampled_from(((), (0,), (1,), (4,))))
    x, index = random(dtype, shape), indices(own, 0, shape[dim], index_dtype)
    want = torch.index_select(torch.from_numpy(x), dim, torch.from_numpy(index)).numpy()
    check("index_select", IndexSelectAttributes(dim), [x, index], want)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize(
    "indexed", [(0,), (1,), (3,), (0, 1), (1, 2), (0, 2), (1, 3), (0, 1, 2), (0, 2, 3), (0, 1, 2, 3)]
)
def test_index(dtype: str, indexed: tuple[int, ...]) -> None:
    """Index tensors at these dimensions, neighbours or not; one to four of them, broadcast against each other."""
    x = random(dtype, [3, 4, 2, 5])
    broadcast = [(2, 3), (3,), (2, 1), ()]
    inputs: list[Array | None] = [x, *[None] * (indexed[-1] + 1)]
    for position, d in enumerate(indexed):
        inputs[d + 1] = indices(broadcast[position], -x.shape[d], x.shape[d], "int64", seed=d)
    check("index", None, inputs, eager_index(inputs))


def eager_index(inputs: list[Array | None]) -> Array:
    x, *rest = [None if value is None else torch.from_numpy(value) for value in inputs]
    return np.asarray(torch.ops.aten.index.Tensor(x, rest).contiguous().numpy())


@pytest.mark.tier
@settings(max_examples=40, deadline=None)
@given(st.data(), shapes(max_rank=6).filter(bool), dtypes, index_dtypes)
def test_index_of_any_shapes(data: st.DataObject, shape: tuple[int, ...], dtype: str, index_dtype: str) -> None:
    count = data.draw(st.integers(1, len(shape)))
    indexed = data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1, max_size=count))
    most = data.draw(st.lists(st.integers(0, 3), max_size=2))
    if any(shape[d] == 0 for d in indexed):
        most = [0, *most]
    inputs: list[Array | None] = [random(dtype, shape), *[None] * (max(indexed) + 1)]
    for d in indexed:
        own = [1 if size != 0 and data.draw(st.booleans()) else size for size in most]
        inputs[d + 1] = indices(own, -shape[d], shape[d], index_dtype, seed=d)
    check("index", None, inputs, eager_index(inputs))


def test_words_move_where_they_can() -> None:
    """float16 rows of an even length are read as words."""
    capabilities = ops.Capabilities(0, "cpu", 8, 1024, (1024,) * 3, (65535,) * 3, 32768, 2**27)
    operator = ops.get("embedding")
    for columns, dtype in ((6, DType.INT32), (5, DType.FLOAT16)):
        types = [TensorType(DType.FLOAT16, (9, columns)), TensorType(DType.INT64, (4,))]
        (dispatch,) = operator.kernels(None, types, operator.infer(None, types), capabilities).dispatches
        assert dispatch.constants[1] == DTYPE[dtype]


def test_wrong_operands_are_refused_in_words() -> None:
    x, index = TensorType(DType.FLOAT32, (2, 3)), TensorType(DType.INT64, (4,))
    empty = TensorType(DType.FLOAT32, (0, 3))
    cases: list[tuple[str, Any, list[TensorType | None], str]] = [
        ("embedding", None, [x, TensorType(DType.FLOAT32, (4,))], "the index is float32"),
        ("embedding", None, [empty, index], "dimension of size 0"),
        ("embedding", None, [TensorType(DType.FLOAT32, ()), index], "at least 1 dimension"),
        ("gather", GatherAttributes(0), [x, index], "one rank"),
        ("gather", GatherAttributes(0), [x, TensorType(DType.INT64, (4, 4))], "exceeds"),
        ("gather", GatherAttributes(2), [x, TensorType(DType.INT64, (1, 1))], "dim 2"),
        ("index_select", IndexSelectAttributes(0), [x, TensorType(DType.INT64, (2, 2))], "at most 1 dimension"),
        ("index", None, [x, TensorType(DType.BOOL, (2,))], "depends on the data"),
        ("index", None, [x, None, None], "at least one index"),
        ("index", None, [x, index, index, index], "3 indices for a tensor of rank 2"),
        ("index", None, [x, index, TensorType(DType.INT64, (3,))], "do not broadcast"),
        ("index", None, [x, index, TensorType(DType.INT32, (4,))], "one dtype"),
        ("index", None, [], "input 0 is missing"),
    ]
    for name, attributes, inputs, words in cases:
        reason = ops.supports(name, attributes, inputs)
        assert reason is not None
        assert words in reason
