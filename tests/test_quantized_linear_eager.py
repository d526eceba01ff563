"""quantized_linear on the device, against the eager torchao and PT2E modules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import OPERATOR, attributes
from test_ops_quantized_linear import EPSILON, check
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.quant_api import (
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.quant_primitives import MappingType
from torchao.quantization.quantize_.workflows.intx.intx_choose_qparams_algorithm import IntxChooseQParamsAlgorithm

Array = np.ndarray[Any, Any]


def eager(module: torch.nn.Module, x: Array) -> Array:
    with torch.no_grad():
        y: Array = module(torch.from_numpy(x)).numpy()
    return y


WIDTHS = {bits: getattr(torch, f"int{bits}") for bits in range(1, 9)}
MAPPINGS = (MappingType.SYMMETRIC, MappingType.ASYMMETRIC, MappingType.SYMMETRIC_NO_CLIPPING_ERR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dynamic", [True, False])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_torchao_modules(dtype: torch.dtype, dynamic: bool, data: st.DataObject) -> None:
    """Weights of every width, mapping and granularity, as torchao quantizes them; one row and several."""
    bits = data.draw(st.sampled_from([*WIDTHS, 4, 8]), "bits")
    mapping = data.draw(st.sampled_from(MAPPINGS[: 2 if bits == 1 else 3]), "mapping")
    granularity = data.draw(st.sampled_from([PerGroup(16), PerGroup(32), PerGroup(128), PerAxis(0)]), "granularity")
    k, n, shape = data.draw(st.sampled_from([(256, 60, (2, 7)), (384, 33, (1,)), (128, 5, ()), (256, 8, (3,))]), "size")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    torch.manual_seed(int(rng.integers(2**31)))
    linear = torch.nn.Linear(k, n).to(dtype)
    if dynamic:
        quantize_(linear, Int8DynamicActivationIntxWeightConfig(WIDTHS[bits], granularity, mapping))
    else:
        scales = IntxChooseQParamsAlgorithm(data.draw(st.sampled_from(["affine", "hqq_scale_only"]), "scales"))
        quantize_(
            linear, IntxWeightOnlyConfig(WIDTHS[bits], granularity, mapping, intx_choose_qparams_algorithm=scales)
        )
    numpy_dtype = np.float16 if dtype == torch.float16 else np.float32
    x = rng.standard_normal((*shape, k)).astype(numpy_dtype)
    theirs: Any = linear.weight
    weight, scale, zero_point = theirs.qdata.numpy(), theirs.scale.numpy(), theirs.zero_point.numpy()
    group = k // scale.shape[1]
    inputs: list[Array | None] = [x, weight, scale, linear.bias.detach().numpy()]
    if zero_point.any():
        inputs += [None, zero_point]
    chosen = attributes(group, "dynamic_per_token" if dynamic else "none", numpy_dtype)
    result = check(chosen, inputs, next(stored for stored in (2, 4, 8) if bits <= stored))
    (reference,) = OPERATOR.reference(chosen, inputs)
    wanted = eager(linear, x)
    # float32: eager's sums have K rounded terms. float16: every weight and activation rounded too, to 11 bits.
    w = np.abs((weight - np.repeat(zero_point.astype(float), group, 1)) * np.repeat(scale.astype(float), group, 1))
    size = np.abs(x.astype(np.float64)) @ w.T + np.abs(inputs[3])  # type: ignore[arg-type]
    # Quantization of x moves it by half a step of at most (max - min) / 255 at most.
    if dynamic:
        size = size + np.ptp(x.astype(np.float64), axis=-1, keepdims=True) / 255 * w.sum(axis=1)
    terms = 2 * k + 12 if dtype == torch.float32 else 4 + 2 * k * 2.0**-13
    bound = terms * EPSILON[numpy_dtype] * size
    assert np.all(np.abs(result - wanted.astype(np.float64)) <= bound)
    assert np.all(np.abs(reference - wanted.astype(np.float64)) <= bound)


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
