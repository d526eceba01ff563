"""Tensors quantized and dequantized at run time with PT2E's operators, whatever reads them: choose → quantize →
dequantize as operators of ours.

They are one pattern because PT2E's scales are float64, which torchvk has not: their values are those of float32, and
nothing but the pattern sees them. torchao's come in the tensor's precision, and are translated one by one.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from torchvk.lowering.draft import Draft, Value
from torchvk.lowering.patterns.activations import PER_TENSOR_CHOOSE, PER_TOKEN_CHOOSE, QUANTIZE
from torchvk.lowering.patterns.match import Match, Values
from torchvk.lowering.source import Source, operator_name
from torchvk.lowering.translate.registry import Translator, arguments
from torchvk.lowering.types import dtype_of

PT2E = {name: quantize for name, quantize in QUANTIZE.items() if name.startswith("quantized_decomposed.")}


def match(node: Node, source: Source) -> Match | None:
    """The chain that ``node``, a dequantize, ends; None if it is none of these."""
    parts = _chain(node)
    if parts is None:
        return None
    quantize, scale, zero_point, choose = parts
    given, before, chosen = (arguments(each, lambda operand: operand) for each in (node, quantize, choose))
    if chosen["input"] is not before["input"] or not _int8(chosen["dtype"], operator_name(choose)):
        return None
    attributes = _attributes(operator_name(choose), chosen)
    x_node = before["input"]

    def emit(draft: Draft, values: Values) -> Value:
        t = Translator(draft, node)
        x = values(x_node)
        per_token = operator_name(choose) in PER_TOKEN_CHOOSE
        blocks = [*x.shape[:-1], 1] if per_token else [1] * len(x.shape)
        factor, zero = draft.emit("choose_qparams", [x], {"blocks": blocks, **attributes}, choose.name, t.source)
        formula = "pt2e_token" if per_token and not attributes["symmetric"] else "pt2e"
        q = t.op(
            "quantize",
            *(x, factor, zero),
            dtype=dtype_of(before["dtype"]),
            quant_min=int(before["quant_min"]),
            quant_max=int(before["quant_max"]),
            formula=formula,
        )
        result = given.get("out_dtype") or given.get("output_dtype") or torch.float32
        return t.op("dequantize", q, factor, zero, dtype=dtype_of(result))

    return Match(node, frozenset((quantize, scale, zero_point, choose)), (x_node,), emit)


def chain(node: Node) -> frozenset[Node]:
    """Nothing: what does not match is left to others."""
    return frozenset()


def _chain(node: Node) -> tuple[Node, Node, Node, Node] | None:
    """quantize, scale, zero point and choose behind a dequantize with the same parameters."""
    if node.op != "call_function" or operator_name(node) not in PT2E:
        return None
    given = arguments(node, lambda operand: operand)
    quantize = given["input"]
    if quantize.op != "call_function" or operator_name(quantize) != PT2E[operator_name(node)]:
        return None
    before = arguments(quantize, lambda operand: operand)
    scale, zero = given.get("scale", given.get("scales")), given.get("zero_point", given.get("zero_points"))
    same = scale is before.get("scale", before.get("scales")) and zero is before.get(
        "zero_point", before.get("zero_points")
    )
    if not same or not isinstance(scale, Node) or not isinstance(zero, Node):
        return None
    if scale.target is not operator.getitem or zero.target is not operator.getitem:
        return None
    choose = scale.args[0]
    if zero.args[0] is not choose or (scale.args[1], zero.args[1]) != (0, 1):
        return None
    if operator_name(choose) not in (*PER_TENSOR_CHOOSE, *PER_TOKEN_CHOOSE):
        return None
    return quantize, scale, zero, choose


def _int8(dtype: torch.dtype, choose: str) -> bool:
    """Symmetric zero points of other dtypes, and ranges per token, are not those of the formulas."""
    return dtype == torch.int8 or PER_TENSOR_CHOOSE.get(choose) is False


def _attributes(name: str, chosen: dict[str, Any]) -> dict[str, Any]:
    if name in PER_TENSOR_CHOOSE:
        low, high = int(chosen["quant_min"]), int(chosen["quant_max"])
        symmetric, eps, formula = PER_TENSOR_CHOOSE[name], float(chosen["eps"]), "pt2e"
    else:
        symmetric, eps = PER_TOKEN_CHOOSE[name]
        low, high, formula = -128, 127, "pt2e_token"
    return {"symmetric": symmetric, "quant_min": low, "quant_max": high, "eps": eps, "formula": formula}
