"""Dequantized weight, perhaps a quantized and dequantized input, and a matrix product → ``quantized_linear``.

exir gives a linear as mm, addmm or bmm of a transposed weight, with views around them; torchao and PT2E put
quantize and dequantize nodes before it. All of that is one operator here, and the dequantized matrices never exist.
"""

from __future__ import annotations

from torch.fx import Node

from torchvk.graph import DType
from torchvk.lowering.draft import Draft, Value
from torchvk.lowering.patterns import dynamic
from torchvk.lowering.patterns.activations import (
    DEQUANTIZE_ACTIVATION,
    QuantizedActivation,
    quantization,
    read_activation,
)
from torchvk.lowering.patterns.match import Match, Values
from torchvk.lowering.patterns.views import View, base_of, trace
from torchvk.lowering.patterns.weights import (
    DEQUANTIZE,
    TORCHAO,
    QuantizedWeight,
    check_weight,
    read_weight,
    weight_values,
)
from torchvk.lowering.refusal import Refused
from torchvk.lowering.source import Source, operator_name
from torchvk.lowering.translate.linear import add_product
from torchvk.lowering.translate.registry import Translator, arguments

# torch operator → names of its input, its weight and its addend; whether the weight is given as [N, K].
PRODUCTS = {
    "aten.mm.default": ("self", "mat2", None, False),
    "aten.bmm.default": ("self", "mat2", None, False),
    "aten.matmul.default": ("self", "other", None, False),
    "aten.addmm.default": ("mat1", "mat2", "self", False),
    "aten.baddbmm.default": ("batch1", "batch2", "self", False),
    "aten.linear.default": ("input", "weight", "bias", True),
}


def match(node: Node, source: Source) -> Match | None:
    """The linear that ``node`` ends, or None if nothing about it is quantized, or if its parts run one by one.

    Raises :class:`Refused` if it is a quantized product that torchvk does not run; :func:`chain` gives the nodes
    that share this fate.
    """
    try:
        return _match(node, source)
    except Refused:
        if _runs_in_parts(node, source):
            return None
        raise


def _runs_in_parts(node: Node, source: Source) -> bool:
    """Whether what a product's operands are quantized by are operators of their own, too."""
    x_name, weight_name, _, _ = PRODUCTS[operator_name(node)]
    given = arguments(node, lambda operand: operand)
    for base in map(base_of, (given[x_name], given[weight_name])):
        name = operator_name_or_empty(base)
        if name not in DEQUANTIZE_ACTIVATION or name == TORCHAO or is_static(base, source):
            continue
        if not source.is_constant(arguments(base, lambda operand: operand)["input"]) and not dynamic.match(
            base, source
        ):
            return False
    return True


def _match(node: Node, source: Source) -> Match | None:
    if operator_name(node) not in PRODUCTS or not chain(node):
        return None
    x_name, weight_name, addend_name, rows_first = PRODUCTS[operator_name(node)]
    given = arguments(node, lambda operand: operand)
    if any(is_static(base_of(given[name]), source) for name in (x_name, weight_name)):
        return None  # node by node, and then torchvk.lowering.passes
    view = trace(given[weight_name])
    if operator_name_or_empty(view.base) not in DEQUANTIZE:
        raise Refused("its input is quantized and its weight is not")
    weight = read_weight(view.base, source)
    dtype = check_weight(weight, source)
    transposed = _orientation(view, weight, rows_first)
    interior = [*view.nodes, view.base]
    activation, x_shape = None, tuple(given[x_name].meta["val"].shape)
    if operator_name_or_empty(base_of(given[x_name])) in DEQUANTIZE_ACTIVATION:
        x_view = trace(given[x_name])
        activation = read_activation(x_view.base)
        if not x_view.dense or x_shape[-1:] != tuple(x_view.base.meta["val"].shape)[-1:]:
            raise Refused("its quantized input is rearranged before the product")
        interior += [*x_view.nodes, *activation.nodes]
    if given[x_name].meta["val"].dtype != given[weight_name].meta["val"].dtype:
        raise Refused("its input and its dequantized weight have different dtypes")
    x_node = activation.x if activation else given[x_name]
    addend = given.get(addend_name) if addend_name else None
    reads = tuple(n for n in (x_node, addend) if isinstance(n, Node))

    def emit(draft: Draft, values: Values) -> Value:
        t = Translator(draft, node)
        x = t.reshape(values(x_node), x_shape)
        bias = None if addend is None else values(addend)
        return _emit(t, x, bias, weight, transposed, dtype, activation, source, given)

    return Match(node, frozenset(interior), reads, emit)


def chain(node: Node) -> frozenset[Node]:
    """The quantization and the views behind it that a product reads: empty if nothing is quantized."""
    x_name, weight_name, _, _ = PRODUCTS[operator_name(node)]
    given = arguments(node, lambda operand: operand)
    found: set[Node] = set()
    for operand, kinds in ((given[x_name], DEQUANTIZE_ACTIVATION), (given[weight_name], DEQUANTIZE)):
        base = base_of(operand)
        if operator_name_or_empty(base) in kinds:
            while operand is not base:
                found.add(operand)
                operand = operand.all_input_nodes[0]
            found |= quantization(base)
    return frozenset(found)


def is_static(node: Node, source: Source) -> bool:
    """Whether ``node`` dequantizes data that is no constant, with parameters that are not chosen at run time."""
    if operator_name_or_empty(node) not in DEQUANTIZE_ACTIVATION:
        return False
    given = arguments(node, lambda operand: operand)
    scale = given.get("scale", given.get("scales"))
    chosen = isinstance(scale, Node) and not source.is_constant(scale)
    return not chosen and not source.is_constant(given["input"])


def operator_name_or_empty(node: Node) -> str:
    return operator_name(node) if node.op == "call_function" else ""


def _orientation(view: View, weight: QuantizedWeight, rows_first: bool) -> bool:
    """False if the stored matrix is [N, K], True if it is [K, N]; raises Refused if it is neither."""
    if any(size != 1 and stride for size, stride in zip(view.shape[:-2], view.strides[:-2], strict=True)):
        raise Refused("its weight is a batch of matrices: only one matrix for all is supported")
    sizes, strides = view.shape[-2:], view.strides[-2:]
    if len(sizes) != 2:
        raise Refused("its weight is a vector: only matrices are supported")
    (n, k), (stride_n, stride_k) = (sizes, strides) if rows_first else (sizes[::-1], strides[::-1])
    if weight.shape == (n, k) and (stride_k == 1 or k == 1) and (stride_n == k or n == 1):
        return False
    if weight.shape == (k, n) and (stride_n == 1 or n == 1) and (stride_k == n or k == 1):
        return True
    raise Refused("its quantized weight is rearranged before the product")


def _emit(
    t: Translator,
    x: Value,
    addend: Value | None,
    weight: QuantizedWeight,
    transposed: bool,
    dtype: DType,
    activation: QuantizedActivation | None,
    source: Source,
    given: dict[str, object],
) -> Value:
    data, scale, zero_point = weight_values(weight, transposed, dtype, source)
    zeros = () if zero_point is None else (None, zero_point)
    attributes = {
        "group_size": data.shape[1] // max(scale.shape[1], 1),
        "activation": "none",
        **(activation.attributes if activation else {}),
    }
    alpha, beta = float(given.get("alpha", 1)), float(given.get("beta", 1))  # type: ignore[arg-type]
    fits = addend is not None and addend.constant and addend.shape == (data.shape[0],)
    if fits and alpha == 1 and beta == 1:
        return t.op("quantized_linear", x, data, scale, addend, *zeros, **attributes)
    product = t.op("quantized_linear", x, data, scale, None, *zeros, **attributes)
    return product if addend is None else add_product(t, addend, product, beta, alpha)
