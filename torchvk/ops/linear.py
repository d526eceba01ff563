"""Matrix products in floating point: ``matmul`` and ``linear``. float32 accumulation always."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torchvk.graph import DType, TensorType
from torchvk.ops.epilogue import Epilogue, apply_epilogue, epilogue_constants
from torchvk.ops.linear_kernels import Product, Slots, product_variants
from torchvk.ops.operator import Array, Capabilities, Operator, Types, Variants, expect, register

FLOATS = (DType.FLOAT32, DType.FLOAT16)


@dataclass(frozen=True)
class MatmulAttributes:
    """Which operands have their last two dimensions swapped."""

    transpose_a: bool = False
    transpose_b: bool = False


@dataclass(frozen=True)
class LinearAttributes:
    """epilogue: the function that follows product and bias; a residual is added to that (torchvk.ops.epilogue)."""

    epilogue: Epilogue = "none"


# matmul


def _matmul_sizes(attributes: MatmulAttributes, a: TensorType, b: TensorType) -> tuple[int, int, int, int]:
    """M, K of A, K of B, N."""
    m, ka = a.shape[-2:][::-1] if attributes.transpose_a else a.shape[-2:]
    kb, n = b.shape[-2:][::-1] if attributes.transpose_b else b.shape[-2:]
    return m, ka, kb, n


def _infer_matmul(attributes: MatmulAttributes, inputs: Types) -> tuple[TensorType, ...]:
    expect(len(inputs) == 2, f"matmul takes 2 operands, {len(inputs)} were given")
    a, b = inputs
    if a is None or b is None:
        expect(False, "matmul takes 2 operands, one is missing")
        raise AssertionError
    expect(
        a.dtype in FLOATS and b.dtype is a.dtype,
        f"matmul takes float32 or float16 operands of one dtype, got {a} and {b}",
    )
    expect(len(a.shape) >= 2 and len(b.shape) >= 2, f"matmul takes operands of rank 2 and more, got {a} and {b}")
    m, ka, kb, n = _matmul_sizes(attributes, a, b)
    expect(ka == kb, f"matmul of {a} and {b}: the inner sizes {ka} and {kb} differ")
    try:
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except ValueError:
        expect(False, f"matmul of {a} and {b}: the leading dimensions do not broadcast")
    return (TensorType(a.dtype, (*batch, m, n)),)


def _batch(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> list[tuple[int, int, int]]:
    """Batch dimensions as (size, stride in A, stride in B), neighbours merged where both operands allow it."""
    merged: list[tuple[int, int, int]] = []
    a = (*(1,) * (len(shape) - len(a)), *a)
    b = (*(1,) * (len(shape) - len(b)), *b)
    stride_a = stride_b = 1
    for size, size_a, size_b in zip(reversed(shape), reversed(a), reversed(b), strict=True):
        if size == 1:
            continue
        here = (size, stride_a if size_a > 1 else 0, stride_b if size_b > 1 else 0)
        stride_a *= size_a
        stride_b *= size_b
        if merged:
            inner, inner_a, inner_b = merged[0]
            if here[1] == inner_a * inner and here[2] == inner_b * inner:
                merged[0] = (inner * size, inner_a, inner_b)
                continue
        merged.insert(0, here)
    return merged


def _matmul_product(attributes: MatmulAttributes, a: TensorType, b: TensorType, y: TensorType) -> Product:
    m, k, _, n = _matmul_sizes(attributes, a, b)
    batch = _batch(y.shape[:-2], a.shape[:-2], b.shape[:-2])
    if len(batch) == 1 and not attributes.transpose_a and batch[0][1] == 1 and batch[0][2] == 0:
        # One B for all: the rows of all A are the rows of one product.
        m *= batch[0][0]
        batch = []
    return Product(
        m,
        n,
        k,
        a.dtype,
        attributes.transpose_a,
        attributes.transpose_b,
        tuple(size for size, _, _ in batch),
        tuple(stride for _, stride, _ in batch),
        tuple(stride for _, _, stride in batch),
    )


def _matmul_variants(
    attributes: MatmulAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Variants:
    return product_variants(_matmul_case(attributes, inputs, outputs), Slots(), capabilities)


def _matmul_case(attributes: MatmulAttributes, inputs: Types, outputs: Sequence[TensorType]) -> Product:
    a, b = inputs
    assert a is not None
    assert b is not None
    return _matmul_product(attributes, a, b, outputs[0])


def _matmul_reference(attributes: MatmulAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    a, b = inputs
    assert a is not None
    assert b is not None
    # float16 is multiplied and summed in float32 and rounded once, as torch does.
    left, right = a.astype(np.float32), b.astype(np.float32)
    left = left.swapaxes(-1, -2) if attributes.transpose_a else left
    right = right.swapaxes(-1, -2) if attributes.transpose_b else right
    with np.errstate(all="ignore"):
        return (np.matmul(left, right).astype(a.dtype),)


MATMUL = register(
    Operator(
        name="matmul",
        summary="Matrix product of [*, M, K] and [*, K, N] with broadcast leading dimensions, either side transposed",
        attributes=MatmulAttributes,
        infer=_infer_matmul,
        reference=_matmul_reference,
        variants=_matmul_variants,
        dtypes=FLOATS,
    )
)


# linear


def _infer_linear(attributes: LinearAttributes, inputs: Types) -> tuple[TensorType, ...]:
    expect(
        2 <= len(inputs) <= 4,
        f"linear takes an input, a weight and optionally a bias and a residual, {len(inputs)} were given",
    )
    x, weight, bias, residual = (*inputs, None, None)[:4]
    if x is None or weight is None:
        expect(False, "linear needs an input and a weight")
        raise AssertionError
    expect(
        x.dtype in FLOATS and weight.dtype is x.dtype,
        f"linear takes float32 or float16, input and weight of one dtype, got {x} and {weight}",
    )
    expect(len(x.shape) >= 1, "linear takes an input of rank 1 and more, got a scalar")
    expect(len(weight.shape) == 2, f"linear takes a weight [N, K], got {weight}")
    n, k = weight.shape
    expect(x.shape[-1] == k, f"linear of {x} with weight {weight}: the inner sizes {x.shape[-1]} and {k} differ")
    if bias is not None:
        expect(bias == TensorType(x.dtype, (n,)), f"linear of {x} takes a bias {x.dtype.value}[{n}], got {bias}")
    output = TensorType(x.dtype, (*x.shape[:-1], n))
    expect(residual is None or residual == output, f"linear takes a residual like its result {output}, got {residual}")
    return (output,)


def _linear_variants(
    attributes: LinearAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Variants:
    return product_variants(*_linear_case(attributes, inputs), capabilities)


def _linear_case(attributes: LinearAttributes, inputs: Types) -> tuple[Product, Slots]:
    x, weight, bias, residual = (*inputs, None, None)[:4]
    assert x is not None
    assert weight is not None
    product = Product(
        math.prod(x.shape[:-1]), weight.shape[0], weight.shape[1], x.dtype, transpose_b=True, constant_b=weight.constant
    )
    ending = epilogue_constants(attributes.epilogue, residual)
    slots = Slots(bias=None if bias is None else 2, residual=None if residual is None else 3, ending=ending)
    return product, slots


def _linear_reference(attributes: LinearAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    x, weight, bias, residual = (*inputs, None, None)[:4]
    assert x is not None
    assert weight is not None
    with np.errstate(all="ignore"):
        y = np.matmul(x.astype(np.float32), weight.astype(np.float32).T)
        if bias is not None:
            y = y + bias.astype(np.float32)
        return (apply_epilogue(attributes.epilogue, y, residual).astype(x.dtype),)


LINEAR = register(
    Operator(
        name="linear",
        summary="f(x [*, K] times weight [N, K] transposed, plus bias [N]) + residual; f: relu, gelu, silu or nothing",
        attributes=LinearAttributes,
        infer=_infer_linear,
        reference=_linear_reference,
        variants=_linear_variants,
        dtypes=FLOATS,
    )
)
