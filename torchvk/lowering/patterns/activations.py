"""Activations quantized at run time: the chains choose → quantize → dequantize of torchao and PT2E."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from torchvk.lowering.patterns.weights import DEQUANTIZE
from torchvk.lowering.refusal import Refused
from torchvk.lowering.source import operator_name
from torchvk.lowering.translate.registry import arguments

TORCHAO_CHOOSE = "torchao.choose_qparams_affine.default"
TORCHAO_QUANTIZE = "torchao.quantize_affine.default"
PT2E_CHOOSE = {
    "quantized_decomposed.choose_qparams.tensor": False,
    "quantized_decomposed.choose_qparams_symmetric.tensor": True,
}
PT2E_QUANTIZE = "quantized_decomposed.quantize_per_tensor.tensor"
PER_TOKEN_DEQUANTIZE = "quantized_decomposed.dequantize_per_token.default"
# What may end a chain of activation quantization.
DEQUANTIZE_ACTIVATION = (*DEQUANTIZE, PER_TOKEN_DEQUANTIZE)


@dataclass(frozen=True)
class QuantizedActivation:
    """``x`` is the floating-point tensor; ``attributes`` are those of ``quantized_linear`` that say how."""

    x: Node
    attributes: Mapping[str, Any]
    nodes: tuple[Node, ...]


def read_activation(dequantize: Node) -> QuantizedActivation:
    """The chain that ends in ``dequantize``; raises :class:`Refused` for one that ``quantized_linear`` has not."""
    given = _arguments(dequantize)
    quantize = given["input"]
    if not isinstance(quantize, Node) or operator_name(quantize) not in (TORCHAO_QUANTIZE, PT2E_QUANTIZE):
        raise Refused(f"the activation quantization {_label(dequantize)} is not supported")
    before = _arguments(quantize)
    pairs: list[Any] = [given.get("scale"), given.get("zero_point")]
    if pairs != [before.get("scale"), before.get("zero_point")]:
        raise Refused("its input is quantized with other parameters than it is dequantized with")
    if not all(isinstance(node, Node) and node.target is operator.getitem for node in pairs):
        raise Refused("static activation quantization is not supported: dynamic is")
    choose = pairs[0].args[0]
    if pairs[1].args[0] is not choose or [node.args[1] for node in pairs] != [0, 1]:
        raise Refused("scale and zero point of its input come from different places")
    if _arguments(choose)["input"] is not before["input"]:
        raise Refused("its input is quantized with the parameters of another tensor")
    ranges = {(a["quant_min"], a["quant_max"]) for a in (given, before, _arguments(choose))}
    if len(ranges) != 1:
        raise Refused(f"its input is quantized with several ranges: {sorted(map(str, ranges))}")
    attributes = _torchao(choose, quantize, dequantize) if _is_torchao(choose) else _pt2e(choose)
    return QuantizedActivation(before["input"], attributes, (dequantize, quantize, *pairs, choose))


def _torchao(choose: Node, quantize: Node, dequantize: Node) -> dict[str, Any]:
    chosen, stored, given = _arguments(choose), _arguments(quantize), _arguments(dequantize)
    x = chosen["input"].meta["val"]
    shape, block = list(x.shape), list(chosen["block_size"])
    if list(stored["block_size"]) != block or list(given["block_size"]) != block:
        raise Refused("its input is quantized with several block sizes")
    # A size of 1 makes both granularities the same; torchao's formula is the same for both.
    if block == [1] * (len(shape) - 1) + shape[-1:]:
        activation = "dynamic_per_token"
    elif block == shape:
        activation = "dynamic_per_tensor"
    else:
        raise Refused(f"activations quantized in blocks of {block} are not supported: per token and per tensor are")
    if chosen["mapping_type"] not in ("ASYMMETRIC", "SYMMETRIC"):
        raise Refused(f"{chosen['mapping_type']} activations are not supported: ASYMMETRIC and SYMMETRIC are")
    _expect_int8(chosen["target_dtype"], stored["output_dtype"], given["input_dtype"])
    if chosen["scale_dtype"] not in (None, x.dtype):
        raise Refused(f"activation scales of {chosen['scale_dtype']} are not supported, only those of {x.dtype}")
    symmetric = chosen["mapping_type"] == "SYMMETRIC"
    low, high = chosen["quant_min"], chosen["quant_max"]
    if low is None or high is None:
        low, high = -128, 127
    eps = torch.finfo(x.dtype).smallest_normal if chosen["eps"] is None else chosen["eps"]
    return _attributes(activation, symmetric, low, high, eps, "torchao")


def _pt2e(choose: Node) -> dict[str, Any]:
    symmetric = PT2E_CHOOSE.get(operator_name(choose))
    if symmetric is None:
        raise Refused(f"the activation quantization {_label(choose)} is not supported")
    given = _arguments(choose)
    _expect_int8(given["dtype"])
    return _attributes("dynamic_per_tensor", symmetric, given["quant_min"], given["quant_max"], given["eps"], "pt2e")


def _attributes(activation: str, symmetric: bool, low: Any, high: Any, eps: Any, qparams: str) -> dict[str, Any]:
    return {
        "activation": activation,
        "symmetric": symmetric,
        "quant_min": int(low),
        "quant_max": int(high),
        "eps": float(eps),
        "qparams": qparams,
    }


def _expect_int8(*dtypes: torch.dtype) -> None:
    for dtype in dtypes:
        if dtype != torch.int8:
            raise Refused(f"activations quantized to {dtype} are not supported: torch.int8 is")


def _is_torchao(choose: Node) -> bool:
    return operator_name(choose) == TORCHAO_CHOOSE


def _arguments(node: Node) -> dict[str, Any]:
    return arguments(node, lambda operand: operand)


def _label(node: Node) -> str:
    return operator_name(node).removesuffix(".default")
