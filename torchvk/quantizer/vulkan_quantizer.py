"""The PT2E quantizer: asks each operator family to annotate its nodes, one configuration for the whole model."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import ObserverOrFakeQuantize
from torchao.quantization.pt2e.quantizer import EdgeOrNode, QuantizationConfig, Quantizer
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from torchvk.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from torchvk.quantizer.config import check_config, get_symmetric_quantization_config
from torchvk.quantizer.constants import constant_nodes, constant_value
from torchvk.quantizer.linear import annotate_linears, linear_operands

__all__ = ["VulkanQuantizer", "get_symmetric_quantization_config"]

_log = logging.getLogger(__name__)

# One annotator per operator family: (model, configuration, filter) -> the nodes that it annotated.
_ANNOTATORS: tuple[Callable[..., list[Node]], ...] = (annotate_linears,)


class VulkanQuantizer(Quantizer):  # type: ignore[misc]  # torchao is untyped
    """Annotates the floating-point linears of an exported model; all other nodes stay as they are.

    >>> quantizer = VulkanQuantizer().set_global(get_symmetric_quantization_config())
    >>> prepared = prepare_pt2e(torch.export.export(model, inputs).module(), quantizer)
    >>> prepared(*inputs)
    >>> quantized = convert_pt2e(prepared)
    """

    def __init__(self) -> None:
        super().__init__()
        self.global_config: QuantizationConfig | None = None
        self.filter_function: Callable[[Node], bool] | None = None

    def set_global(self, quantization_config: QuantizationConfig) -> VulkanQuantizer:
        """Use ``quantization_config`` for the whole model; returns self.

        Raises ``ArgumentTypeError`` for another type of object and ``UnsupportedError`` for a configuration that
        torchvk does not run; see :func:`get_symmetric_quantization_config` for those that it does.
        """
        self.global_config = check_config(quantization_config)
        return self

    def set_filter_function(self, filter_fn: Callable[[Node], bool]) -> VulkanQuantizer:
        """Quantize only nodes that ``filter_fn`` returns True for; returns self."""
        if not callable(filter_fn):
            raise ArgumentTypeError(f"filter_fn must be callable, not {type(filter_fn).__name__}")
        self.filter_function = filter_fn
        return self

    def transform_for_annotation(self, model: GraphModule) -> GraphModule:
        """Returns ``model`` unchanged.

        Linears need no preparation, and to turn Python scalars into tensors, as other quantizers do here, would
        change the dtype of integer arithmetic on indices and masks.
        """
        return model

    def annotate(self, model: GraphModule) -> GraphModule:
        """Annotate ``model`` in place and return it; raises ``ArgumentError`` when ``set_global`` was not called."""
        if self.global_config is None:
            raise ArgumentError(
                "VulkanQuantizer has no quantization configuration: call "
                "set_global(get_symmetric_quantization_config(...)) first"
            )
        count = sum(len(annotator(model, self.global_config, self.filter_function)) for annotator in _ANNOTATORS)
        if count == 0:
            _log.warning("VulkanQuantizer found no floating-point linear with a constant weight to quantize")
        else:
            _log.info("VulkanQuantizer annotated %d linears", count)
        return model

    def validate(self, model: GraphModule) -> None:
        """Check that each annotated linear quantizes a constant weight, and nothing but its input and weight.

        Raises ``UnsupportedError`` naming the node. Annotations of other operators are other quantizers'.
        """
        constants = constant_nodes(model)
        for node in model.graph.nodes:
            operands, annotation = linear_operands(node), node.meta.get(Q_ANNOTATION_KEY)
            if operands is None or annotation is None:
                continue
            if annotation.output_qspec is not None:
                raise UnsupportedError(f"{node.name}: a quantized output of a linear is not supported")
            for argument, spec in annotation.input_qspec_map.items():
                if spec is None:
                    continue
                if argument is not operands.input and argument is not operands.weight:
                    raise UnsupportedError(f"{node.name}: {argument.name}, neither input nor weight, is quantized")
                if argument is operands.weight and argument not in constants:
                    raise UnsupportedError(f"{node.name}: the weight {argument.name} is not a constant")

    def prepare_obs_or_fq_callback(
        self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[EdgeOrNode, ObserverOrFakeQuantize]
    ) -> None:
        """Show every weight to its observer at once.

        Otherwise a model converted without a calibration run would have all weight scales 1. Weights do not depend
        on calibration data, and observing them once more when it comes changes nothing.
        """
        with torch.no_grad():
            for edge, observer in edge_or_node_to_obs_or_fq.items():
                if not isinstance(edge, tuple):
                    continue
                argument, user = edge
                operands = linear_operands(user)
                if operands is not None and argument is operands.weight:
                    observer(constant_value(model, argument))
