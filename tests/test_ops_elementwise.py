"""Elementwise operators: references against torch, kernels against references and float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_op
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import ALL, FLOATS, INTS, NUMBERS, Array, assert_same, broadcastable, pairs, random, special

from torchvk import ops, shaders
from torchvk.graph import DType, TensorType
from torchvk.ops import arithmetic, elementwise
from torchvk.ops.codes import DTYPE
from torchvk.ops.elementwise import (
    BINARY,
    UNARY,
    CastAttributes,
    ClampAttributes,
    EluAttributes,
    GeluAttributes,
    LeakyReluAttributes,
)

functional = torch.nn.functional

TORCH_UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{
        name: getattr(torch, name)
        for name in UNARY
        if hasattr(torch, name) and name not in ("clamp", "gelu", "elu", "leaky_relu")
    },
    "silu": functional.silu,
    "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid,
}
TORCH_BINARY = {name: getattr(torch, name) for name in BINARY}

# Units in the last place against the rounded exact value, hence 0.5 more than shaders/float_math.slang says;
# division, square roots and what is made of them: Vulkan's 2.5 ulp for a division and 2 for inversesqrt.
ULPS = {
    **dict.fromkeys(("exp", "log", "log1p", "expm1", "erf"), 2.5),
    **dict.fromkeys(("sin", "cos", "sigmoid", "atan2", "tanh", "sqrt", "rsqrt", "reciprocal", "div"), 3.5),
    **dict.fromkeys(("pow", "silu", "hardswish", "hardsigmoid", "floor_divide"), 4.5),
}
# e^x sigmoid-like factors may be flushed below 2^-126; times |x| < 128 that is less than this.
ABSOLUTE = {"silu": 2.0**-119}


def tolerance(name: str, dtype: str) -> dict[str, float]:
    """float16 results are rounded from a float32 that is some ulps off: at most the neighbour."""
    if name not in ULPS:
        return {}
    return {"ulps": 1.0} if dtype == "float16" else {"ulps": ULPS[name], "absolute": ABSOLUTE.get(name, 0)}


def reference(name: str, attributes: Any, *inputs: Array) -> Array:
    return ops.get(name).reference(attributes, inputs)[0]


def codes() -> dict[str, int]:
    files = [Path(shaders.__file__).with_name(name) for name in ("elementwise.slang", "elementwise_binary.slang")]
    source = "\n".join(file.read_text() for file in files)
    return {name.lower(): int(code) for name, code in re.findall(r"static const uint ([A-Z0-9_]+) = (\d+);", source)}


def test_operation_codes_are_those_of_the_shader() -> None:
    assert codes() == {name: code for table in (UNARY, BINARY) for code, name in enumerate(table)}


def test_dtype_codes_are_those_of_the_shader() -> None:
    source = Path(shaders.__file__).with_name("common.slang").read_text()
    found = re.findall(r"public static const uint (F32|F16|I64|I32|I16|I8|U8|BOOL) = (\d);", source)
    short = {"float32": "F32", "float16": "F16", "uint8": "U8", "bool": "BOOL"}
    want = {short.get(d.value, "I" + d.value[3:]): code for d, code in DTYPE.items()}
    assert {name: int(code) for name, code in found} == want


def claimed(names: tuple[str, ...]) -> list[tuple[str, str]]:
    """Every operator of a table with every dtype that it supports."""
    found = []
    for name in names:
        if name in {operator.name for operator in ops.operators()}:
            found += [(name, dtype.value) for dtype in ops.get(name).dtypes]
    return found


PLAIN_UNARY = [(name, dtype) for name, dtype in claimed(UNARY) if name in TORCH_UNARY]


@pytest.mark.parametrize(("name", "dtype"), PLAIN_UNARY)
def test_unary(name: str, dtype: str) -> None:
    x = np.concatenate([special(dtype), random(dtype, [101])])
    want = TORCH_UNARY[name](torch.from_numpy(x)).numpy()
    # torch computes in float32, silu and its like in several steps.
    assert_same(reference(name, None, x), want, ulps=2.0 if name in ULPS else 0, absolute=ABSOLUTE.get(name, 0))
    (got,) = run_op(name, None, [x])
    assert_same(got, reference(name, None, x), **tolerance(name, dtype))


EXACT: dict[str, Callable[[Array], Array]] = {
    "exp": np.exp,
    "log": np.log,
    "log1p": np.log1p,
    "expm1": np.expm1,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "reciprocal": lambda x: 1 / x,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "erf": arithmetic.erf,
    "sigmoid": arithmetic.sigmoid,
}


@pytest.mark.parametrize("name", EXACT)
def test_accuracy_over_the_whole_range(name: str) -> None:
    generator = np.random.default_rng(1)
    anything = generator.integers(0, 2**32, 30000, np.uint32).view(np.float32)
    usual = [generator.uniform(-scale, scale, 10000).astype(np.float32) for scale in (0.1, 1, 2, 6, 20, 100)]
    near_one = (1 + generator.uniform(-0.01, 0.01, 10000)).astype(np.float32)
    x = np.concatenate([anything, *usual, near_one])
    x = x[~((np.abs(x) < 2.0**-126) & (x != 0))]
    with np.errstate(all="ignore"):
        want = EXACT[name](x.astype(np.float64)).astype(np.float32)
    (got,) = run_op(name, None, [x])
    assert_same(got, want, ulps=ULPS[name])


@pytest.mark.parametrize(("name", "dtype"), claimed(BINARY))
def test_binary(name: str, dtype: str) -> None:
    a, b = pairs(dtype)
    if dtype in INTS:
        if name in ("floor_divide", "remainder", "fmod"):
            check_integer_division(name, a, b)
            return
        if name == "pow":
            b = np.abs(b.astype(np.float64)).clip(0, 100).astype(b.dtype)
    with np.errstate(all="ignore"):
        want = TORCH_BINARY[name](torch.from_numpy(a), torch.from_numpy(b)).numpy()
    assert_same(reference(name, None, a, b), want, ulps=1.0 if name in ULPS else 0)
    (got,) = run_op(name, None, [a, b])
    assert_same(got, reference(name, None, a, b), **tolerance(name, dtype))
    # The same shape, not broadcast, and many values.
    a, b = random(dtype, [23, 7]), random(dtype, [23, 7], seed=1)
    (got,) = run_op(name, None, [a, b])
    assert_same(got, reference(name, None, a, b), **tolerance(name, dtype))


def check_integer_division(name: str, a: Array, b: Array) -> None:
    """Against torch where it divides; by zero it raises, here it gives 0, and the least value by -1 wraps."""
    (got,) = run_op(name, None, [a, b])
    assert_same(got, reference(name, None, a, b))
    a, b = np.broadcast_arrays(a, b)
    assert (got[b == 0] == 0).all()
    usual = (b != 0) & ((b.astype(np.float64) != -1) | (a != np.iinfo(a.dtype).min))
    want = TORCH_BINARY[name](torch.from_numpy(a[usual].copy()), torch.from_numpy(b[usual].copy())).numpy()
    assert_same(got[usual], want)


@pytest.mark.parametrize("dtype", INTS)
def test_integer_power(dtype: str) -> None:
    """Wrapping, and negative exponents."""
    a = np.concatenate([special(dtype), random(dtype, [20])])[:, None]
    low = -3 if dtype != "uint8" else 0
    b = np.arange(low, 12).astype(dtype)[None, :]
    want = torch.pow(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    assert_same(reference("pow", None, a, b), want)
    assert_same(run_op("pow", None, [a, b])[0], want)


def test_power_accuracy() -> None:
    generator = np.random.default_rng(2)
    a = np.concatenate([generator.uniform(0, 3, 30000), 10 ** generator.uniform(-30, 30, 30000)]).astype(np.float32)
    b = np.concatenate([generator.uniform(-90, 90, 30000), generator.uniform(-3, 3, 30000)]).astype(np.float32)
    with np.errstate(all="ignore"):
        want = np.power(a.astype(np.float64), b.astype(np.float64)).astype(np.float32)
    assert_same(run_op("pow", None, [a, b])[0], want, ulps=ULPS["pow"])


def test_float_remainders_are_exact_for_any_operands() -> None:
    generator = np.random.default_rng(3)
    a, b = generator.integers(0, 2**32, (2, 20000), np.uint32).view(np.float32)
    # remainder adds b where the signs differ; a denormal sum or operand may be flushed there (seen on an H200).
    for name, absolute in (("fmod", 0), ("remainder", 2.0**-126)):
        assert_same(run_op(name, None, [a, b])[0], reference(name, None, a, b), absolute=absolute)


def test_comparisons_see_denormals() -> None:
    """Devices may flush denormals in arithmetic; order and equality are of the values as stored."""
    a = np.array([1e-42, -1e-42, 1e-42, 0.0, -0.0], np.float32)
    b = np.array([0.0, 0.0, 2e-42, -0.0, 1e-45], np.float32)
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        assert_same(run_op(name, None, [a, b])[0], reference(name, None, a, b))
    assert run_op("maximum", None, [a, b])[0].tolist() == np.maximum(a, b).tolist()
    assert run_op("cast", CastAttributes(DType.BOOL), [a])[0].tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("source", ALL)
def test_cast(source: str, target: str) -> None:
    x = np.concatenate([special(source), random(source, [50])])
    if source in FLOATS:
        x = np.concatenate([x, np.array([300, -129, 65504, 1e-7, 6e-8, 1.9, -1.9, 2.5], source)])
    attributes = CastAttributes(DType(target))
    want = reference("cast", attributes, x)
    assert_same(run_op("cast", attributes, [x])[0], want)
    if source in FLOATS and target not in FLOATS:
        # C leaves the rest open.
        defined = np.isfinite(x) & (np.abs(x.astype(np.float64)) < 2**31)
        x, want = x[defined], want[defined]
    assert_same(want, torch.from_numpy(x).to(getattr(torch, target)).numpy())


def test_float_to_integer_outside_of_the_range() -> None:
    x = np.array([np.nan, np.inf, -np.inf, 2.0**63, -(2.0**63), 2.0**31, -(2.0**31), -3e9, 300, -129], np.float32)
    most, least = 2**63 - 1, -(2**63)
    want = {
        "int64": [0, most, least, most, least, 2**31, -(2**31), -3000000000, 300, -129],
        "int32": [0, *[2**31 - 1, -(2**31)] * 3, -(2**31), 300, -129],
        "int8": [0, *[-1, 0] * 3, 0, 44, 127],
        "uint8": [0, *[255, 0] * 3, 0, 44, 127],
    }
    for dtype, values in want.items():
        attributes = CastAttributes(DType(dtype))
        assert reference("cast", attributes, x).tolist() == values
        assert run_op("cast", attributes, [x])[0].tolist() == values


def test_every_float16_survives_float32() -> None:
    """All 65536 patterns there and back: half_to_float and half_bits."""
    x = np.arange(65536, dtype=np.uint16).view(np.float16)
    (wide,) = run_op("cast", CastAttributes(DType.FLOAT32), [x])
    np.testing.assert_array_equal(wide, x.astype(np.float32))
    (back,) = run_op("cast", CastAttributes(DType.FLOAT16), [wide])
    np.testing.assert_array_equal(back[~np.isnan(x)].view(np.uint16), x[~np.isnan(x)].view(np.uint16))
    assert np.isnan(back[np.isnan(x)]).all()


def test_float32_to_float16_rounds_to_nearest_even() -> None:
    """Every midpoint between neighbours, and the float32 values beside it; random patterns."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = (halves[:-1] + halves[1:]) / 2
    above, below = np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(0))
    anything = np.random.default_rng(4).integers(0, 2**32, 50000, np.uint32).view(np.float32)
    x = np.concatenate([middle, -middle, above, below, np.array([65519.99, 65520, 65536], np.float32), anything])
    x = x[~np.isnan(x)]
    with np.errstate(all="ignore"):
        want = x.astype(np.float16)
    (got,) = run_op("cast", CastAttributes(DType.FLOAT16), [x])
    np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))


def test_int64_to_float32_rounds_once() -> None:
    generator = np.random.default_rng(5)
    spread = generator.integers(-(2**63), 2**63 - 1, 20000) >> generator.integers(0, 63, 20000)
    ties = (generator.integers(2**23, 2**24, 5000) * 2 + 1) << generator.integers(0, 38, 5000)
    x = np.concatenate([spread, ties, ties + 1, ties - 1, -ties, special("int64")])
    np.testing.assert_array_equal(run_op("cast", CastAttributes(DType.FLOAT32), [x])[0], x.astype(np.float32))


def test_float32_to_int64_truncates() -> None:
    generator = np.random.default_rng(6)
    x = (generator.normal(0, 1, 20000) * 2.0 ** generator.integers(-2, 62, 20000)).astype(np.float32)
    np.testing.assert_array_equal(run_op("cast", CastAttributes(DType.INT64), [x])[0], x.astype(np.int64))


def one_by_one(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Not by vectors: of infinity torch's vector code makes NaN on some processors and infinity on others."""
    return lambda x: torch.cat([function(value[None]) for value in x])


ACTIVATIONS: list[tuple[str, Any, Callable[[torch.Tensor], torch.Tensor], float, float]] = [
    # name, attributes, torch, ulps, absolute error over |x|: gelu drops 1 + erf below erfc(4) / 2 = 2^-27; eager
    # computes 1 + erf and 1 + tanh by cancellation, which is worth 2^-24 there
    ("gelu", GeluAttributes("none"), one_by_one(functional.gelu), 4, 2**-23),
    ("gelu", GeluAttributes("tanh"), lambda x: functional.gelu(x, approximate="tanh"), 4, 2**-23),
    ("leaky_relu", LeakyReluAttributes(0.3), lambda x: functional.leaky_relu(x, 0.3), 1, 0),
    ("elu", EluAttributes(1.5), lambda x: functional.elu(x, 1.5), 4, 0),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("name", "attributes", "eager", "ulps", "absolute"), ACTIVATIONS)
def test_activation(
    name: str, attributes: Any, eager: Callable[[torch.Tensor], torch.Tensor], ulps: float, absolute: float, dtype: str
) -> None:
    usual = np.random.default_rng(7).uniform(-12, 12, 2000).astype(dtype)
    x = np.concatenate([special(dtype), usual])
    want = eager(torch.from_numpy(x)).numpy()
    size = float(np.abs(x[np.isfinite(x)]).max())
    ulps = 1 if dtype == "float16" else ulps
    assert_same(reference(name, attributes, x), want, ulps, absolute * size)
    (got,) = run_op(name, attributes, [x])
    assert_same(got, reference(name, attributes, x), ulps, absolute * size)
    small = np.abs(usual) < 4
    assert_same(got[special(dtype).size :][small], reference(name, attributes, usual[small]), ulps, absolute * 4)


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("bounds", [(None, 3), (-2, None), (1, 5), (4, 2)])
def test_clamp(dtype: str, bounds: tuple[int | None, int | None]) -> None:
    low, high = bounds
    if dtype == "uint8" and low is not None:
        low = abs(low)
    x = np.concatenate([special(dtype), random(dtype, [9])])
    attributes = ClampAttributes(low, high)
    want = torch.clamp(torch.from_numpy(x), low, high).numpy()
    assert_same(reference("clamp", attributes, x), want)
    assert_same(run_op("clamp", attributes, [x])[0], want)


def test_clamp_to_wide_bounds() -> None:
    x = special("int64")
    attributes = ClampAttributes(-(2**40), 2**33 + 1)
    assert_same(run_op("clamp", attributes, [x])[0], np.clip(x, -(2**40), 2**33 + 1))
    y = special("float32")
    for bounds in ((float("nan"), None), (float("-inf"), float("inf")), (-0.3, 0.7)):
        attributes = ClampAttributes(*bounds)
        # A bound of NaN makes all NaN, as it does in torch from 2.12 on.
        nothing = np.isnan(bounds[0])
        want = np.full_like(y, np.nan) if nothing else torch.clamp(torch.from_numpy(y), *bounds).numpy()
        assert_same(reference("clamp", attributes, y), want)
        assert_same(run_op("clamp", attributes, [y])[0], want)


@pytest.mark.parametrize("dtype", ALL)
def test_where(dtype: str) -> None:
    condition = random("bool", [5, 1, 7])
    a, b = random(dtype, [3, 1]), random(dtype, [5, 3, 7], seed=1)
    want = torch.where(*(torch.from_numpy(x) for x in (condition, a, b))).numpy()
    assert_same(reference("where", None, condition, a, b), want)
    assert_same(run_op("where", None, [condition, a, b])[0], want)


@pytest.mark.tier
@settings(max_examples=40, deadline=None)
@given(broadcastable(3), st.sampled_from(ALL))
def test_broadcasting(operand_shapes: list[tuple[int, ...]], dtype: str) -> None:
    """Any shapes that broadcast, rank 0 to 8, empty ones included."""
    condition, a, b = (
        random(kind, shape, seed)
        for seed, (kind, shape) in enumerate(zip(("bool", dtype, dtype), operand_shapes, strict=True))
    )
    assert_same(run_op("where", None, [condition, a, b])[0], np.where(condition, a, b))
    assert_same(run_op("lt", None, [a, b])[0], np.asarray(a < b))
    assert_same(run_op("add", None, [a, b])[0], np.asarray(a + b))


@pytest.mark.tier
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 70), st.sampled_from(ALL), st.sampled_from(ALL))
def test_any_number_of_elements(count: int, source: str, target: str) -> None:
    """Tails of units, where the output's and the operand's units differ in size."""
    x = random(source, [count])
    if source in FLOATS and target in INTS:
        x = np.abs(x)
    attributes = CastAttributes(DType(target))
    assert_same(run_op("cast", attributes, [x])[0], reference("cast", attributes, x))
    assert_same(run_op("logical_not", None, [x])[0], np.logical_not(x))


def test_kernels_are_the_same_at_every_tier() -> None:
    types = [TensorType(DType.FLOAT16, (3, 5)), TensorType(DType.FLOAT16, (5,))]
    capabilities = [
        ops.Capabilities(tier, "discrete", 32, 1024, (1024, 1024, 64), (65535, 65535, 65535), 49152, 2**32 - 1)
        for tier in (0, 1, 2)
    ]
    operator = ops.get("add")
    chosen = {operator.kernels(ops.NoAttributes(), types, types[:1], c) for c in capabilities}
    assert len(chosen) == 1


def test_wrong_operands_are_refused_in_words() -> None:
    def type(dtype: str, *shape: int) -> TensorType:
        return TensorType(DType(dtype), shape)

    cases: list[tuple[str, Any, list[TensorType | None], str]] = [
        ("exp", None, [type("int32", 2)], "input is int32, supported are float32, float16"),
        ("exp", None, [], "takes 1 input, got 0"),
        ("exp", None, [None], "input 0 is missing"),
        ("add", None, [type("int32", 2), type("int64", 2)], "inputs must have one dtype"),
        ("add", None, [type("int32", 2), type("int32", 3)], "do not broadcast"),
        ("add", None, [type("int4", 2), type("int4", 2)], "int4"),
        ("sub", None, [type("bool", 2), type("bool", 2)], "input is bool"),
        ("div", None, [type("int32", 2), type("int32", 2)], "input is int32"),
        ("bitwise_and", None, [type("float32", 2), type("float32", 2)], "input is float32"),
        ("where", None, [type("uint8", 2), type("int32", 2), type("int32", 2)], "the condition is uint8"),
        ("clamp", ClampAttributes(0.5, None), [type("int32", 2)], "bound 0.5"),
        ("clamp", ClampAttributes(0, 300), [type("uint8", 2)], "bound 300"),
        ("cast", CastAttributes(DType.INT4), [type("int8", 2)], "int4"),
    ]
    for name, attributes, inputs, words in cases:
        reason = ops.supports(name, attributes, inputs)
        assert reason is not None
        assert words in reason


def test_domains_cover_every_dtype() -> None:
    assert {elementwise.domain(dtype) for dtype in elementwise.ALL} == {"float", "int", "long"}
