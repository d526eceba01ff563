"""quantized_embedding on the device and by reference, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import run_op
from hypothesis import given, settings
from hypothesis import strategies as st

from torchvk import ops
from torchvk.graph import DType, TensorType
from torchvk.ops import OperatorError
from torchvk.ops.quantized_embedding import QuantizedEmbeddingAttributes

OPERATOR = ops.get("quantized_embedding")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_table(data: st.DataObject) -> None:
    """Rounded once: the product of an integer of 9 bits and a scale is exact in float64. Ids far out of range, too."""
    bits = data.draw(st.sampled_from([2, 4, 8]), "bits")
    group, groups = data.draw(st.integers(1, 9), "group"), data.draw(st.integers(1, 4), "groups")
    rows = data.draw(st.integers(1, 6), "rows")
    zeros = data.draw(st.booleans(), "zeros")
    dtype = data.draw(st.sampled_from([DType.FLOAT32, DType.FLOAT16]), "dtype")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    top = 1 << (bits - 1)
    table = rng.integers(-top, top, (rows, group * groups)).astype(np.int8)
    scale = rng.standard_normal((rows, groups)).astype(data.draw(st.sampled_from([np.float32, np.float16]), "scale"))
    zero_point = rng.integers(-top, top, (rows, groups)).astype(np.int8) if zeros else None
    shape = data.draw(st.lists(st.integers(0, 3), max_size=3), "ids")
    ids = rng.integers(-2, rows + 2, shape).astype(data.draw(st.sampled_from([np.int64, np.int32]), "id"))
    if ids.size:
        ids.flat[0] = data.draw(st.sampled_from([0, np.iinfo(ids.dtype).max, np.iinfo(ids.dtype).min]))
    chosen = QuantizedEmbeddingAttributes(group, dtype)
    inputs = [table, scale, ids, *([zero_point] if zeros else [])]
    packed: Any = {f"int{bits}": {0}} if bits < 8 else {}
    (result,) = run_op("quantized_embedding", chosen, inputs, **packed)
    (reference,) = OPERATOR.reference(chosen, inputs)
    exact = table.astype(np.float64)
    if zero_point is not None:
        exact -= np.repeat(zero_point, group, axis=1)
    exact = (exact * np.repeat(scale.astype(np.float64), group, axis=1))[np.clip(ids, 0, rows - 1)]
    np.testing.assert_array_equal(reference, exact.astype(np.float32).astype(dtype.numpy))
    np.testing.assert_array_equal(result, reference)


F32, I64 = DType.FLOAT32, DType.INT64
GOOD: list[Any] = [TensorType(DType.INT4, (5, 8)), TensorType(F32, (5, 2)), TensorType(I64, (3,))]


@pytest.mark.parametrize(
    ("slot", "type", "group", "words"),
    [
        (0, TensorType(DType.UINT8, (5, 8)), 4, "int2, int4 or int8"),
        (0, TensorType(DType.INT4, (5,)), 4, "of rank 2"),
        (0, TensorType(DType.INT4, (0, 8)), 4, "scale must be"),
        (1, TensorType(F32, (5, 8)), 4, r"scale must be floating \[5, 2\]"),
        (1, None, 4, "must be there"),
        (2, TensorType(F32, (3,)), 4, "ids"),
        (3, TensorType(F32, (5, 2)), 4, "zero point must be int8"),
        (0, GOOD[0], 3, "3 does not divide"),
        (0, GOOD[0], 0, "0 does not divide"),
    ],
)
def test_operands_that_make_no_sense(slot: int, type: Any, group: int, words: str) -> None:
    assert OPERATOR.infer(QuantizedEmbeddingAttributes(4), GOOD) == (TensorType(F32, (3, 8)),)
    inputs = [*GOOD, None][: max(slot + 1, 3)]
    inputs[slot] = type
    with pytest.raises(OperatorError, match=words):
        OPERATOR.infer(QuantizedEmbeddingAttributes(group), inputs)


def test_tables_too_large_are_refused() -> None:
    wide = [TensorType(DType.INT8, (1 << 20, 1 << 12)), TensorType(F32, (1 << 20, 1)), TensorType(I64, (1,))]
    assert "bytes or elements" in str(ops.supports("quantized_embedding", QuantizedEmbeddingAttributes(1 << 12), wide))
