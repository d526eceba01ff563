"""Passes that make one operator of several, on drafts written by hand: attention, epilogues, residuals, sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sketches import Sketch, check, number

from torchvk.graph import DType
from torchvk.lowering.draft import Value, constant
from torchvk.lowering.passes import optimize
from torchvk.lowering.passes.quantized_sum import fuse_quantized_sums
from torchvk.lowering.passes.sums import fuse_sums
from torchvk.ops.quantized_sum import added_by

# attention


def heads(s: Sketch, slot: int, batch: int, tokens: int) -> Value:
    """Input ``slot`` [batch · tokens, 4 · 8] as a model splits it: [batch, 4, tokens, 8]."""
    split = s.op("reshape", s.draft.inputs[slot], shape=[batch, tokens, 4, 8])
    return s.op("permute", split, dims=[0, 2, 1, 3])


def safe_softmax(s: Sketch, scores: Value) -> Value:
    """As scaled_dot_product_attention is exported."""
    empty = s.op("eq", scores, number(-np.inf))
    some = s.op("any", s.op("logical_not", empty), dims=[3], keepdim=True)
    return s.op("where", s.op("logical_not", some), number(0), s.op("softmax", scores, dim=3))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention(batch: int, safe: bool, early: bool, masked: bool) -> None:
    """``early``: q and k are scaled, not their product; the products run on matrices [batch · heads, tokens, 8]."""
    s = Sketch((batch * 6, 32), (batch * 5, 32), (batch * 5, 32), (batch, 1, 1, 5))
    q, k, v = heads(s, 0, batch, 6), heads(s, 1, batch, 5), heads(s, 2, batch, 5)
    k = s.op("permute", k, dims=[0, 1, 3, 2])
    if early:
        q, k = s.op("mul", q, number(0.5)), s.op("mul", k, number(0.7))
        q, k, v = (s.op("reshape", x, shape=[batch * 4, *x.shape[-2:]]) for x in (q, k, v))
    scores = s.op("matmul", q, k)
    scores = s.op("reshape", scores, shape=[batch, 4, 6, 5]) if early else s.op("div", scores, number(2.0))
    if masked:
        scores = s.op("add", scores, s.op("expand", s.draft.inputs[3], shape=[batch, 1, 6, 5]))
    weights = safe_softmax(s, scores) if safe else s.op("softmax", scores, dim=3)
    if early:
        weights = s.op("reshape", weights, shape=[batch * 4, 6, 5])
    y = s.op("reshape", s.op("matmul", weights, v), shape=[batch, 4, 6, 8])
    y = s.op("reshape", s.op("permute", y, dims=[0, 2, 1, 3]), shape=[batch * 6, 32])
    draft = check(s.returns(y), optimize, "reshape", "reshape", "reshape", "attention", "reshape")
    attributes = draft.calls[3].attributes
    assert attributes.masked_rows == ("zero" if safe else "nan")
    assert attributes.scale == pytest.approx(0.35 if early else 0.5)


def test_attention_of_one_head() -> None:
    s = Sketch((2, 6, 8), (2, 5, 8), (2, 5, 8))
    q, k, v = s.draft.inputs
    weights = s.op("softmax", s.op("matmul", q, k, transpose_b=True), dim=2)
    check(s.returns(s.op("matmul", weights, v)), optimize, "reshape", "reshape", "reshape", "attention", "reshape")


def test_attention_weights_that_are_read_stay() -> None:
    s = Sketch((2, 6, 8), (2, 5, 8), (2, 5, 8))
    q, k, v = s.draft.inputs
    weights = s.op("softmax", s.op("matmul", q, k, transpose_b=True), dim=2)
    check(s.returns(s.op("matmul", weights, v), weights), optimize, "matmul", "softmax", "matmul")


@pytest.mark.parametrize("dim", [1, 2])
def test_what_only_looks_like_attention_stays(dim: int) -> None:
    """A softmax over the wrong dimension; a scale after the mask."""
    s = Sketch((2, 5, 8), (2, 5, 8), (2, 5, 8), (5, 5))
    q, k, v, mask = s.draft.inputs
    scores = s.op("mul", s.op("add", s.op("matmul", q, k, transpose_b=True), mask), number(2.0))
    weights = s.op("softmax", scores, dim=dim)
    check(s.returns(s.op("matmul", weights, v)), optimize, "matmul", "add", "mul", "softmax", "matmul")


# epilogues


@pytest.mark.parametrize("name", ["relu", "gelu", "gelu_tanh", "silu", "silu in parts"])
@pytest.mark.parametrize("residual", [False, True])
def test_epilogue(name: str, residual: bool) -> None:
    s = Sketch((6, 8), (2, 3, 5))
    weight = constant(np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32))
    bias = constant(np.arange(5, dtype=np.float32))
    y = s.op("reshape", s.op("linear", s.draft.inputs[0], weight), shape=[2, 3, 5])
    y = s.op("add", y, bias)
    if name == "silu in parts":
        y = s.op("mul", y, s.op("sigmoid", y))
    elif name == "gelu_tanh":
        y = s.op("gelu", y, approximate="tanh")
    else:
        y = s.op(name, y)
    expected = ["linear", "reshape"]
    if residual:
        y = s.op("add", s.draft.inputs[1], y)
        expected.insert(0, "reshape")
    draft = check(s.returns(y), optimize, *expected)
    (layer,) = [call for call in draft.calls if call.op == "linear"]
    assert layer.attributes.epilogue == name.split()[0]
    assert [value is not None for value in layer.inputs] == [True, True, True, residual]


def test_layers_with_other_readers_keep_their_results() -> None:
    s = Sketch((6, 8), (6, 5))
    weight = constant(np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32))
    y = s.op("linear", s.draft.inputs[0], weight)
    check(s.returns(s.op("relu", y), s.op("add", y, s.draft.inputs[1])), optimize, "linear", "relu", "add")
    s = Sketch((6, 8), (6, 5))
    y = s.op("add", s.op("linear", s.draft.inputs[0], weight), s.draft.inputs[1])
    check(s.returns(s.op("relu", y), y), optimize, "linear", "relu")


@pytest.mark.parametrize(
    ("inner", "outer", "epilogue", "left"),
    [
        ("none", "relu", "sum_relu", ()),
        ("none", "silu", "none", ("silu",)),
        ("gelu", "relu", "gelu", ("relu",)),
        ("relu", "relu", "relu", ("relu",)),
    ],
)
def test_activations_after_a_residual(inner: str, outer: str, epilogue: str, left: tuple[str, ...]) -> None:
    s = Sketch((6, 8), (2, 3, 5))
    weight = constant(np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32))
    y = s.op("linear", s.draft.inputs[0], weight)
    y = s.op("reshape", y if inner == "none" else s.op(inner, y), shape=[2, 3, 5])
    y = s.op("add", s.draft.inputs[1], y)
    draft = check(s.returns(s.op(outer, y)), optimize, "reshape", "linear", "reshape", *left)
    assert draft.calls[1].attributes.epilogue == epilogue


@pytest.mark.parametrize("outer", ["clamp", "hardswish"])
def test_activations_after_a_residual_of_a_quantized_convolution(outer: str) -> None:
    """They are of the sum, not of what is added."""
    s = Sketch((1, 4, 3, 8), (1, 4, 2, 5))
    weight = constant(np.arange(80).reshape(5, 1, 2, 8).astype(np.int8) - 40)
    ones = {"stride": [1, 1], "dilation": [1, 1], "input_dilation": [1, 1], "padding": [0] * 4}
    y = s.op("quantized_conv", s.draft.inputs[0], weight, constant(np.full(5, 0.1, np.float32)), **ones)
    given = {"min": 0.0, "max": 6.0} if outer == "clamp" else {}
    result = s.op(outer, s.op("add", y, s.draft.inputs[1]), **given)
    check(s.returns(result), optimize, "quantized_conv", outer)


def test_one_residual_a_layer() -> None:
    s = Sketch((6, 8), (6, 5), (6, 5))
    weight = constant(np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32))
    y = s.op("add", s.op("linear", s.draft.inputs[0], weight), s.draft.inputs[1])
    check(s.returns(s.op("add", y, s.draft.inputs[2])), optimize, "linear", "add")
    s = Sketch((6, 8))
    y = s.op("linear", s.draft.inputs[0], weight)
    check(s.returns(s.op("add", y, y)), optimize, "linear", "add")


# 8-bit residuals


@pytest.mark.parametrize(
    ("change", "left"),
    [
        ({}, ()),
        ({"swap": True}, ()),
        ({"op": "sub"}, ("quantized_arithmetic",)),
        ({"scale": 0.25}, ("quantized_arithmetic",)),
        ({"shape": (1, 1, 5)}, ("quantized_arithmetic",)),
        ({"read": True}, ("quantized_arithmetic",)),
    ],
)
def test_sums_of_8_bit_residuals(change: dict[str, Any], left: tuple[str, ...]) -> None:
    shape = change.get("shape", (2, 3, 5))
    s = Sketch((6, 8), shape, dtype=DType.INT8)
    x, residual = s.draft.inputs
    weight, scale = constant(np.arange(-20, 20, dtype=np.int8).reshape(5, 8)), constant(np.ones((5, 1), np.float32))
    q = s.op("quantized_linear", x, weight, scale, group_size=8, activation="static", output_dtype="int8")
    y = s.op("reshape", q, shape=[2, 3, 5])
    own, other = (change.get("scale", 1.0), 0), (0.7, 3)
    operands = ((residual, y), (other, own)) if change.get("swap") else ((y, residual), (own, other))
    given = {
        f"{name}_{key}": v
        for name, pair in zip(("input", "other"), operands[1], strict=True)
        for key, v in zip(("scale", "zero_point"), pair, strict=True)
    }
    output = {
        "output_dtype": "uint8",
        "output_scale": 0.9,
        "output_zero_point": 99,
        "output_min": 90,
        "output_max": 110,
    }
    total = s.op("quantized_arithmetic", *operands[0], operation=change.get("op", "add"), **given, **output)
    results = (total, q) if change.get("read") else (total,)
    views = ("quantized_linear", "reshape") if left else ("reshape", "quantized_linear", "reshape")
    draft = check(s.returns(*results), fuse_quantized_sums, *views, *left)
    layer = next(call for call in draft.calls if call.op == "quantized_linear").attributes
    added = added_by(layer)
    if left:
        assert added is None
    else:
        assert (layer.output_dtype, added.input_scale, added.other_scale, added.output_max) == ("int8", 1.0, 0.7, 110)


# sums


def test_constants_that_are_added_in_turn_become_one() -> None:
    s = Sketch((2, 3, 4))
    rng = np.random.default_rng(1)
    a, b = (constant(rng.standard_normal(shape).astype(np.float32)) for shape in ((1, 3, 4), (4,)))
    y = s.op("add", b, s.op("add", s.draft.inputs[0], a))
    check(s.returns(s.op("exp", y)), fuse_sums, "add", "exp")


def test_constants_of_sums_that_are_read_stay() -> None:
    s = Sketch((3, 4))
    a = constant(np.ones(4, np.float32))
    y = s.op("add", s.draft.inputs[0], a)
    check(s.returns(y, s.op("add", y, a)), fuse_sums, "add", "add")


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("broadcast", [False, True])
def test_weighted_mean(keepdim: bool, broadcast: bool) -> None:
    """As sentence encoders pool: tokens by their mask."""
    s = Sketch((2, 5, 4), (1 if broadcast else 2, 5, 1))
    x, w = s.draft.inputs
    y = s.op("sum", s.op("mul", w, x), dims=[1], keepdim=keepdim)
    expected = ["reshape", "matmul"] + ([] if keepdim else ["reshape"])
    check(s.returns(y), fuse_sums, *expected)


@pytest.mark.parametrize(("dim", "shape"), [(2, (2, 5, 1)), (1, (2, 5, 4)), (1, (2, 1, 4))])
def test_other_sums_of_products_stay(dim: int, shape: tuple[int, ...]) -> None:
    s = Sketch((2, 5, 4), shape)
    check(s.returns(s.op("sum", s.op("mul", *s.draft.inputs), dims=[dim])), fuse_sums, "mul", "sum")


@pytest.mark.parametrize("dim", [0, 1])
def test_normalize(dim: int) -> None:
    s = Sketch((3, 4))
    x = s.op("exp", s.draft.inputs[0])
    length = s.op("sqrt", s.op("sum", s.op("mul", x, x), dims=[dim], keepdim=True))
    y = s.op("div", x, s.op("expand", s.op("clamp", length, min=1e-12), shape=[3, 4]))
    draft = check(s.returns(y), optimize, "exp", "l2_normalize")
    assert (draft.calls[1].attributes.dim, draft.calls[1].attributes.eps) == (dim, 1e-12)


def test_division_by_another_length_stays() -> None:
    s = Sketch((3, 4), (3, 4))
    x, other = s.draft.inputs
    length = s.op("sqrt", s.op("sum", s.op("mul", other, other), dims=[1], keepdim=True))
    y = s.op("div", x, s.op("clamp", length, min=1e-12))
    check(s.returns(y), optimize, "mul", "sum", "sqrt", "clamp", "div")
