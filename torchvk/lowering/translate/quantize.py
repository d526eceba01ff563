"""Quantize and dequantize nodes of PT2E (``quantized_decomposed``) and torchao, one by one.

What an integer operator can do with them, the passes see (``torchvk.lowering.passes.qdq``); where none can, they run
as they stand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from torchvk.errors import ArgumentError
from torchvk.graph import DType
from torchvk.lowering.draft import Array, Value
from torchvk.lowering.refusal import Refused
from torchvk.lowering.source import module_for
from torchvk.lowering.translate.registry import Translator, dim_of, torch_dtype, translates
from torchvk.lowering.types import type_of
from torchvk.ops.quantize import Formula

Parameter = Value | float | int | None


def parameters(
    t: Translator,
    scale: Parameter,
    zero_point: Parameter,
    shape: Sequence[int],
    limits: tuple[int | None, int | None] = (None, None),
) -> tuple[Value, Value | None]:
    """Scale and zero point as tensors of ``shape``.

    Raises:
        ArgumentError: a wrong number of them, or, as far as values are known, a scale that is zero or not finite,
            or a zero point outside of ``limits``: a model that was not calibrated, or is damaged.
    """
    if scale is None:
        raise Refused("it has no scale")
    if isinstance(scale, Value):
        if not scale.dtype.is_float:
            raise Refused(f"its scales are {scale.dtype.value}")
        _expect_blocks(t, scale, shape, "scales")
        _check_scales(t, scale.array)
        factor = _shaped(t, scale, shape)
    else:
        _check_scales(t, np.array(scale))
        factor = t.constant(np.full(tuple(shape), scale, np.float32))
    if zero_point is None or (not isinstance(zero_point, Value) and zero_point == 0):
        return factor, None
    if not isinstance(zero_point, Value):
        _check_zero_points(t, np.array(zero_point), limits)
        return factor, t.constant(np.full(tuple(shape), int(zero_point), np.int32))
    if zero_point.type.numel == 0:
        return factor, None
    if zero_point.dtype.is_float:
        raise Refused("its zero points are floating-point numbers: only integers are supported")
    _expect_blocks(t, zero_point, shape, "zero points")
    _check_zero_points(t, zero_point.array, limits)
    return factor, t.cast(_shaped(t, zero_point, shape), DType.INT32)


def _shaped(t: Translator, value: Value, shape: Sequence[int]) -> Value:
    """Constants at once: the passes that look for quantized operands come before constants are folded."""
    if value.array is None:
        return t.reshape(value, shape)
    array = value.array if value.dtype.is_float else value.array.astype(np.int32)
    return t.constant(array.reshape(shape))


Bound = Value | float | None


def bounds(low: Bound, high: Bound) -> tuple[int | None, int | None]:
    """The quantized range, as far as it is given and known."""

    def number(bound: Bound) -> int | None:
        if isinstance(bound, Value):
            return None if bound.array is None else int(bound.array.item())
        return None if bound is None else int(bound)

    return number(low), number(high)


def _bad(t: Translator, words: str) -> ArgumentError:
    path = module_for(t.node)
    module = f"the module {path!r}" if path else "the model"
    return ArgumentError(f"{t.node.name} of {module}: {words}")


def _expect_blocks(t: Translator, given: Value, shape: Sequence[int], what: str) -> None:
    if given.type.numel != math.prod(shape):
        raise _bad(t, f"{given.type.numel} {what} for {math.prod(shape)} channels, groups or blocks of its input")


def _check_scales(t: Translator, scales: Array | None) -> None:
    if scales is None:
        return
    with np.errstate(all="ignore"):
        rounded = scales.astype(np.float32)
        wrong = scales[~np.isfinite(rounded) | (rounded == 0)]
    if wrong.size:
        raise _bad(t, f"the scale {wrong.ravel()[0]} divides nothing. Was the model calibrated, with finite values?")


def _check_zero_points(t: Translator, zeros: Array | None, limits: tuple[int | None, int | None]) -> None:
    low, high = limits
    if zeros is None or low is None or high is None:
        return
    wrong = zeros[(zeros < low) | (zeros > high)]
    if wrong.size:
        raise _bad(t, f"the zero point {wrong.ravel()[0]} is outside of the quantized range {low}…{high}")


def quantized(
    t: Translator,
    x: Value,
    parameters: tuple[Value, Value | None],
    limits: tuple[int | None, int | None],
    dtype: torch.dtype,
    formula: Formula,
) -> Value:
    kind = torch_dtype(dtype, x.dtype)
    low, high = _limits(limits, kind)
    return t.op("quantize", x, *parameters, dtype=kind, quant_min=low, quant_max=high, formula=formula)


def _limits(limits: tuple[int | None, int | None], dtype: DType) -> tuple[int, int]:
    if dtype.is_float or dtype is DType.BOOL:
        raise Refused(f"quantizing to {dtype.value} is not supported")
    whole = np.iinfo(dtype.numpy)
    low, high = limits
    return int(whole.min if low is None else low), int(whole.max if high is None else high)


def dequantized(
    t: Translator, q: Value, parameters: tuple[Value, Value | None], dtype: torch.dtype | None = None
) -> Value:
    return t.op("dequantize", q, *parameters, dtype=torch_dtype(dtype, DType.FLOAT32))


# --- per tensor


@translates("quantized_decomposed.quantize_per_tensor.default", "quantized_decomposed.quantize_per_tensor.tensor")
def quantize_per_tensor(
    t: Translator,
    input: Value,
    scale: Parameter,
    zero_point: Parameter,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
) -> Value:
    limits = quant_min, quant_max
    given = parameters(t, scale, zero_point, [1] * len(input.shape), limits)
    return quantized(t, input, given, limits, dtype, "pt2e")


@translates("quantized_decomposed.quantize_per_tensor.tensor2")
def quantize_per_tensor_tensor2(
    t: Translator,
    input: Value,
    scale: Parameter,
    zero_point: Parameter,
    quant_min: Value,
    quant_max: Value,
    dtype: torch.dtype,
) -> Value:
    if not quant_min.constant or not quant_max.constant:
        raise Refused("its range is not constant")
    low, high = bounds(quant_min, quant_max)
    given = parameters(t, scale, zero_point, [1] * len(input.shape), (low, high))
    return quantized(t, input, given, (low, high), dtype, "pt2e")


@translates(
    "quantized_decomposed.dequantize_per_tensor.default",
    "quantized_decomposed.dequantize_per_tensor.tensor",
    "quantized_decomposed.dequantize_per_tensor.tensor2",
)
def dequantize_per_tensor(
    t: Translator,
    input: Value,
    scale: Parameter,
    zero_point: Parameter,
    quant_min: int | Value,
    quant_max: int | Value,
    out_dtype: torch.dtype | None = None,
) -> Value:
    limits = bounds(quant_min, quant_max)
    return dequantized(t, input, parameters(t, scale, zero_point, [1] * len(input.shape), limits), out_dtype)


# --- per channel


def _channels(input: Value, axis: int) -> list[int]:
    axis = dim_of(axis, len(input.shape))
    return [size if d == axis else 1 for d, size in enumerate(input.shape)]


@translates("quantized_decomposed.quantize_per_channel.default")
def quantize_per_channel(
    t: Translator,
    input: Value,
    scales: Value,
    zero_points: Value,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
) -> Value:
    limits = quant_min, quant_max
    given = parameters(t, scales, zero_points, _channels(input, axis), limits)
    return quantized(t, input, given, limits, dtype, "pt2e")


@translates("quantized_decomposed.dequantize_per_channel.default")
def dequantize_per_channel(
    t: Translator,
    input: Value,
    scales: Value,
    zero_points: Value | None,
    axis: int,
    quant_min: int,
    quant_max: int,
    out_dtype: torch.dtype | None = None,
) -> Value:
    limits = bounds(quant_min, quant_max)
    return dequantized(t, input, parameters(t, scales, zero_points, _channels(input, axis), limits), out_dtype)


# --- per token


def _tokens(input: Value) -> list[int]:
    return [*input.shape[:-1], 1] if input.shape else []


@translates("quantized_decomposed.quantize_per_token.default")
def quantize_per_token(
    t: Translator, input: Value, scales: Value, zero_points: Value, quant_min: int, quant_max: int, dtype: torch.dtype
) -> Value:
    limits = quant_min, quant_max
    given = parameters(t, scales, zero_points, _tokens(input), limits)
    return quantized(t, input, given, limits, dtype, "pt2e_group")


@translates("quantized_decomposed.dequantize_per_token.default")
def dequantize_per_token(
    t: Translator,
    input: Value,
    scales: Value,
    zero_points: Value,
    quant_min: int,
    quant_max: int,
    output_dtype: torch.dtype,
) -> Value:
    limits = bounds(quant_min, quant_max)
    return dequantized(t, input, parameters(t, scales, zero_points, _tokens(input), limits), output_dtype)


# --- per group of the last dimension


def _groups(input: Value, scales: Value, group_size: int) -> list[int]:
    *rows, columns = input.shape
    # As the operators do: one scale a row whatever the group size says.
    if group_size > columns and scales.shape[-1:] == (1,):
        group_size = columns
    if group_size < 1 or columns % group_size:
        raise Refused(f"groups of {group_size} do not divide {columns} columns")
    return [*rows, columns // group_size]


@translates("quantized_decomposed.quantize_per_channel_group.default")
def quantize_per_channel_group(
    t: Translator,
    input: Value,
    scales: Value,
    zero_points: Value,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    group_size: int,
) -> Value:
    limits = quant_min, quant_max
    given = parameters(t, scales, zero_points, _groups(input, scales, group_size), limits)
    return quantized(t, input, given, limits, dtype, "pt2e_group")


@translates("quantized_decomposed.dequantize_per_channel_group.default")
def dequantize_per_channel_group(
    t: Translator,
    input: Value,
    scales: Value,
    zero_points: Value | None,
    quant_min: int,
    quant_max: int,
    group_size: int,
    output_dtype: torch.dtype | None = None,
) -> Value:
    limits = bounds(quant_min, quant_max)
    given = parameters(t, scales, zero_points, _groups(input, scales, group_size), limits)
    return dequantized(t, input, given, output_dtype)


# --- torchao: any blocks


def _blocks(input: Value, block_size: Sequence[int]) -> list[int]:
    if len(block_size) != len(input.shape):
        raise Refused(f"blocks of {list(block_size)} for an input {list(input.shape)}")
    if any(block < 1 or size % block for size, block in zip(input.shape, block_size, strict=True)):
        raise Refused(f"blocks of {list(block_size)} do not divide its input {list(input.shape)}")
    return [size // block for size, block in zip(input.shape, block_size, strict=True)]


@translates("torchao.quantize_affine.default")
def quantize_affine(
    t: Translator,
    input: Value,
    block_size: Sequence[int],
    scale: Value,
    zero_point: Value | None,
    output_dtype: torch.dtype,
    quant_min: float | None,
    quant_max: float | None,
) -> Value:
    limits = bounds(quant_min, quant_max)
    given = parameters(t, scale, zero_point, _blocks(input, block_size), limits)
    return quantized(t, input, given, limits, output_dtype, "torchao")


@translates("torchao.dequantize_affine.default")
def dequantize_affine(
    t: Translator,
    input: Value,
    block_size: Sequence[int],
    scale: Value,
    zero_point: Value | None,
    quant_min: float | None,
    quant_max: float | None,
    output_dtype: torch.dtype | int,
) -> Value:
    # The schema's default is a number, c10's ScalarType::Float.
    dtype = torch.float32 if output_dtype == 6 else output_dtype
    if not isinstance(dtype, torch.dtype):
        raise Refused(f"scalar type {dtype}")
    limits = bounds(quant_min, quant_max)
    return dequantized(t, input, parameters(t, scale, zero_point, _blocks(input, block_size), limits), dtype)


@translates("torchao.choose_qparams_affine.default")
def choose_qparams_affine(
    t: Translator,
    input: Value,
    mapping_type: str,
    block_size: Sequence[int],
    target_dtype: torch.dtype,
    quant_min: float | None,
    quant_max: float | None,
    eps: float | None,
    scale_dtype: torch.dtype | None,
) -> tuple[Value, Value]:
    if mapping_type not in ("ASYMMETRIC", "SYMMETRIC"):
        raise Refused(f"{mapping_type} quantization is not supported at run time: ASYMMETRIC and SYMMETRIC are")
    wanted = torch_dtype(scale_dtype, input.dtype)
    if not input.dtype.is_float or not wanted.is_float:
        raise Refused(f"scales of {scale_dtype} for {input.dtype.value} are not supported")
    low, high = _limits(bounds(quant_min, quant_max), torch_dtype(target_dtype, DType.INT8))
    attributes = {
        "blocks": _blocks(input, block_size),
        "symmetric": mapping_type == "SYMMETRIC",
        "quant_min": low,
        "quant_max": high,
        "eps": float(np.finfo(input.dtype.numpy).tiny) if eps is None else float(eps),
        "formula": "torchao",
    }
    scale, zero_point = t.draft.emit("choose_qparams", [input], attributes, t.node.name, t.source)
    first, second = (type_of(value) for value in t.node.meta["val"])
    # The precision of the input is that of all steps; a wider scale is that one converted.
    return t.cast(t.reshape(scale, first.shape), wanted), t.cast(t.reshape(zero_point, second.shape), second.dtype)
