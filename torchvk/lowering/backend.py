"""The delegate as exir sees it."""

from __future__ import annotations

from typing import final

from executorch.exir.backend.backend_details import BackendDetails, PreprocessResult
from executorch.exir.backend.compile_spec_schema import CompileSpec
from torch.export import ExportedProgram

from torchvk.errors import UnsupportedError
from torchvk.graph import to_bytes
from torchvk.lowering.lower import lower
from torchvk.lowering.options import CompileOptions


@final
class TorchVkBackend(BackendDetails):  # type: ignore[misc]  # executorch is untyped
    """Turns a partition into the bytes of a :class:`torchvk.graph.Graph`; its name is the delegate's id."""

    @staticmethod
    def preprocess(edge_program: ExportedProgram, compile_specs: list[CompileSpec]) -> PreprocessResult:
        """Lower one partition; called by exir."""
        options = CompileOptions.from_specs((spec.key, spec.value) for spec in compile_specs)
        try:
            graph = lower(edge_program, options)
        except UnsupportedError as error:
            raise UnsupportedError(
                f"{error}. The partitioner saw no values of parameters, which only to_edge_transform_and_lower shows "
                "it: use that, or keep these operators or modules on the CPU by a blocklist of VulkanPartitioner"
            ) from None
        return PreprocessResult(processed_bytes=to_bytes(graph))
