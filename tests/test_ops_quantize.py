"""quantize and dequantize by the device and the reference, against the operators of PT2E and torchao in eager mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_op

from torchvk import ops
from torchvk.lowering.types import DTYPES
from torchvk.ops.quantize import DequantizeAttributes, QuantizeAttributes, spread

Array = np.ndarray[Any, Any]
QD = torch.ops.quantized_decomposed
RANGES = {
    torch.int8: (-128, 127),
    torch.uint8: (0, 255),
    torch.int16: (-32768, 32767),
    torch.int32: (-(2**31), 2**31 - 1),
}
SPECIAL = [np.inf, -np.inf, 0.0, -0.0, 6e4, -6e4, 0.5, 1.5, 2.5]


def blocks(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales."""
    if name == "tensor":
        return (1,) * len(shape)
    if name == "channel":
        return (1, shape[1], *(1,) * (len(shape) - 2))
    return (*shape[:-1], 1 if name == "token" else shape[-1] // 4)


def eager(name: str, formula: str, dtype: torch.dtype, low: int, high: int) -> tuple[Callable[..., Any], ...]:
    """quantize(x, scale, zero) and dequantize(q, scale, zero) of the formula's library."""
    if formula == "torchao":
        from torchao.quantization.quant_primitives import dequantize_affine, quantize_affine

        def block(x: torch.Tensor, scale: torch.Tensor) -> list[int]:
            return [a // b for a, b in zip(x.shape, scale.shape, strict=True)]

        return (
            lambda x, s, z: quantize_affine(x, block(x, s), s, z, dtype, low, high),
            lambda q, s, z: dequantize_affine(q, block(q, s), s, z, dtype, low, high, output_dtype=s.dtype),
        )
    rest = (low, high, dtype)
    if name == "tensor":
        return (
            lambda x, s, z: QD.quantize_per_tensor(x, s.item(), z.item(), *rest),
            lambda q, s, z: QD.dequantize_per_tensor(q, s.item(), z.item(), *rest),
        )
    if name == "channel":
        return (
            lambda x, s, z: QD.quantize_per_channel(x, s.flatten(), z.flatten(), 1, *rest),
            lambda q, s, z: QD.dequantize_per_channel(q, s.flatten(), z.flatten(), 1, *rest),
        )
    if name == "token":
        return (
            lambda x, s, z: QD.quantize_per_token(x, s.double(), z, *rest),
            lambda q, s, z: QD.dequantize_per_token(q, s.double(), z, *rest, torch.float32),
        )
    return (
        lambda x, s, z: QD.quantize_per_channel_group(x, s, z, *rest, 4),
        lambda q, s, z: QD.dequantize_per_channel_group(q, s, z, *rest, 4, torch.float32),
    )


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize(
    ("name", "formula"),
    [
        *[(name, "torchao") for name in ("tensor", "channel", "token", "group")],
        *(("tensor", "pt2e"), ("channel", "pt2e"), ("token", "pt2e_token"), ("group", "pt2e_group")),
    ],
)
def test_against_eager(rng: np.random.Generator, name: str, formula: str, half: bool) -> None:
    """Equal, ties and what is out of range included; float16 where torchao has it."""
    for number, dtype in enumerate((torch.int8, torch.uint8, torch.int16)):
        low, high = RANGES[dtype] if number else (-8, 7)
        if half and dtype == torch.int16:
            low, high = -30000, 30000  # in float16, which rounds 32767 up, eager mode wraps around
        shape = {"group": (5, 12), "channel": (3, 5, 7)}.get(name, (4, 11))
        scales = blocks(name, shape)
        scale = rng.uniform(0.01, 0.1, scales).astype(np.float16 if half and formula == "torchao" else np.float32)
        zero = rng.integers(max(low, -300), min(high, 300), scales).astype(np.int32)
        # Multiples of half a step: many ties.
        steps = rng.integers(2 * low - 40, 2 * high + 40, shape) if number < 2 else rng.integers(-900, 900, shape)
        x = (steps * 0.5 * spread(scale, shape).astype(np.float32)).astype(np.float16 if half else np.float32)
        x.ravel()[: len(SPECIAL)] = np.array(SPECIAL).astype(x.dtype)
        quantize, dequantize = eager(name, formula, dtype, low, high)
        wanted = quantize(*map(torch.from_numpy, (x, scale, zero)))
        attributes = QuantizeAttributes(DTYPES[dtype], low, high, formula)
        (q,) = run_op("quantize", attributes, [x, scale, zero])
        np.testing.assert_array_equal(q, wanted.numpy())
        np.testing.assert_array_equal(ops.get("quantize").reference(attributes, [x, scale, zero])[0], q)
        back = dequantize(wanted, *map(torch.from_numpy, (scale, zero)))
        undo = DequantizeAttributes(DTYPES[back.dtype])
        (y,) = run_op("dequantize", undo, [q, scale, zero])
        np.testing.assert_array_equal(y, back.numpy())
        np.testing.assert_array_equal(ops.get("dequantize").reference(undo, [q, scale, zero])[0], y)


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 0), (1,), (2, 3, 4, 5, 2)])
def test_shapes(rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    """Empty, 0-D, blocks along every dimension; no zero point."""
    scale = np.full([size // 2 if size in (2, 4) else size for size in shape], 0.25, np.float32)
    scale *= rng.uniform(1, 2, scale.shape).astype(np.float32)
    x = np.asarray(rng.standard_normal(shape) * 30).astype(np.float32)
    attributes = QuantizeAttributes(DTYPES[torch.int8], -128, 127)
    (q,) = run_op("quantize", attributes, [x, scale])
    np.testing.assert_array_equal(q, ops.get("quantize").reference(attributes, [x, scale, None])[0])
    (y,) = run_op("dequantize", DequantizeAttributes(DTYPES[torch.float16]), [q, scale])
    assert np.all(np.abs(y - np.clip(x, -128 * spread(scale, shape), 127 * spread(scale, shape))) <= 0.26)


def test_nan_is_zero_and_limits_saturate() -> None:
    x = np.array([np.nan, np.inf, -np.inf, 3e9, 0.4], np.float32)
    one = np.ones(1, np.float32)
    for dtype, (low, high) in RANGES.items():
        attributes = QuantizeAttributes(DTYPES[dtype], low, high)
        wanted = np.array([0, high, low, high, 0], np.int64)
        np.testing.assert_array_equal(run_op("quantize", attributes, [x, one])[0], wanted)
        np.testing.assert_array_equal(ops.get("quantize").reference(attributes, [x, one])[0], wanted)


def test_what_makes_no_sense_is_refused() -> None:
    float32, int8 = DTYPES[torch.float32], DTYPES[torch.int8]
    x = ops.operator.TensorType(float32, (4, 6))

    def words(scale: tuple[int, ...], **changes: Any) -> str | None:
        given = {"dtype": int8, "quant_min": -128, "quant_max": 127, **changes}
        return ops.supports("quantize", QuantizeAttributes(**given), [x, ops.operator.TensorType(float32, scale)])

    assert words((2, 3)) is None
    assert "do not divide" in str(words((3, 1)))
    assert "shape" in str(words((1,)))
    assert "not a range" in str(words((1, 1), quant_max=200))
    assert "cannot quantize" in str(words((1, 1), dtype=float32))


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize(
    ("formula", "shape", "scales"),
    [
        *(("torchao", (3, 40), (3, 1)), ("torchao", (4, 6, 8), (2, 1, 4)), ("torchao", (5, 7), (1, 1))),
        *(("pt2e", (3, 5, 70), (1, 1, 1)), ("pt2e", (90000,), (1,)), ("pt2e_token", (2, 5, 33), (2, 5, 1))),
    ],
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_choose_qparams(
    rng: np.random.Generator, formula: str, shape: tuple[int, ...], scales: tuple[int, ...], symmetric: bool, half: bool
) -> None:
    """Equal to eager mode's, of any blocks; a block of zeros, a constant one, and one with an infinity, too."""
    x = (rng.standard_normal(shape) * rng.uniform(0.1, 9)).astype(np.float16 if half else np.float32)
    if len(shape) > 1:
        x[0], x[1] = (0, 2.5) if scales[0] > 1 else (x[0], x[1])
    attributes = {"blocks": list(scales), "symmetric": symmetric, "quant_min": -128, "quant_max": 127}
    attributes |= {"eps": float(np.finfo(x.dtype).tiny) if formula == "torchao" else 1e-5, "formula": formula}
    given = torch.from_numpy(x)
    if formula == "torchao":
        from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine

        mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
        block = [a // b for a, b in zip(shape, scales, strict=True)]
        want = choose_qparams_affine(given, mapping, block, torch.int8, -128, 127)
    elif formula == "pt2e":
        choose = QD.choose_qparams_symmetric if symmetric else QD.choose_qparams
        want = choose.tensor(given, -128, 127, 1e-5, torch.int8)
    elif symmetric:
        want = QD.choose_qparams_per_token(given, torch.int8)
    else:
        attributes["eps"] = float(np.finfo(np.float32).eps)
        want = QD.choose_qparams_per_token_asymmetric(given, torch.int8)
    scale, zero_point = run_op("choose_qparams", attributes, [x])
    operator = ops.get("choose_qparams")
    reference = operator.reference(operator.attributes(**attributes), [x])
    for got in ((scale, zero_point), reference):
        np.testing.assert_array_equal(got[0].ravel(), want[0].numpy().astype(got[0].dtype).ravel())
        np.testing.assert_array_equal(got[1].ravel(), want[1].numpy().ravel())
    x.ravel()[-1] = np.inf
    scale, zero_point = run_op("choose_qparams", attributes, [x])
    assert np.isnan(scale.ravel()[-1])
    assert zero_point.ravel()[-1] == 0
