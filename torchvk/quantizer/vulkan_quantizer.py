"""The PT2E quantizer: finds each operator's configuration and asks its family to annotate it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import ObserverOrFakeQuantize
from torchao.quantization.pt2e.quantizer import EdgeOrNode, QuantizationConfig, Quantizer

from torchvk.errors import ArgumentError, ArgumentTypeError
from torchvk.quantizer.annotation import Scope, is_call
from torchvk.quantizer.arithmetic import annotate_arithmetic
from torchvk.quantizer.config import check_config, get_symmetric_quantization_config
from torchvk.quantizer.constants import constant_nodes, constant_value
from torchvk.quantizer.conv import annotate_convolutions
from torchvk.quantizer.elementwise import annotate_activations
from torchvk.quantizer.embedding import annotate_embeddings
from torchvk.quantizer.inplace import replace_in_place, written_tensors
from torchvk.quantizer.linear import annotate_linears, annotate_products
from torchvk.quantizer.movement import annotate_joins, annotate_move
from torchvk.quantizer.normalization import annotate_normalization
from torchvk.quantizer.pooling import annotate_pooling
from torchvk.quantizer.settings import Settings, class_name, module_path, operator_name
from torchvk.quantizer.weights import is_weight, validate_weights

__all__ = ["VulkanQuantizer", "get_symmetric_quantization_config"]

_log = logging.getLogger(__name__)

# A family each: scope → the nodes that it annotated. Those that compute come first: they take the clamps behind them.
_FAMILIES: tuple[Callable[[Scope], list[Node]], ...] = (
    annotate_linears,
    annotate_convolutions,
    annotate_embeddings,
    annotate_products,
    annotate_arithmetic,
    annotate_pooling,
    annotate_joins,
    annotate_activations,
)
# Families that do as their neighbours do: node by node, in the order of the graph.
_FOLLOWERS: tuple[Callable[[Node, Scope], bool], ...] = (annotate_move, annotate_normalization)


class VulkanQuantizer(Quantizer):  # type: ignore[misc]  # torchao is untyped
    """Annotates the floating-point operators of an exported model; all other nodes stay as they are.

    >>> quantizer = VulkanQuantizer().set_global(get_symmetric_quantization_config())
    >>> prepared = prepare_pt2e(torch.export.export(model, inputs).module(), quantizer)
    >>> prepared(*inputs)
    >>> quantized = convert_pt2e(prepared)

    Weight-only and dynamic configurations are for linears and for 1-d and 2-d convolutions, plain and transposed.
    Static ones also quantize what computes with or moves activations: add, sub, mul (by tensors or numbers), products
    of two activations, cat and stack, max, average and adaptive pooling, mean, nearest upsampling, activation
    functions (ReLU, hardtanh, clamp, hardswish, hardsigmoid, sigmoid, SiLU, GELU, tanh, leaky ReLU, ELU), and beside
    quantized neighbours softmax, layer norm, views, slices, permutations, splits and zero padding. A batch norm behind
    a convolution, and a ReLU or clamp behind anything that computes, belong to it: nothing is quantized in between.
    Embedding tables, one scale a row, are quantized where a setting other than the global one names them.

    Which configuration an operator gets, most specific first: that of the innermost module around it with a setting by
    name, of the innermost with a setting by type, that of its operator, the global one. None leaves it in floating
    point. A filter function, if set, must agree.
    """

    def __init__(self) -> None:
        super().__init__()
        self.settings = Settings()

    def set_global(self, quantization_config: QuantizationConfig) -> VulkanQuantizer:
        """Use ``quantization_config`` for the whole model; returns self.

        Raises ``ArgumentTypeError`` for another type of object and ``UnsupportedError`` for a configuration that
        torchvk does not run; see :func:`get_symmetric_quantization_config` for those that it does.
        """
        self.settings.default = check_config(quantization_config)
        return self

    def set_module_name(self, module_name: str, quantization_config: QuantizationConfig | None) -> VulkanQuantizer:
        """Use ``quantization_config`` for the module of this path (``"layer1.0.conv2"``) and all inside of it, None
        for no quantization there; returns self. Raises as :meth:`set_global`."""
        if not isinstance(module_name, str) or not module_name:
            raise ArgumentTypeError(
                f"module_name must be the path of a module, such as 'layer1.conv', not {module_name!r}"
            )
        self.settings.names[module_name] = _checked(quantization_config)
        return self

    def set_module_type(
        self, module_type: type[torch.nn.Module], quantization_config: QuantizationConfig | None
    ) -> VulkanQuantizer:
        """Use ``quantization_config`` in all modules of exactly this class (``torch.nn.Conv2d``, or one of your own),
        None for no quantization there; returns self. Raises as :meth:`set_global`."""
        self.settings.types[class_name(module_type)] = _checked(quantization_config)
        return self

    def set_object_type(self, object_type: Any, quantization_config: QuantizationConfig | None) -> VulkanQuantizer:
        """Use ``quantization_config`` for an operator wherever it is, None for no quantization of it; returns self.

        ``object_type`` is an ATen operator (``torch.ops.aten.conv2d``; an overload stands for all of them) or a
        function that one is named after (``torch.nn.functional.conv2d``, ``torch.add``). Raises as
        :meth:`set_global`.
        """
        self.settings.objects[operator_name(object_type)] = _checked(quantization_config)
        return self

    def set_filter_function(self, filter_fn: Callable[[Node], bool]) -> VulkanQuantizer:
        """Quantize only nodes that ``filter_fn`` returns True for; returns self.

        It is asked for the node that computes (the convolution, not the ReLU behind it), and not for views, which
        share the parameters of their input.
        """
        if not callable(filter_fn):
            raise ArgumentTypeError(f"filter_fn must be callable, not {type(filter_fn).__name__}")
        self.settings.filter = filter_fn
        return self

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Replace in-place operators by plain ones where that makes no difference; returns ``model``.

        Python scalars stay what they are: to turn them into tensors, as other quantizers do here, would change the
        dtype of integer arithmetic on indices and masks.
        """
        replace_in_place(model)
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotate ``model`` in place and return it.

        Raises ``ArgumentError`` when there is no configuration at all, or one has groups that do not divide the input
        channels of a linear.
        """
        if self.settings.is_empty():
            raise ArgumentError(
                "VulkanQuantizer has no quantization configuration: call "
                "set_global(get_symmetric_quantization_config(...)) first, or one of its other setters"
            )
        scope = Scope(model, frozenset(constant_nodes(model)), frozenset(written_tensors(model)), self.settings)
        count = sum(len(annotate_family(scope)) for annotate_family in _FAMILIES)
        for node in model.graph.nodes:
            if node not in scope.constants:
                count += any(follow(node, scope) for follow in _FOLLOWERS)
        for setting in self.settings.unused([node for node in model.graph.nodes if is_call(node)]):
            _log.warning("VulkanQuantizer: %s applies to no operator of the model", setting)
        if count == 0:
            _log.warning("VulkanQuantizer found no floating-point operator with a configuration to quantize")
        else:
            _log.info("VulkanQuantizer annotated %d operators", count)
        return model

    def validate(self, model: GraphModule) -> None:
        """Check that annotated linears, convolutions and embeddings quantize constant weights and no bias.

        Raises ``UnsupportedError`` naming the node. Annotations of other operators are other quantizers'.
        """
        validate_weights(model)

    def prepare_obs_or_fq_callback(
        self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[EdgeOrNode, ObserverOrFakeQuantize]
    ) -> None:
        """Show every weight to its observer at once, and tell the other observers whose values they will see.

        Raises ``ArgumentError``, which names the module, for a weight that is not finite.

        Otherwise a model converted without a calibration run would have all weight scales 1. Weights do not depend
        on calibration data, and observing them once more when it comes changes nothing.
        """
        constants = constant_nodes(model)
        with torch.no_grad():
            for edge, observer in edge_or_node_to_obs_or_fq.items():
                if observer is None:
                    continue
                if isinstance(edge, tuple):
                    argument, user = edge
                    if is_weight(argument, user) and argument in constants:
                        observer(_finite(constant_value(model, argument), module_path(user) or user.name))
                        continue
                where = edge[0] if isinstance(edge, tuple) else edge
                range_of = getattr(observer, "activation_post_process", observer)
                if hasattr(range_of, "where"):
                    path = module_path(where)
                    range_of.where = f"{where.name} (of the module {path})" if path else where.name


def _finite(weight: torch.Tensor, where: str) -> torch.Tensor:
    if not bool(torch.isfinite(weight).all()):
        raise ArgumentError(f"the weight of {where} holds NaN or infinite values: it has no scale")
    return weight


def _checked(config: QuantizationConfig | None) -> QuantizationConfig | None:
    return None if config is None else check_config(config)
