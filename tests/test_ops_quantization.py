"""Dynamic quantization of activations, by the reference and by the device: against torchao's and PT2E's operators."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_op
from quantized import DTYPES, OPERATOR, attributes

from torchvk import ops
from torchvk.graph import DType, TensorType
from torchvk.ops import Capabilities
from torchvk.ops.quantization import quantize
from torchvk.ops.quantized_linear import QuantizedLinearAttributes
from torchvk.ops.quantized_linear_kernels import choose
from torchvk.ops.quantized_packing import Packing
from torchvk.runtime.device import max_tier, open_device

Array = np.ndarray[Any, Any]


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


@pytest.mark.export
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
def test_the_device_quantizes_as_the_reference_does(
    dtype: Any, exposed: str, device_kind: str, rng: np.random.Generator
) -> None:
    """And so as torch does: integers, scales and zero points, bit for bit; but for ties that PT2E's float64 per token
    breaks at random."""
    for chosen, k in zip(formulas(dtype), itertools.cycle([64, 61, 300, 3, 2056]), strict=False):
        scheme = chosen.scheme
        assert scheme is not None
        x = difficult_rows(rng, dtype, k)
        if not scheme.per_token:
            # One row alone may be quantized by the product itself.
            x = x[rng.permutation(len(x))[: rng.integers(2, 12)]]
        linear = dataclasses.replace(chosen, group_size=k)
        device = open_device().physical.capabilities(max_tier())
        packing = Packing.of(TensorType(DType.INT8, (1, k)), k)
        floats = choose(len(x), packing, True, device).texels
        data, parameters = run_op(exposed, Exposed(linear, floats), [x, np.zeros((1, k), np.int8)])
        q, scale, zero_point = quantize(x, scheme)
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
