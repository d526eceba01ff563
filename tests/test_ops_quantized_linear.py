"""quantized_linear: against float64, against the eager torchao and PT2E modules, and its choice of kernels."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from harness import check_plan, one_node_graph, run_graph, run_op
from hypothesis import given, settings
from hypothesis import strategies as st
from spirv import contract_errors
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.quant_api import (
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    quantize_,
)

from torchvk import ops
from torchvk.graph import DType, TensorType, unpack_int4
from torchvk.graph.build import GraphBuilder
from torchvk.ops import Capabilities, OperatorError
from torchvk.ops.quantization import quantize
from torchvk.ops.quantized_linear import UNIT, Packing, QuantizedLinearAttributes, choose
from torchvk.runtime.device import PhysicalDevice, open_device
from torchvk.runtime.device import max_tier as tier_cap
from torchvk.runtime.plan import make_plan

Array = np.ndarray[Any, Any]
OPERATOR = ops.get("quantized_linear")
DTYPES = (np.float32, np.float16)
EPSILON = {np.float32: 2.0**-24, np.float16: 2.0**-11}  # half a unit in the last place, of 1


def attributes(group_size: int, activation: str = "none", dtype: Any = np.float32, **more: Any) -> Any:
    """With torchao's default eps, as the lowering gives it."""
    return QuantizedLinearAttributes(
        **{"group_size": group_size, "activation": activation, "eps": float(np.finfo(dtype).tiny), **more}
    )


def operands(
    rng: np.random.Generator, shape: tuple[int, ...], n: int, group: int, bits: int, dtype: Any, bias: Any = None
) -> list[Array | None]:
    """x, weight, scale and bias (of that dtype, or None); the extremes of the weights included."""
    k = shape[-1]
    top = 1 << (bits - 1)
    weight = rng.integers(-top, top, (n, k)).astype(np.int8)
    weight[0, 0], weight[-1, -1] = -top, top - 1
    scale = (0.5 + rng.random((n, k // group))).astype(dtype) / dtype(top * k**0.5)
    x = rng.standard_normal(shape).astype(dtype)
    return [x, weight, scale, None if bias is None else rng.standard_normal(n).astype(bias)]


def expected(chosen: Any, inputs: list[Array | None]) -> tuple[Array, Array]:
    """The result in float64 from the quantized operands, and how far float32 arithmetic may be from it.

    A sum of t terms, each rounded a few times, is off by at most (t + few) · 2^-24 · Σ |terms|, in any order.
    Terms: groups with quantized activations (their sums are exact), else columns.
    """
    x, weight, scale, bias = inputs
    assert x is not None
    assert weight is not None
    assert scale is not None
    rows = x.reshape(-1, x.shape[-1])
    w = weight.astype(np.float64) * np.repeat(scale.astype(np.float64), chosen.group_size, axis=1)
    terms = weight.shape[1]
    values = rows.astype(np.float64)
    if chosen.scheme is not None:
        q, row_scale, zero_point = quantize(rows, chosen.scheme)
        values = (q - zero_point) * row_scale.astype(np.float64)
        # GEMV adds the two halves of a unit apart from each other.
        terms = 2 * -(-weight.shape[1] // 16)
    y = values @ w.T
    size = np.abs(values) @ np.abs(w).T
    if bias is not None:
        y = y + bias
        size = size + np.abs(bias)
    bound = (terms + 6) * EPSILON[np.float32] * size
    if x.dtype == np.float16:
        # Rounded once, at the end; below 2^-14 by half a unit of the denormals.
        bound = bound + EPSILON[np.float16] * np.abs(y) + 2.0**-25
    shape = (*x.shape[:-1], len(weight))
    return y.reshape(shape), bound.reshape(shape)


def check(chosen: Any, inputs: list[Array | None], bits: int, **options: Any) -> Array:
    """Run on the device and hold against float64."""
    (result,) = run_op("quantized_linear", chosen, inputs, int4={1} if bits == 4 else set(), **options)
    assert inputs[0] is not None
    assert result.dtype == inputs[0].dtype
    y, bound = expected(chosen, inputs)
    assert result.shape == y.shape
    assert np.all(np.abs(result - y) <= bound), np.max(np.abs(result - y) / bound)
    return result


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    seed = int(np.random.SeedSequence().entropy % 2**32)  # type: ignore[operator]
    request.node.user_properties.append(("seed", seed))
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture(params=["cpu", "cpu without subgroup operations", "gpu", "gpu of tier 0"])
def device_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Kernel choice as on other devices; all of them run on the device that is there."""
    kind = str(request.param)
    real = PhysicalDevice.capabilities
    changes: dict[str, dict[str, Any]] = {
        "cpu": {},
        "cpu without subgroup operations": {"shuffle": False},
        "gpu": {"kind": "discrete"},
        "gpu of tier 0": {"kind": "integrated", "tier": 0},
    }

    def capabilities(self: PhysicalDevice, max_tier: int | None = None) -> Capabilities:
        return dataclasses.replace(real(self, max_tier), **changes[kind])

    monkeypatch.setattr(PhysicalDevice, "capabilities", capabilities)
    return kind


# The operator on the device

# (shape of x, N, group size): M below, at and above the tiles' sizes, N odd, prime and 4 mod 8, K odd for one group,
# groups of half a unit, of units and of sizes that are spread.
CASES = [
    ((1, 32), 16, 32),
    ((3, 64), 7, 16),
    ((5, 97), 33, 97),
    ((70, 256), 68, 64),
    ((2, 2, 3, 1, 48), 31, 16),
    ((9, 240), 12, 24),
    ((33,), 1, 33),
    ((2, 768), 5, 256),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("activation", ["none", "dynamic_per_token"])
def test_every_kernel_gives_the_product(case: Any, activation: str, device_kind: str, rng: np.random.Generator) -> None:
    shape, n, group = case
    # Half of the combinations for each case: a pipeline of the large kernels takes lavapipe seconds.
    pairs = [(4, np.float32), (8, np.float16)] if CASES.index(case) % 2 else [(8, np.float32), (4, np.float16)]
    for bits, dtype in pairs:
        bias = [None, np.float32, dtype][rng.integers(3)]
        inputs = operands(rng, shape, n, group, bits, dtype, bias)
        check(attributes(group, activation, dtype), inputs, bits)


@pytest.mark.parametrize(("bits", "k"), [(8, 1100), (4, 9000)])
def test_long_groups_have_exact_sums(bits: int, k: int, device_kind: str, rng: np.random.Generator) -> None:
    """One group of equal extremes: the integer sum passes 2^24, and is right to the last bit. (GEMV sums units.)"""
    weight = np.full((3, k), -(1 << (bits - 1)), np.int8)
    weight[1, ::2] += 1
    weight[2] = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), k)
    # Range 0 … 255, so that the scale is 1 and x its own integer.
    x = rng.integers(0, 256, (5, k)).astype(np.float32)
    x[:, 0], x[:, 1] = 0, 255
    x[1, 1:] = 255
    chosen = attributes(k, "dynamic_per_token")
    (y,) = run_op("quantized_linear", chosen, [x, weight, np.ones((3, 1), np.float32)], int4={1} if bits == 4 else ())
    exact = x.astype(np.int64) @ weight.astype(np.int64).T
    assert np.array_equal(y, exact.astype(np.float32))


@pytest.mark.parametrize("max_tier", [0, None])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_shape(max_tier: int | None, data: st.DataObject) -> None:
    group = data.draw(st.sampled_from([1, 5, 8, 16, 32, 48, 64, 128]), "group")
    groups = data.draw(st.integers(1, max(1, 200 // group)), "groups")
    shape = (*data.draw(st.lists(st.integers(0, 4), max_size=3), "leading"), group * groups)
    bits = data.draw(st.sampled_from([4, 8]))
    dtype = data.draw(st.sampled_from(DTYPES))
    activation = data.draw(st.sampled_from(["none", "dynamic_per_token", "dynamic_per_tensor"]))
    symmetric = data.draw(st.booleans())
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    inputs = operands(generator, shape, data.draw(st.integers(1, 40), "n"), group, bits, dtype)
    check(attributes(group, activation, dtype, symmetric=symmetric), inputs, bits, max_tier=max_tier)


@pytest.mark.parametrize("activation", ["none", "dynamic_per_token", "dynamic_per_tensor"])
def test_nothing_in_nothing_out(activation: str) -> None:
    for shape, n in (((0, 32), 5), ((2, 0, 3, 32), 5), ((4, 32), 0)):
        weight, scale = np.zeros((n, 32), np.int8), np.zeros((n, 1), np.float32)
        (y,) = run_op("quantized_linear", attributes(32, activation), [np.zeros(shape, np.float32), weight, scale])
        assert y.shape == (*shape[:-1], n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite(dtype: Any, device_kind: str, rng: np.random.Generator) -> None:
    """Weight only: what float arithmetic gives. Per token: the row is NaN. Per tensor: all is."""
    inputs = operands(rng, (5, 64), 6, 32, 8, dtype)
    x = inputs[0]
    assert x is not None
    assert inputs[1] is not None
    inputs[1][inputs[1] == 0] = 1  # 0 · inf is NaN
    x[1, 3], x[2, 40], x[4, 0], x[4, 1] = np.inf, np.nan, np.finfo(dtype).max, np.finfo(dtype).min
    (y,) = run_op("quantized_linear", attributes(32, "none", dtype), inputs)
    (reference,) = OPERATOR.reference(attributes(32, "none", dtype), inputs)
    assert np.array_equal(np.isnan(y[:4]), np.isnan(reference[:4]))
    assert np.array_equal(y[1], reference[1])
    # The range of the last row overflows.
    (y,) = run_op("quantized_linear", attributes(32, "dynamic_per_token", dtype), inputs)
    assert np.isnan(y).all(axis=1).tolist() == [False, True, True, False, True]
    assert np.isfinite(y[[0, 3]]).all()
    (y,) = run_op("quantized_linear", attributes(32, "dynamic_per_tensor", dtype), inputs)
    assert np.isnan(y).all()


def test_rows_of_zeros_are_zero(device_kind: str) -> None:
    inputs: list[Array | None] = [
        np.zeros((3, 32), np.float32),
        np.full((2, 32), -8, np.int8),
        np.ones((2, 1), np.float32),
    ]
    for qparams in ("torchao", "pt2e"):
        for activation in ("dynamic_per_token", "dynamic_per_tensor"):
            (y,) = run_op("quantized_linear", attributes(32, activation, qparams=qparams), inputs, int4={1})
            assert np.array_equal(y, np.zeros((3, 2)))


def shared_input_graph(group_sizes: tuple[int, ...], activation: str) -> Any:
    builder = GraphBuilder()
    x = builder.input("x", TensorType(DType.FLOAT32, (6, 64)))
    outputs: list[int] = []
    for n, group in enumerate(group_sizes, 3):
        weight = builder.constant(f"weight{n}", np.full((n, 64), n - 5, np.int8), DType.INT4)
        scale = builder.constant(f"scale{n}", np.full((n, 64 // group), 0.25, np.float32))
        chosen = attributes(group, activation)
        types = [builder.tensors[index].type for index in (x, weight, scale)]
        outputs += builder.node("quantized_linear", (x, weight, scale), OPERATOR.infer(chosen, types), chosen)
    return builder.build(outputs)


@pytest.mark.parametrize("activation", ["dynamic_per_token", "dynamic_per_tensor"])
def test_layers_with_one_input_quantize_it_once(activation: str, rng: np.random.Generator) -> None:
    """Also where their widths and group sizes differ."""
    graph = shared_input_graph((16, 32, 64), activation)
    check_plan(graph)
    plan = make_plan(graph, capabilities())
    kernels = [step.dispatch.kernel for step in plan.steps if step.dispatch is not None]
    passes = 1 if activation == "dynamic_per_token" else 3
    assert sum(kernel.startswith("quantize_") for kernel in kernels) == passes
    assert len(kernels) == passes + 3
    x = rng.standard_normal((6, 64)).astype(np.float32)
    for n, y in enumerate(run_graph(graph, [x]), 3):
        assert y.shape == (6, n)
        assert np.ptp(y, axis=1).max() == 0  # all output channels are alike


# Quantized activations


@dataclasses.dataclass(frozen=True)
class Exposed:
    """Attributes of the operator that shows what the quantization of activations leaves in scratch memory."""

    linear: QuantizedLinearAttributes
    floats: bool


@pytest.fixture
def exposed(monkeypatch: pytest.MonkeyPatch) -> str:
    """An operator x, weight → integers (int8, or float32 less the zero points), scale and zero point a row."""

    def infer(chosen: Exposed, inputs: Any) -> tuple[TensorType, ...]:
        x, weight = inputs
        columns = Packing.of(weight, chosen.linear.group_size).columns
        m = x.numel // x.shape[-1]
        data = DType.FLOAT32 if chosen.floats else DType.INT8
        return TensorType(data, (m, columns)), TensorType(DType.INT32, (m, 2))

    def kernels(chosen: Exposed, inputs: Any, outputs: Any, capabilities: Capabilities) -> ops.Kernels:
        scale = TensorType(DType.FLOAT32, (inputs[1].shape[0], inputs[1].shape[1] // chosen.linear.group_size))
        linear = OPERATOR.kernels(
            chosen.linear, [*inputs, scale], OPERATOR.infer(chosen.linear, [*inputs, scale]), capabilities
        )
        dispatches = [d for d in linear.dispatches if d.kernel.startswith("quantize_")]
        shown = []
        for dispatch in dispatches:
            buffers = tuple(
                dataclasses.replace(arg, role="output") if arg.role == "scratch" and arg.index < 2 else arg
                for arg in dispatch.buffers
            )
            shown.append(dataclasses.replace(dispatch, buffers=buffers))
        return ops.Kernels(tuple(shown), linear.scratch)

    operator = ops.Operator(
        "exposed_quantization", "", infer, lambda chosen, inputs: (), kernels, Exposed, constant_inputs=frozenset({1})
    )
    monkeypatch.setitem(ops.operator._registry, operator.name, operator)
    return operator.name


def torch_quantized(x: torch.Tensor, chosen: QuantizedLinearAttributes) -> tuple[Array, Array, Array]:
    """Integers, scales and zero points by torchao's and PT2E's own operators."""
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

    low, high = chosen.quant_min, chosen.quant_max
    per_token = chosen.activation == "dynamic_per_token"
    decomposed = torch.ops.quantized_decomposed
    if chosen.qparams == "torchao":
        mapping = MappingType.SYMMETRIC if chosen.symmetric else MappingType.ASYMMETRIC
        block = (1, x.shape[1]) if per_token else tuple(x.shape)
        given = {"quant_min": low, "quant_max": high}
        scale, zero = choose_qparams_affine(x, mapping, block, torch.int8, eps=chosen.eps, **given)
        q = quantize_affine(x, block, scale, zero, torch.int8, low, high)
    elif per_token:
        name = "choose_qparams_per_token" if chosen.symmetric else "choose_qparams_per_token_asymmetric"
        scale, zero = getattr(decomposed, name)(x, torch.int8)
        q = decomposed.quantize_per_token(x, scale, zero, low, high, torch.int8)
    else:
        name = "choose_qparams_symmetric" if chosen.symmetric else "choose_qparams"
        scale, zero = getattr(decomposed, name).tensor(x, low, high, chosen.eps, torch.int8)
        q = decomposed.quantize_per_tensor.tensor(x, scale, zero, low, high, torch.int8)
    rows = (len(x), 1)
    scale = scale.double().reshape(-1, 1).numpy()
    return (
        q.int().numpy(),
        np.broadcast_to(scale, rows).astype(np.float32),
        np.broadcast_to(zero.int().reshape(-1, 1).numpy(), rows),
    )


def formulas(dtype: Any) -> list[QuantizedLinearAttributes]:
    """Every formula, with the eps that its own library uses."""
    found = []
    for activation, symmetric, (low, high) in itertools.product(
        ("dynamic_per_token", "dynamic_per_tensor"), (False, True), ((-128, 127), (-127, 127), (-8, 119))
    ):
        common: dict[str, Any] = {"activation": activation, "symmetric": symmetric, "quant_min": low, "quant_max": high}
        found.append(attributes(1, dtype=dtype, **common))
        if activation == "dynamic_per_tensor":
            found.append(attributes(1, **{**common, "eps": 2.0**-23, "qparams": "pt2e"}))
        elif (low, high) == (-128, 127):
            eps = 1e-5 if symmetric else 2.0**-23
            found.append(attributes(1, **{**common, "eps": eps, "qparams": "pt2e"}))
    return found


def difficult_rows(rng: np.random.Generator, dtype: Any, k: int) -> Array:
    """Rows of many magnitudes, of one sign, of integers, of ties, of zeros, of very small and large numbers."""
    rows = [rng.standard_normal(k) * 10.0 ** rng.uniform(-3, 3) for _ in range(12)]
    rows += [np.abs(rows[0]), -np.abs(rows[1]), np.zeros(k), rng.integers(-300, 300, k)]
    # Scales 1 and 0.5 exactly, and values halfway between two integers of that.
    ties = rng.integers(0, 510, k) / 2
    ties[0], ties[-1] = 0, 255
    rows += [ties, ties - 100, -ties / 2]
    rows += [rng.standard_normal(k) * 1e-7, rng.standard_normal(k) * (5e3 if dtype is np.float16 else 1e30)]
    rows.append(np.clip(rng.standard_normal(k) ** 9 + 0.01, -3e4, 3e4))
    return np.array(rows).astype(dtype)


def test_the_reference_quantizes_as_torch_does(rng: np.random.Generator) -> None:
    for dtype in DTYPES:
        for chosen in formulas(dtype):
            scheme = chosen.scheme
            assert scheme is not None
            x = difficult_rows(rng, dtype, 61)
            if not scheme.per_token:
                x = x[rng.permutation(len(x))[:3]]
            for mine, theirs in zip(quantize(x, scheme), torch_quantized(torch.from_numpy(x), chosen), strict=True):
                assert np.array_equal(mine, theirs), chosen


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_device_quantizes_as_torch_does(
    dtype: Any, exposed: str, device_kind: str, rng: np.random.Generator
) -> None:
    """Integers, scales and zero points, bit for bit; but for ties that PT2E's float64 per token breaks at random."""
    for chosen, k in zip(formulas(dtype), itertools.cycle([64, 61, 300, 3]), strict=False):
        scheme = chosen.scheme
        assert scheme is not None
        x = difficult_rows(rng, dtype, k)
        if not scheme.per_token:
            x = x[rng.permutation(len(x))[: rng.integers(1, 12)]]
        linear = dataclasses.replace(chosen, group_size=k)
        device = open_device().physical.capabilities(tier_cap())
        packing = Packing.of(TensorType(DType.INT8, (1, k)), k)
        floats = choose(len(x), packing, True, device).texels
        data, parameters = run_op(exposed, Exposed(linear, floats), [x, np.zeros((1, k), np.int8)])
        q, scale, zero_point = torch_quantized(torch.from_numpy(x), chosen)
        assert np.array_equal(parameters[:, 1:], zero_point), chosen
        assert np.array_equal(parameters[:, :1].copy().view(np.float32), scale), chosen
        found = data[:, :k] + (zero_point if floats else 0)
        different = found != q
        if scheme.formula == 2 and not scheme.symmetric:
            position = np.abs(x.astype(np.float64) / scale % 1 - 0.5)
            assert np.all(position[different] < 2.0**-24), chosen
        else:
            assert not different.any(), (chosen, x[different], scale[different.any(axis=1)])
        assert np.all(data[:, k:] == 0) or not floats


# Against eager modules


def eager(module: torch.nn.Module, x: Array) -> Array:
    with torch.no_grad():
        y: Array = module(torch.from_numpy(x)).numpy()
    return y


def quantized_weight(linear: torch.nn.Linear, bits: int) -> tuple[Array, Array]:
    weight: Any = linear.weight
    scale = weight.scale.numpy()
    assert not weight.zero_point.any()
    return weight.qdata.numpy(), scale.reshape(len(scale), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("granularity", [PerGroup(16), PerGroup(32), PerGroup(128), PerAxis(0)], ids=str)
def test_torchao_modules(dtype: torch.dtype, dynamic: bool, granularity: Any, rng: np.random.Generator) -> None:
    for bits, (k, n, shape) in itertools.product((4, 8), [(256, 60, (2, 7)), (384, 33, (1,))]):
        torch.manual_seed(int(rng.integers(2**31)))
        linear = torch.nn.Linear(k, n).to(dtype)
        weight_dtype = {4: torch.int4, 8: torch.int8}[bits]
        if dynamic:
            quantize_(
                linear, Int8DynamicActivationIntxWeightConfig(weight_dtype=weight_dtype, weight_granularity=granularity)
            )
        else:
            quantize_(linear, IntxWeightOnlyConfig(weight_dtype=weight_dtype, granularity=granularity))
        numpy_dtype = np.float16 if dtype == torch.float16 else np.float32
        x = rng.standard_normal((*shape, k)).astype(numpy_dtype)
        weight, scale = quantized_weight(linear, bits)
        group = k // scale.shape[1]
        inputs: list[Array | None] = [x, weight, scale, linear.bias.detach().numpy()]
        chosen = attributes(group, "dynamic_per_token" if dynamic else "none", numpy_dtype)
        result = check(chosen, inputs, bits)
        (reference,) = OPERATOR.reference(chosen, inputs)
        theirs = eager(linear, x)
        # float32: eager's sums have K rounded terms. float16: every weight and activation rounded too, to 11 bits.
        w = np.abs(weight * np.repeat(scale.astype(np.float64), group, axis=1))
        size = np.abs(x.astype(np.float64)) @ w.T + np.abs(inputs[3])  # type: ignore[arg-type]
        # Quantization of x moves it by half a step of at most (max - min) / 255 at most.
        if dynamic:
            size = size + np.ptp(x.astype(np.float64), axis=-1, keepdims=True) / 255 * w.sum(axis=1)
        terms = 2 * k + 12 if dtype == torch.float32 else 4 + 2 * k * 2.0**-13
        bound = terms * EPSILON[numpy_dtype] * size
        assert np.all(np.abs(result - theirs.astype(np.float64)) <= bound)
        assert np.all(np.abs(reference - theirs.astype(np.float64)) <= bound)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_pt2e_formulas(symmetric: bool, bits: int, rng: np.random.Generator) -> None:
    """Per tensor dynamic activations and per channel weights, as convert_pt2e leaves them."""
    k, n = 97, 21
    top = 1 << (bits - 1)
    weight = rng.integers(-top, top, (n, k)).astype(np.int8)
    scale = rng.uniform(0.01, 0.02, (n, 1)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    x = rng.standard_normal((2, 3, k)).astype(np.float32)
    decomposed = torch.ops.quantized_decomposed
    choose_qparams = decomposed.choose_qparams_symmetric if symmetric else decomposed.choose_qparams
    tensor = torch.from_numpy(x)
    parameters = choose_qparams.tensor(tensor, -128, 127, 2.0**-23, torch.int8)
    q = decomposed.quantize_per_tensor.tensor(tensor, *parameters, -128, 127, torch.int8)
    back = decomposed.dequantize_per_tensor.tensor(q, *parameters, -128, 127, torch.int8)
    w = decomposed.dequantize_per_channel(
        torch.from_numpy(weight), torch.from_numpy(scale[:, 0]), None, 0, -top, top - 1, torch.int8
    )
    theirs = torch.nn.functional.linear(back, w, torch.from_numpy(bias)).numpy()
    chosen = attributes(k, "dynamic_per_tensor", symmetric=symmetric, eps=2.0**-23, qparams="pt2e")
    result = check(chosen, [x, weight, scale, bias], bits)
    (reference,) = OPERATOR.reference(chosen, [x, weight, scale, bias])
    bound = 2 * (k + 6) * EPSILON[np.float32] * (np.abs(back.numpy()) @ np.abs(w.numpy()).T + np.abs(bias))
    assert np.all(np.abs(result - theirs) <= bound)
    assert np.all(np.abs(reference - theirs) <= bound)


# Rules, layouts, choice of kernels: no device


def types(x: Any, weight: Any, scale: Any, bias: Any = None) -> list[TensorType | None]:
    return [
        None if value is None else TensorType(DType(value[0]), tuple(value[1])) for value in (x, weight, scale, bias)
    ]


GOOD: dict[str, Any] = {
    "x": ("float32", (2, 64)),
    "weight": ("int4", (5, 64)),
    "scale": ("float32", (5, 2)),
    "bias": ("float32", (5,)),
}


@pytest.mark.parametrize(
    ("changes", "chosen", "words"),
    [
        ({"x": ("int32", (2, 64))}, {}, "x must be float32 or float16"),
        ({"x": ("float32", ())}, {}, "of rank 1 or more"),
        ({"x": ("float32", (2, 63))}, {}, "x has 63 columns"),
        ({"weight": ("uint8", (5, 64))}, {}, "int4 or int8"),
        ({"weight": ("int8", (64,))}, {}, "of rank 2"),
        ({"weight": None}, {}, "must be there"),
        (
            {"x": ("float32", (2, 0)), "weight": ("int8", (5, 0)), "scale": ("float32", (5, 0))},
            {},
            "at least one input",
        ),
        ({"scale": ("float32", (5, 4))}, {}, r"float32 or float16 \[5, 2\]"),
        ({"scale": ("int8", (5, 2))}, {}, "the scale must be"),
        ({"bias": ("float32", (4,))}, {}, "the bias must be"),
        ({"bias": ("float16", (5,))}, {}, "the bias must be"),
        ({}, {"group_size": 48}, "48 does not divide the 64"),
        ({}, {"group_size": 0}, "0 does not divide"),
        ({}, {"activation": "dynamic_per_token", "quant_max": 255}, "are not int8"),
        ({}, {"activation": "dynamic_per_token", "quant_min": 5, "quant_max": 5}, "are not int8"),
        ({}, {"activation": "dynamic_per_token", "eps": float("nan")}, "eps must be"),
    ],
)
def test_operands_that_make_no_sense(changes: dict[str, Any], chosen: dict[str, Any], words: str) -> None:
    assert OPERATOR.infer(attributes(32), types(**GOOD)) == (TensorType(DType.FLOAT32, (2, 5)),)
    with pytest.raises(OperatorError, match=words):
        OPERATOR.infer(attributes(**{"group_size": 32, **chosen}), types(**{**GOOD, **changes}))


def test_operands_count() -> None:
    with pytest.raises(OperatorError, match="2 operands were given"):
        OPERATOR.infer(attributes(32), types(**GOOD)[:2])


def test_sizes_that_are_not_supported() -> None:
    k = (1 << 16) + 32
    wide = types(("float32", (1, k)), ("int4", (1, k)), ("float32", (1, 1)))
    assert "overflow int32" in str(ops.supports("quantized_linear", attributes(k, "dynamic_per_token"), wide))
    assert ops.supports("quantized_linear", attributes(k), wide) is None
    tall = types(("float32", (1 << 20, 4096)), ("int8", (1, 4096)), ("float32", (1, 1)))
    assert "elements" in str(ops.supports("quantized_linear", attributes(4096), tall))


@pytest.mark.parametrize(("k", "group"), [(64, 32), (97, 97), (48, 16), (240, 24), (20, 5), (7, 1), (256, 256)])
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_hold_every_weight(k: int, group: int, bits: int, rng: np.random.Generator) -> None:
    """Unpacked by the words that describe the layout, not by its inverse."""
    top = 1 << (bits - 1)
    weight = rng.integers(-top, top, (3, k)).astype(np.int8)
    packing = Packing.of(TensorType(DType(f"int{bits}"), (3, k)), group)
    packed = packing.pack(weight).reshape(-1).view(np.uint8)
    assert packed.nbytes == packing.nbytes == 3 * packing.columns * bits // 8
    assert packing.columns % UNIT == 0
    assert packing.columns >= packing.groups * packing.pitch
    if packing.groups > 1:
        assert packing.pitch == 16 or packing.pitch % UNIT == 0
    rows = packed.reshape(3, packing.columns // UNIT, -1)
    found = np.zeros((3, packing.columns), np.int8)
    for column in range(packing.columns):
        unit, within = divmod(column, UNIT)
        if bits == 8:
            found[:, column] = rows[:, unit, within].view(np.int8)
        else:
            word, place = divmod(within, 8)
            byte = rows[:, unit, 4 * word + place % 4]
            found[:, column] = (byte << (0 if place >= 4 else 4)).view(np.int8) >> 4
    expected = np.zeros_like(found)
    for column in range(k):
        expected[:, column // group * packing.pitch + column % group] = weight[:, column]
    assert np.array_equal(found, expected)
    layout = packing.layout
    assert (layout is None) == (bits == 8 and k == packing.columns)


def test_four_bits_stay_four_bits() -> None:
    packing = Packing.of(TensorType(DType.INT4, (1024, 1024)), 32)
    assert packing.nbytes == 1024 * 1024 // 2
    assert unpack_int4(np.array([0xF8], np.uint8), (1, 2)).tolist() == [[-8, -1]]


def capabilities(**changes: Any) -> Capabilities:
    usual: dict[str, Any] = {
        "tier": 1,
        "kind": "cpu",
        "subgroup_size": 8,
        "max_workgroup_invocations": 1024,
        "max_workgroup_size": (1024, 1024, 64),
        "max_workgroup_count": (65535, 65535, 65535),
        "shared_memory": 32768,
        "max_storage_range": 1 << 27,
        "shuffle": True,
        "max_texels": 1 << 27,
    }
    return Capabilities(**{**usual, **changes})


@pytest.mark.parametrize(
    ("changes", "kernels"),
    [
        (
            {},
            [
                "quantized_linear_lanes_1_broadcast",
                "quantized_linear_lanes_4_broadcast",
                "quantized_linear_lanes_8_broadcast",
            ],
        ),
        ({"shuffle": False}, ["quantized_linear_lanes_1", "quantized_linear_lanes_4", "quantized_linear_lanes_8"]),
        ({"tier": 0}, ["quantized_gemv", "quantized_gemv", "quantized_gemm_integer"]),
        ({"subgroup_size": 4}, ["quantized_gemv_subgroup", "quantized_gemv_subgroup", "quantized_gemm_integer"]),
        ({"max_texels": 1000}, ["quantized_gemv_subgroup", "quantized_gemv_subgroup", "quantized_gemm_integer"]),
        ({"kind": "discrete"}, ["quantized_gemv_subgroup", "quantized_gemv_subgroup", "quantized_gemm_integer"]),
        ({"kind": "integrated", "tier": 2}, ["quantized_gemv_subgroup"] * 2 + ["quantized_gemm_integer"]),
    ],
)
def test_the_kernel_follows_the_device(changes: dict[str, Any], kernels: list[str]) -> None:
    packing = Packing.of(TensorType(DType.INT4, (1024, 1024)), 32)
    device = capabilities(**changes)
    assert [choose(m, packing, True, device).kernel for m in (1, 3, 32)] == kernels


@pytest.mark.parametrize("tier", [0, 1, 2])
@pytest.mark.parametrize("kind", ["cpu", "discrete"])
@pytest.mark.parametrize("invocations", [128, 1024])
def test_dispatches_keep_the_contract(tier: int, kind: Any, invocations: int) -> None:
    """Interfaces as in the SPIR-V, every row and column covered, limits kept: for devices that are not there."""
    device = capabilities(tier=tier, kind=kind, max_workgroup_invocations=invocations, max_workgroup_count=(50, 50, 50))
    for m, n, k, group, bits, dtype, activation in itertools.product(
        (1, 4, 40), (1, 31), (97, 128), (None, 32), (4, 8), ("float32", "float16"), ("none", "dynamic_per_tensor")
    ):
        size = group if group and k % group == 0 else k
        given = types((dtype, (m, k)), (f"int{bits}", (n, k)), (dtype, (n, k // size)), (dtype, (n,)))
        chosen = attributes(size, activation)
        outputs = OPERATOR.infer(chosen, given)
        for dispatch in OPERATOR.kernels(chosen, given, outputs, device).dispatches:
            assert contract_errors(dispatch, device) == []
            assert all(count <= 50 for count in dispatch.groups)
            assert dispatch.constants[0] <= invocations
            assert len(dispatch.push) <= 128
        choice = choose(m, Packing.of(given[1], size), activation != "none", device)  # type: ignore[arg-type]
        tiles = -(-m // choice.tile_m) * -(-n // choice.tile_n)
        assert np.prod(OPERATOR.kernels(chosen, given, outputs, device).dispatches[-1].groups) >= min(tiles, 1)


def test_int4_constants_are_given_packed() -> None:
    """The graph that the harness builds holds half a byte a weight, and so does the device."""
    weight = np.zeros((16, 64), np.int8)
    graph, _ = one_node_graph(
        "quantized_linear",
        attributes(32),
        [np.zeros((1, 64), np.float32), weight, np.zeros((16, 2), np.float32)],
        int4={1},
    )
    assert [t.data.size for t in graph.tensors if t.dtype is DType.INT4 and t.data is not None] == [16 * 32]
