"""A session: one graph on one device, ready to be called."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from torchvk import ops
from torchvk.errors import ArgumentError, ArgumentTypeError, ClosedError
from torchvk.graph import Graph
from torchvk.runtime.device import Device, DeviceInfo, max_tier, open_device
from torchvk.runtime.execution import Execution
from torchvk.runtime.memory import Allocation, Use
from torchvk.runtime.plan import Constant, Plan, make_plan
from torchvk.runtime.upload import upload_constants

Array = np.ndarray[Any, Any]

MAX_EXECUTIONS = 8
REFERENCE = "reference"


class Session:
    """One graph on one device, callable from several threads, until ``close()``.

    device: index, name substring, None (TORCHVK_DEVICE, else the best), or "reference" for the NumPy references.
    poison: fill outputs and temporaries with 0xFF before every run, to find kernels that read or leave gaps.
    max_tier: cap of the capability tier (default TORCHVK_MAX_TIER). staged: copy through staging buffers even
    where the host reaches device memory.
    """

    def __init__(
        self,
        graph: Graph,
        device: str | int | None = None,
        *,
        poison: bool = False,
        max_tier: int | None = None,
        staged: bool = False,
    ) -> None:
        ops.check(graph)
        self.graph = graph
        self._lock = threading.Lock()
        self._resources: _Resources | None = None
        self._closed = False
        if device != REFERENCE:
            self._resources = _Resources(open_device(device), graph, poison, max_tier, staged)
            self._finalizer = weakref.finalize(self, self._resources.close)
            with self._lock:
                self._resources.execution(self._shapes())

    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(self.graph.tensors[index].shape for index in self.graph.inputs)

    @property
    def device(self) -> DeviceInfo | None:
        """The device, or None for the references."""
        return None if self._resources is None else self._resources.device.info

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """The graph's outputs for these inputs; new arrays.

        Raises ArgumentError or ArgumentTypeError, naming the input, unless number, shapes and dtypes are right.
        """
        arrays = self._checked(inputs)
        with self._lock:
            if self._closed:
                raise ClosedError("this session is closed")
            if self._resources is None:
                return run_reference(self.graph, arrays)
            return self._resources.execution(self._shapes()).run(arrays)

    def _checked(self, inputs: Sequence[Array]) -> list[Array]:
        graph = self.graph
        if len(inputs) != len(graph.inputs):
            names = ", ".join(f"{graph.tensors[i].name}: {graph.tensors[i].type}" for i in graph.inputs)
            raise ArgumentError(f"{len(inputs)} inputs were given, {len(graph.inputs)} are taken ({names})")
        arrays = []
        for index, value in zip(graph.inputs, inputs, strict=True):
            tensor = graph.tensors[index]
            if not isinstance(value, np.ndarray | np.generic):
                raise ArgumentTypeError(
                    f"input {tensor.name!r} is a {type(value).__name__}, expected an array of {tensor.type}"
                )
            if value.dtype != tensor.dtype.numpy:
                raise ArgumentTypeError(f"input {tensor.name!r} has dtype {value.dtype}, expected {tensor.type}")
            if value.shape != tensor.shape:
                raise ArgumentError(f"input {tensor.name!r} has shape {list(value.shape)}, expected {tensor.type}")
            arrays.append(np.asarray(value))
        return arrays

    def close(self) -> None:
        """Free everything. Waits for a call that runs in another thread; calls after it raise ClosedError."""
        with self._lock:
            self._closed = True
            if self._resources is not None:
                self._finalizer()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Resources:
    """What a session owns on the device."""

    def __init__(self, device: Device, graph: Graph, poison: bool, tier: int | None, staged: bool) -> None:
        self.device = device
        self.graph = graph
        self._poison = poison
        self._staged = staged
        self._capabilities = device.physical.capabilities(max_tier(tier))
        self._constants: dict[Constant, Allocation] = {}
        self._executions: OrderedDict[object, Execution] = OrderedDict()
        types = device.allocator.types
        self._stage_inputs = staged or types["direct"] is None
        self._stage_outputs = staged or types["result"] is None
        self._uses: dict[str, Use] = {
            "input": "upload" if self._stage_inputs else "direct",
            "output": "download" if self._stage_outputs else "result",
            "arena": "device",
        }

    def execution(self, shapes: object) -> Execution:
        """The recorded plan for these input shapes; made on first use, the least recently used one dropped."""
        if shapes in self._executions:
            self._executions.move_to_end(shapes)
            return self._executions[shapes]
        plan = self._plan()
        missing = [constant for constant in plan.constants if constant not in self._constants]
        self._check_memory(plan, missing)
        self._constants.update(upload_constants(self.device, self.graph, missing, staged=self._staged))
        made = Execution(self.device, self.graph, plan, self._constants, self._uses, self._poison)
        self._executions[shapes] = made
        if len(self._executions) > MAX_EXECUTIONS:
            self._executions.popitem(last=False)[1].close()
        return made

    def _plan(self) -> Plan:
        return make_plan(
            self.graph, self._capabilities, stage_inputs=self._stage_inputs, stage_outputs=self._stage_outputs
        )

    def _check_memory(self, plan: Plan, missing: Sequence[Constant]) -> None:
        constants = sum(self.graph.tensors[constant.tensor].type.nbytes for constant in missing)
        arena = plan.arena_bytes
        need: dict[Use, int] = {}
        use: Use
        for use, size in (
            ("direct" if not self._stage_inputs else "device", constants),
            ("device", arena),
            (self._uses["input"], plan.input_bytes),
            (self._uses["output"], plan.output_bytes),
        ):
            need[use] = need.get(use, 0) + size
        self.device.allocator.check(need)

    def close(self) -> None:
        for execution in self._executions.values():
            execution.close()
        for allocation in self._constants.values():
            self.device.allocator.free(allocation)
        self._executions.clear()
        self._constants = {}


def run_reference(graph: Graph, inputs: Sequence[Array]) -> list[Array]:
    """The graph by the operators' NumPy references, node by node."""
    values: dict[int, Array] = dict(zip(graph.inputs, inputs, strict=True))

    def value(index: int | None) -> Array | None:
        if index is None:
            return None
        if index not in values:
            values[index] = graph.constant_array(index)
        return values[index]

    for node in graph.nodes:
        operator = ops.get(node.op)
        outputs = operator.reference(operator.decode(node), [value(index) for index in node.inputs])
        values.update(zip(node.outputs, outputs, strict=True))
    # Copies: an output may be an input or a constant, and belongs to the caller.
    return [np.array(value(index), dtype=graph.tensors[index].dtype.numpy) for index in graph.outputs]
