"""A session: one graph on one device, ready to be called."""

from __future__ import annotations

import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from torchvk import ops
from torchvk.errors import ArgumentError, ArgumentTypeError, ClosedError, DeviceLostError
from torchvk.graph import Graph
from torchvk.ops import MatmulPrecision
from torchvk.runtime import reference
from torchvk.runtime.device import Device, DeviceInfo, default_request, forget, max_tier, open_device
from torchvk.runtime.device import matmul_precision as asked_precision
from torchvk.runtime.execution import Execution, pipeline_keys
from torchvk.runtime.memory import Allocation, Use
from torchvk.runtime.plan import make_plan
from torchvk.runtime.profile import ProfileRow
from torchvk.runtime.steps import Constant, Kind, Plan
from torchvk.runtime.tune import Tuning, tuned_variants
from torchvk.runtime.upload import upload_constants

Array = np.ndarray[Any, Any]

MAX_EXECUTIONS = 8


@dataclass(frozen=True)
class SessionDescription:
    """Facts about a session. Bytes are those of device memory; the references use none."""

    device: str
    operators: Mapping[str, int]
    constant_bytes: int
    arena_bytes: int
    input_bytes: int
    output_bytes: int
    dispatches: int
    copies: int
    barriers: int


class Session:
    """One graph on one device, callable from several threads (calls queue up), until :meth:`close`.

    device: index, name substring, None (TORCHVK_DEVICE, else the best), or "reference" for the NumPy references.
    poison: fill outputs and temporaries with 0xFF before every run, to find kernels that leave gaps.
    max_tier: cap of the capability tier (default TORCHVK_MAX_TIER). staged: go through staging buffers even where
    the host reaches device memory. tuned: the variant to run for a shape class (see ops.shape_class). tuning: find
    that out by timing, or from what was found out before.
    matmul_precision: "highest" or "high" (default TORCHVK_MATMUL_PRECISION, else "highest"); see :func:`torchvk.load`.
    Raises FormatError for a graph that makes no sense, UnsupportedError where a limit of the device is passed,
    OutOfMemoryError, VulkanError and ArgumentError for the device.
    """

    def __init__(
        self,
        graph: Graph,
        device: str | int | None = None,
        *,
        poison: bool = False,
        max_tier: int | None = None,
        staged: bool = False,
        tuned: Mapping[str, str] | None = None,
        tuning: Tuning | None = None,
        matmul_precision: str | None = None,
    ) -> None:
        ops.check(graph)
        precision = asked_precision(matmul_precision)
        self.graph = graph
        self._types = [graph.tensors[index].type for index in graph.inputs]
        self._expected = [(type.dtype.numpy, type.shape) for type in self._types]
        if device is None:
            device = default_request()
        self._runner: _OnDevice | _OnReference
        if device == reference.NAME:
            self._runner = _OnReference(graph)
            return
        self._runner = _OnDevice(open_device(device), graph, poison, max_tier, staged, tuned, tuning, precision)
        self._finalizer = weakref.finalize(self, self._runner.abandon)
        try:
            self._runner.prepare(tuple(type.shape for type in self._types))
        except BaseException:
            self.close()
            raise

    @property
    def device(self) -> DeviceInfo | None:
        """The device, or None for the references."""
        return self._runner.device.info if isinstance(self._runner, _OnDevice) else None

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """The graph's outputs for these inputs, as new arrays. Any strides will do.

        Raises ArgumentError or ArgumentTypeError, naming the input, unless number, shapes and dtypes are right;
        ClosedError after close().
        """
        return self._runner.run(self._checked(inputs))

    def profile(self, inputs: Sequence[Array]) -> list[ProfileRow]:
        """Run once, one dispatch at a time, and measure each by the device's timestamps; a row a dispatch.

        (On "reference": a row a node, by the host's clock.) Takes the same inputs as :meth:`run`.
        """
        return self._runner.profile(self._checked(inputs))

    def measure(self, inputs: Sequence[Array], repeats: int = 20) -> list[float]:
        """Run so often, and give the seconds that the device took each time from the first dispatch to the end of the
        last, by its timestamps; copies from and to the host are not in them.

        (On "reference": by the host's clock.) Takes the same inputs as :meth:`run`.
        """
        return self._runner.measure(self._checked(inputs), repeats)

    def describe(self) -> SessionDescription:
        """Counts and sizes."""
        return self._runner.describe()

    def _checked(self, inputs: Sequence[Array]) -> Sequence[Array]:
        if len(inputs) == len(self._expected) and all(
            isinstance(value, np.ndarray) and value.dtype == dtype and value.shape == shape
            for value, (dtype, shape) in zip(inputs, self._expected, strict=True)
        ):
            return inputs
        return _explain(self.graph, inputs)

    def close(self) -> None:
        """Free everything. Waits for a call that runs in another thread; calls after it raise ClosedError."""
        self._runner.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _explain(graph: Graph, inputs: Sequence[Any]) -> list[Array]:
    """What is wrong with the inputs, as an exception; NumPy scalars pass as 0-D arrays."""
    if len(inputs) != len(graph.inputs):
        names = ", ".join(f"{graph.tensors[i].name}: {graph.tensors[i].type}" for i in graph.inputs)
        raise ArgumentError(f"{len(inputs)} inputs were given, {len(graph.inputs)} are taken ({names})")
    for position, (index, value) in enumerate(zip(graph.inputs, inputs, strict=True)):
        tensor = graph.tensors[index]
        where = f"input {position} ({tensor.name!r})"
        if not isinstance(value, np.ndarray | np.generic):
            raise ArgumentTypeError(f"{where} is a {type(value).__name__}, expected a NumPy array of {tensor.type}")
        given = f"{value.dtype}{list(value.shape)}"
        if value.dtype != tensor.dtype.numpy:
            raise ArgumentTypeError(f"{where} is {given}, expected {tensor.type}: the dtypes differ")
        if value.shape != tensor.shape:
            raise ArgumentError(f"{where} is {given}, expected {tensor.type}: the shapes differ")
    return [np.asarray(value) for value in inputs]


class _OnReference:
    """The NumPy references behind a session."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._closed = False

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        return self._run(inputs)[0]

    def profile(self, inputs: Sequence[Array]) -> list[ProfileRow]:
        return self._run(inputs)[1]

    def measure(self, inputs: Sequence[Array], repeats: int) -> list[float]:
        return [sum(row.seconds for row in self.profile(inputs)) for _ in range(repeats)]

    def _run(self, inputs: Sequence[Array]) -> tuple[list[Array], list[ProfileRow]]:
        if self._closed:
            raise ClosedError("this session is closed")
        return reference.run(self._graph, inputs)

    def describe(self) -> SessionDescription:
        operators = dict(Counter(node.op for node in self._graph.nodes))
        return SessionDescription(reference.NAME, operators, 0, 0, 0, 0, 0, 0, 0)

    def close(self) -> None:
        self._closed = True


class _OnDevice:
    """What a session owns on a Vulkan device. Its lock makes calls queue up."""

    def __init__(
        self,
        device: Device,
        graph: Graph,
        poison: bool,
        tier: int | None,
        staged: bool,
        tuned: Mapping[str, str] | None,
        tuning: Tuning | None,
        precision: MatmulPrecision,
    ) -> None:
        self.device = device
        self._graph = graph
        self._lock = threading.Lock()
        self._closed = False
        self._poison = poison
        self._staged = staged
        self._tuned = tuned or {}
        self._tuning = None if device.info.kind == "cpu" and tuning and not tuning.on_cpu else tuning
        self._capabilities = replace(device.physical.capabilities(max_tier(tier)), matmul_precision=precision)
        self._constants: dict[Constant, Allocation] = {}
        # Shapes are static today: one entry. With symbolic shapes, one for each set of concrete ones.
        self._executions: OrderedDict[object, Execution] = OrderedDict()
        types = device.allocator.types
        self._stage_inputs = staged or types["direct"] is None
        self._stage_outputs = staged or types["result"] is None
        self._uses: dict[Kind, Use] = {
            "input": "upload" if self._stage_inputs else "direct",
            "output": "download" if self._stage_outputs else "result",
            "arena": "device",
            "constant": "device" if self._stage_inputs else "direct",
        }

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """A device that is lost within is not given to later sessions."""
        try:
            yield
        except DeviceLostError as error:
            forget(self.device)
            raise DeviceLostError(f"{error}; device {self.device.info.name!r} was lost, open a new session") from None

    def prepare(self, shapes: object) -> None:
        """Upload constants and record the plan for these input shapes; it becomes the one that runs."""
        with self._lock, self._watched(), self.device.lock:
            if shapes in self._executions:
                self._executions.move_to_end(shapes)
                return
            if self._tuning is not None:
                self._tuned = tuned_variants(
                    self.device, self._graph, self._capabilities, self._tuning, self._uses, self._staged
                )
            plan = make_plan(
                self._graph,
                self._capabilities,
                stage_inputs=self._stage_inputs,
                stage_outputs=self._stage_outputs,
                tuned=self._tuned,
            )
            missing = [constant for constant in plan.constants if constant not in self._constants]
            self._check_memory(plan, missing)
            # They are compiled while the constants are packed and uploaded.
            self.device.pipelines.start(pipeline_keys(plan))
            self._constants.update(upload_constants(self.device, self._graph, missing, staged=self._staged))
            self._executions[shapes] = Execution(
                self.device, self._graph, plan, self._constants, self._uses, self._poison
            )
            if len(self._executions) > MAX_EXECUTIONS:
                self._executions.popitem(last=False)[1].close()
        self.device.collect()

    def _check_memory(self, plan: Plan, missing: Sequence[Constant]) -> None:
        sizes: dict[Kind, int] = {
            "input": plan.input_bytes,
            "output": plan.output_bytes,
            "arena": plan.arena_bytes,
            "constant": sum(self._graph.tensors[constant.tensor].type.nbytes for constant in missing),
        }
        need: dict[Use, int] = {}
        for kind, size in sizes.items():
            need[self._uses[kind]] = need.get(self._uses[kind], 0) + size
        self.device.allocator.check(need)

    def _current(self) -> Execution:
        """The execution that runs; the caller holds the lock."""
        if self._closed:
            raise ClosedError("this session is closed")
        return next(reversed(self._executions.values()))

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        with self._lock, self._watched():
            return self._current().run(inputs)

    def measure(self, inputs: Sequence[Array], repeats: int) -> list[float]:
        with self._lock, self._watched():
            execution = self._current()
            execution.run(inputs)
            return execution.measure(repeats)

    def profile(self, inputs: Sequence[Array]) -> list[ProfileRow]:
        with self._lock, self._watched():
            execution = self._current()
            times = execution.profile(inputs)
        rows = []
        for step, (start, end) in zip(execution.plan.steps, times, strict=True):
            if step.node is None or step.dispatch is None:
                size = 2 * execution.plan.storages[step.buffers[0]].nbytes
                rows.append(ProfileRow("copy", "", "", 1, end - start, size, 0, start, end))
            else:
                node, work = self._graph.nodes[step.node], step.dispatch
                seconds = end - start
                rows.append(
                    ProfileRow(node.op, node.source, work.kernel, 1, seconds, work.bytes, work.flops, start, end)
                )
        return rows

    def describe(self) -> SessionDescription:
        with self._lock:
            plan = self._current().plan
            constants = sum(allocation.size for allocation in self._constants.values())
        dispatches = sum(step.dispatch is not None for step in plan.steps)
        return SessionDescription(
            device=str(self.device.info),
            operators=dict(Counter(node.op for node in self._graph.nodes)),
            constant_bytes=constants,
            arena_bytes=plan.arena_bytes,
            input_bytes=plan.input_bytes,
            output_bytes=plan.output_bytes,
            dispatches=dispatches,
            copies=len(plan.steps) - dispatches,
            barriers=plan.barriers,
        )

    def close(self) -> None:
        with self._lock:
            self._closed = True
            with self.device.lock:
                self._free()
        self.device.collect()

    def abandon(self) -> None:
        """Close from a finalizer: at the interpreter's exit, or wherever the garbage collector happens to run.

        No other thread can be in a call then, unless the interpreter exits under a daemon thread: the lock waits
        for it. The device's lock may be held by this very thread, so freeing is left to the device.
        """
        with self._lock:
            self._closed = True
        self.device.retire(self._free)

    def _free(self) -> None:
        for execution in self._executions.values():
            execution.close()
        for allocation in self._constants.values():
            self.device.allocator.free(allocation)
        self._executions.clear()
        self._constants = {}
