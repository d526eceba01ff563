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
# PT2E's way to choose → whether it is symmetric.
PER_TENSOR_CHOOSE = {
    "quantized_decomposed.choose_qparams.tensor": False,
    "quantized_decomposed.choose_qparams_symmetric.tensor": True,
}
# → whether it is symmetric, and its constant eps (torch/ao/quantization/fx/_decomposed.py).
PER_TOKEN_CHOOSE = {
    "quantized_decomposed.choose_qparams_per_token_asymmetric.default": (False, torch.finfo(torch.float32).eps),
    "quantized_decomposed._choose_qparams_per_token_asymmetric_impl.default": (False, torch.finfo(torch.float32).eps),
    "quantized_decomposed.choose_qparams_per_token.default": (True, 1e-5),
}
# dequantize → the quantize that belongs to it
QUANTIZE = {
    "torchao.dequantize_affine.default": "torchao.quantize_affine.default",
    "quantized_decomposed.dequantize_per_tensor.default": "quantized_decomposed.quantize_per_tensor.default",
    "quantized_decomposed.dequantize_per_tensor.tensor": "quantized_decomposed.quantize_per_tensor.tensor",
    "quantized_decomposed.dequantize_per_token.default": "quantized_decomposed.quantize_per_token.default",
}
# What may end a chain of activation quantization, also one that is refused.
DEQUANTIZE_ACTIVATION = (*DEQUANTIZE, *QUANTIZE)


@dataclass(frozen=True)
class QuantizedActivation:
    """``x`` is the floating-point tensor; ``attributes`` are those of ``quantized_linear`` that say how."""

    x: Node
    attributes: Mapping[str, Any]
    nodes: tuple[Node, ...]


def quantization(dequantize: Node) -> set[Node]:
    """``dequantize`` and all that only serves it: what quantizes, and chooses scales and zero points."""
    found: set[Node] = set()
    nodes = [dequantize]
    while nodes:
        node = nodes.pop()
        maker = node.all_input_nodes[0] if node.target is operator.getitem else node
        if maker.op == "call_function" and operator_name(maker).startswith(("torchao.", "quantized_decomposed.")):
            found.add(node)
            nodes.extend(node.all_input_nodes)
    return found


def read_activation(dequantize: Node) -> QuantizedActivation:
    """The chain that ends in ``dequantize``; raises :class:`Refused` for one that ``quantized_linear`` has not."""
    given = _arguments(dequantize)
    quantize = given["input"]
    if quantize.op != "call_function" or operator_name(quantize) != QUANTIZE.get(operator_name(dequantize)):
        raise Refused(f"its input is quantized in a way that is not supported: {_label(dequantize)} of {quantize.name}")
    before = _arguments(quantize)
    parameters = _parameters(given)
    if parameters != _parameters(before):
        raise Refused("its input is quantized with other parameters than it is dequantized with")
    scale, zero_point = parameters
    if not all(isinstance(node, Node) and node.target is operator.getitem for node in parameters):
        raise Refused("static activation quantization is not supported: dynamic is")
    choose = scale.args[0]
    if zero_point.args[0] is not choose or (scale.args[1], zero_point.args[1]) != (0, 1):
        raise Refused("scale and zero point of its input come from different places")
    chosen = _arguments(choose)
    if chosen["input"] is not before["input"]:
        raise Refused("its input is quantized with the parameters of another tensor")
    limits = {tuple(_range(a)) for a in (given, before, chosen) if "quant_min" in a}
    if len(limits) != 1:
        raise Refused(f"its input is quantized with several ranges: {sorted(limits)}")
    attributes = _attributes(choose, chosen, before, given)
    attributes["quant_min"], attributes["quant_max"] = limits.pop()
    return QuantizedActivation(before["input"], attributes, (dequantize, quantize, scale, zero_point, choose))


def _attributes(choose: Node, chosen: _Given, quantize: _Given, dequantize: _Given) -> dict[str, Any]:
    """How ``choose`` chooses, but for the range."""
    name = operator_name(choose)
    if name == TORCHAO_CHOOSE:
        return _torchao(chosen, quantize, dequantize)
    _expect_int8(chosen["dtype"], quantize["dtype"])
    if name in PER_TENSOR_CHOOSE:
        return {
            "activation": "dynamic_per_tensor",
            "symmetric": PER_TENSOR_CHOOSE[name],
            "eps": float(chosen["eps"]),
            "qparams": "pt2e",
        }
    if name not in PER_TOKEN_CHOOSE:
        raise Refused(f"activations quantized with {_label(choose)} are not supported")
    symmetric, eps = PER_TOKEN_CHOOSE[name]
    # These choose for the whole range of int8, whatever range is quantized to.
    if quantize["quant_max"] != 127 or (quantize["quant_min"] != -128 and not symmetric):
        raise Refused(f"activations per token in {_range(quantize)} are not supported: -128…127 is")
    return {"activation": "dynamic_per_token", "symmetric": symmetric, "eps": eps, "qparams": "pt2e"}


def _torchao(chosen: _Given, quantize: _Given, dequantize: _Given) -> dict[str, Any]:
    x = chosen["input"].meta["val"]
    shape, block = list(x.shape), list(chosen["block_size"])
    if list(quantize["block_size"]) != block or list(dequantize["block_size"]) != block:
        raise Refused("its input is quantized with several block sizes")
    if block == [1] * (len(shape) - 1) + shape[-1:]:
        activation = "dynamic_per_token"
    elif block == shape:
        activation = "dynamic_per_tensor"
    else:
        raise Refused(f"activations quantized in blocks of {block} are not supported: per token and per tensor are")
    if chosen["mapping_type"] not in ("ASYMMETRIC", "SYMMETRIC"):
        raise Refused(f"{chosen['mapping_type']} activations are not supported: ASYMMETRIC and SYMMETRIC are")
    _expect_int8(chosen["target_dtype"], quantize["output_dtype"], dequantize["input_dtype"])
    if chosen["scale_dtype"] not in (None, x.dtype):
        raise Refused(f"activation scales of {chosen['scale_dtype']} are not supported, only those of {x.dtype}")
    eps = torch.finfo(x.dtype).smallest_normal if chosen["eps"] is None else chosen["eps"]
    symmetric = chosen["mapping_type"] == "SYMMETRIC"
    return {"activation": activation, "symmetric": symmetric, "eps": float(eps), "qparams": "torchao"}


_Given = dict[str, Any]


def _parameters(given: _Given) -> tuple[Any, Any]:
    return given.get("scale", given.get("scales")), given.get("zero_point", given.get("zero_points"))


def _range(given: _Given) -> tuple[int, int]:
    low, high = given["quant_min"], given["quant_max"]
    return (-128, 127) if low is None or high is None else (int(low), int(high))


def _expect_int8(*dtypes: torch.dtype) -> None:
    for dtype in dtypes:
        if dtype != torch.int8:
            raise Refused(f"activations quantized to {dtype} are not supported: torch.int8 is")


def _arguments(node: Node) -> _Given:
    return arguments(node, lambda operand: operand)


def _label(node: Node) -> str:
    return operator_name(node).removesuffix(".default")
