"""Which nodes of an edge program go to the GPU, and in words why the others do not."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, final

import torch
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult
from executorch.exir.backend.utils import tag_constant_data
from torch.export import ExportedProgram
from torch.fx import Node

from torchvk.lowering.analysis import analyze
from torchvk.lowering.backend import TorchVkBackend
from torchvk.lowering.options import CompileOptions
from torchvk.lowering.source import Source
from torchvk.partitioner.choice import Choice
from torchvk.partitioner.integer_products import simplify_products
from torchvk.partitioner.out_variants import declare_out_variants
from torchvk.partitioner.report import Refusal, refusals
from torchvk.partitioner.stages import partitions

_log = logging.getLogger("torchvk.partitioner")

__all__ = ["Refusal", "VulkanPartitioner"]


@final
class VulkanPartitioner(Partitioner):  # type: ignore[misc]  # executorch is untyped
    """Hands to Vulkan what torchvk runs; for ``executorch.exir.to_edge_transform_and_lower(partitioner=[…])``.

    Args:
        compile_options: ``force_fp16`` computes in float16 inside of delegates, with float32 at their borders;
            integers of static quantization are not touched.
            ``require_dynamic_shapes`` claims only what runs with other shapes than the exported ones, which is
            nothing so far. Both are False by default.
        operator_blocklist: operators that stay on the CPU, as overloads (``exir_ops.edge.aten.add.Tensor``,
            ``torch.ops.aten.add.Tensor``), packets (``torch.ops.aten.add``) or names (``"aten.add.Tensor"``).
        operator_allowlist: if given, no other operators are claimed. An allowed matrix product takes the quantize
            and dequantize nodes and the views that belong to it with it; ``aten.linear`` stands for all products that
            exir makes of a linear.
        nn_module_blocklist, nn_module_allowlist: parts of qualified class names of modules, such as ``"Linear"``;
            nodes from a module (or one inside of it) of such a class are not claimed, or are the only ones claimed.

    Attributes:
        report: a :class:`Refusal` for every node that was not claimed, in order of the calls of :meth:`partition`.
            The logger ``torchvk.partitioner`` says the same at level INFO.
        claimed: how many nodes were claimed.

    Raises:
        ArgumentError, ArgumentTypeError: an unknown compile option, or a value of the wrong type.
    """

    def __init__(
        self,
        compile_options: Mapping[str, Any] | None = None,
        operator_blocklist: Iterable[Any] | None = None,
        operator_allowlist: Iterable[Any] | None = None,
        nn_module_blocklist: Iterable[str] | None = None,
        nn_module_allowlist: Iterable[str] | None = None,
    ) -> None:
        super().__init__()
        self.options = CompileOptions.parse(compile_options)
        self._choice = Choice.parse(operator_blocklist, operator_allowlist, nn_module_blocklist, nn_module_allowlist)
        self._parameters = KnownParameters()
        self.report: list[Refusal] = []
        self.claimed = 0

    def transform_for_pre_decomposition(self, exported_program: ExportedProgram) -> ExportedProgram:
        """Called by exir first, with the real program."""
        self._parameters.remember(exported_program)
        return simplify_products(exported_program)

    def ops_to_not_decompose(
        self, ep: ExportedProgram
    ) -> tuple[list[torch._ops.OpOverload], Callable[[Node], bool] | None]:
        """None: linears are recognized in whatever exir decomposes them to, and stay runnable if nobody claims them."""
        self._parameters.remember(ep)
        return [], None

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """Tag the nodes that torchvk runs; called by exir."""
        source = Source(exported_program, self._parameters.find)
        analysis = analyze(source, self.options, self._choice.reason)
        groups = partitions(source, analysis)
        specs = [CompileSpec(key, value) for key, value in self.options.to_specs()]
        tags = {}
        for number, group in enumerate(groups):
            tag = f"torchvk_{number}"
            tags[tag] = DelegationSpec(TorchVkBackend.__name__, specs)
            for node in group:
                node.meta["delegation_tag"] = tag
        tag_constant_data(exported_program)
        nested_users_first(exported_program)
        declare_out_variants(analysis.refused)
        new = refusals(source, analysis)
        for refusal in new:
            _log.info("%s", refusal)
        count = sum(map(len, groups))
        _log.info("claimed %d nodes in %d partitions, left %d to the CPU", count, len(groups), len(new))
        self.report.extend(new)
        self.claimed += count
        return PartitionResult(tagged_exported_program=exported_program, partition_tags=tags)


def nested_users_first(program: ExportedProgram) -> None:
    """Let a constant's users that hold it in a list (the program's output, cat) come first.

    exir gives every user of a shared constant but the first a copy of its own, by looking for the constant among the
    user's arguments, not inside lists: such a user must be the one that keeps the original.
    """
    for node in program.graph.nodes:
        if node.op == "placeholder" and "delegation_tag" in node.meta:
            node.users = dict.fromkeys(
                sorted(node.users, key=lambda user: node in user.args or node in user.kwargs.values())
            )


class KnownParameters:
    """Parameters and buffers of the programs that exir has shown, without keeping them alive."""

    def __init__(self) -> None:
        self._programs: list[weakref.WeakValueDictionary[str, torch.Tensor]] = []

    def remember(self, program: ExportedProgram) -> None:
        self._programs = [tensors for tensors in self._programs if len(tensors)]
        self._programs.append(weakref.WeakValueDictionary(program.state_dict))

    def find(self, name: str, like: torch.Tensor) -> list[torch.Tensor]:
        """Every tensor that had this name, shape and dtype (methods lowered together may share names)."""
        found = (tensors.get(name) for tensors in self._programs)
        return [t for t in found if t is not None and t.shape == like.shape and t.dtype == like.dtype]
