"""Times the variants of an operator on the device at hand.

Each variant runs as a short chain of layers that wait for each other, on the graph's own constants (as many sets of
them as the graph has bytes, so that caches help no more than in the model) and random activations, by the device's
timestamps. Variants take turns, so that a changing clock meets all of them alike.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from torchvk import ops
from torchvk.errors import DeviceLostError, OutOfMemoryError, TorchVkError
from torchvk.graph import DType, Graph, TensorType
from torchvk.ops import Arg, Capabilities, Kernels
from torchvk.runtime.device import Device
from torchvk.runtime.execution import Execution, pipeline_keys
from torchvk.runtime.memory import Allocation, Use
from torchvk.runtime.plan import Draft
from torchvk.runtime.steps import Constant, Kind, Plan
from torchvk.runtime.upload import Bytes, Source, constant_bytes, upload

log = logging.getLogger("torchvk.vulkan")

ROTATED_BYTES = 256 << 20  # of constants that a chain goes through at most
CHAIN_FLOPS, CHAIN_BYTES = 2e10, 1e9  # that make a chain long enough to time
LAYERS = 16  # of a chain at most
ROUNDS, THOROUGH_ROUNDS = 7, 50
SCREENED = 2  # rounds after which what takes twice the time of another is out
WARM_SECONDS, THOROUGH_WARM_SECONDS = 0.02, 0.5


@dataclass(frozen=True)
class Case:
    """Nodes of one shape class. ``node``: the first of ``count`` of them."""

    key: str
    node: int
    count: int
    attributes: Any
    inputs: tuple[TensorType | None, ...]
    outputs: tuple[TensorType, ...]
    variants: ops.Variants

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.variants)

    @property
    def cost(self) -> float:
        """Roughly proportional to the time that the nodes take: by flops or, a hundredfold, by bytes."""
        work = self.variants[0][1].dispatches
        return self.count * max(sum(d.flops for d in work) / 100, sum(d.bytes for d in work))


class Bench:
    """Times variants of cases of one graph."""

    def __init__(
        self,
        device: Device,
        graph: Graph,
        capabilities: Capabilities,
        uses: Mapping[Kind, Use],
        staged: bool,
    ) -> None:
        self._device = device
        self._graph = graph
        self._capabilities = capabilities
        self._uses = uses
        self._staged = staged
        self._warm = False

    def run(self, wanted: Sequence[Case], deadline: float, thorough: bool) -> dict[str, dict[str, float | None]]:
        """{shape class: {variant: seconds a layer}} of the cases for which there was time."""
        measured: dict[str, dict[str, float | None]] = {}
        chains = {case.key: self._chains(case) for case in wanted}
        pipelines = self._device.pipelines
        # All of them are compiled at once, in the order in which they are needed.
        for case in wanted:
            for chain in chains[case.key].values():
                pipelines.start(pipeline_keys(chain.plan))
        for number, case in enumerate(wanted):
            keys = [key for chain in chains[case.key].values() for key in pipeline_keys(chain.plan)]
            if not pipelines.ready(keys, deadline):
                log.info("no time to tune %s: its kernels are still being compiled", case.key)
                continue
            left = deadline - time.perf_counter()
            until = time.perf_counter() + left / (len(wanted) - number)
            if left > 0 and (seconds := self._measure(case, chains[case.key], until, thorough)):
                measured[case.key] = seconds
        pipelines.cancel()
        return measured

    def _chains(self, case: Case) -> dict[str, Chain]:
        sets = self._sets(case)
        layers = _layers(case.variants[0][1], sets)
        packed: dict[tuple[int, str], _Once] = {}
        return {
            name: chain_of(self._graph, case, kernels, self._capabilities, layers, sets, packed)
            for name, kernels in case.variants
        }

    def _sets(self, case: Case) -> int:
        """So many sets of constants that they are as many bytes as the model's, within bounds."""
        node = self._graph.nodes[case.node]
        slots = [index for index in node.inputs if index is not None and self._graph.tensors[index].data is not None]
        own = sum(self._graph.tensors[index].type.nbytes for index in slots)
        whole = sum(tensor.type.nbytes for tensor in self._graph.tensors if tensor.data is not None)
        heap = self._device.allocator.room(self._uses["constant"])
        return max(1, min(LAYERS, min(whole, ROTATED_BYTES, heap // 4) // max(own, 1)))

    def _measure(
        self, case: Case, chains: Mapping[str, Chain], until: float, thorough: bool
    ) -> dict[str, float | None]:
        """Seconds a layer of every variant (None for one that cannot run); empty if there was no time."""
        device = self._device
        constants: dict[Constant, Allocation] = {}
        executions: dict[str, Execution] = {}
        try:
            sources: dict[Constant, Source] = {}
            for chain in chains.values():
                sources.update(chain.sources)
            constants = upload(device, sources, staged=self._staged)
            for name, chain in chains.items():
                if (execution := self._execution(chain, constants, name)) is not None:
                    executions[name] = execution
            times = self._rounds(executions, until, thorough)
        except DeviceLostError:
            raise
        except TorchVkError as error:
            log.info("%s is not tuned: %s", case.key, error)
            return {}
        finally:
            for execution in executions.values():
                execution.close()
            for allocation in constants.values():
                device.allocator.free(allocation)
        return {name: times[name] / chains[name].layers if name in times else None for name in case.names if times}

    def _execution(self, chain: Chain, constants: Mapping[Constant, Allocation], name: str) -> Execution | None:
        """None where the driver refuses a kernel."""
        try:
            return Execution(self._device, EMPTY, chain.plan, constants, self._uses, poison=False)
        except (DeviceLostError, OutOfMemoryError):
            raise
        except TorchVkError as error:
            log.warning("variant %s cannot run: %s", name, error)
            return None

    def _rounds(self, executions: Mapping[str, Execution], until: float, thorough: bool) -> dict[str, float]:
        """The median seconds of every chain; empty if there was no time for two rounds."""
        if not executions:
            return {}
        begin = time.perf_counter()
        first = next(iter(executions.values()))
        first.measure(1)
        if (time.perf_counter() - begin) * len(executions) * SCREENED > until - begin:
            return {}  # too slow a device to be kept busy with this
        warm = begin + (THOROUGH_WARM_SECONDS if thorough else WARM_SECONDS)
        while not self._warm and time.perf_counter() < min(warm, until):
            first.measure(1)
        self._warm = True
        times: dict[str, list[float]] = {name: [] for name in executions}
        for number in range(THOROUGH_ROUNDS if thorough else ROUNDS):
            fastest = min((min(values) for values in times.values() if values), default=math.inf)
            for name, execution in executions.items():
                if number >= SCREENED and min(times[name]) > 2 * fastest:
                    continue
                times[name] += execution.measure(1)
            if time.perf_counter() > until:
                break
        if any(len(values) < SCREENED for values in times.values()):
            return {}
        return {name: float(np.median(values)) for name, values in times.items()}


EMPTY = Graph((), (), (), ())


@dataclass(frozen=True)
class Chain:
    """A plan of so many layers of one node, and what its constants hold."""

    plan: Plan
    layers: int
    sources: Mapping[Constant, Source]


def _layers(kernels: Kernels, sets: int) -> int:
    flops = sum(dispatch.flops for dispatch in kernels.dispatches)
    nbytes = sum(dispatch.bytes for dispatch in kernels.dispatches)
    long = int(min(CHAIN_FLOPS / max(flops, 1), CHAIN_BYTES / max(nbytes, 1)))
    return max(1, min(max(sets, 4), LAYERS, long))


class _Once:
    """Bytes that are made when first asked for, by one of the threads that ask."""

    def __init__(self, make: Callable[[], Bytes]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made: Bytes | None = None

    def __call__(self) -> Bytes:
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made


def _random(type: TensorType) -> Bytes:
    """Normal floats; zeros for integers, which may be indices of anything."""
    raw = np.zeros(type.nbytes, np.uint8)
    if type.dtype in (DType.FLOAT32, DType.FLOAT16):
        values = np.random.default_rng(0).standard_normal(1 << 14, np.float32).astype(type.dtype.numpy)
        raw[:] = np.resize(values.view(np.uint8), raw.size)
    return raw


def chain_of(
    graph: Graph,
    case: Case,
    kernels: Kernels,
    capabilities: Capabilities,
    layers: int,
    sets: int,
    packed: dict[tuple[int, str], _Once],
) -> Chain:
    """Layers that write two outputs by turns, each after the one before it. Layer i takes the i-th of the ``sets`` of
    constants, which are copies; other inputs are random, and constants here like the rest. ``packed``: what the
    chains of a case share."""
    node = graph.nodes[case.node]
    draft = Draft(EMPTY, capabilities)
    turns = [[draft.storage("arena", type.nbytes) for type in case.outputs] for _ in range(2)]
    inputs: dict[Constant, int] = {}
    sources: dict[Constant, Source] = {}

    def input_storage(arg: Arg, number: int) -> int:
        tensor, type = node.inputs[arg.index], case.inputs[arg.index]
        assert tensor is not None
        assert type is not None
        fixed = graph.tensors[tensor].data is not None
        constant = Constant(arg.index * LAYERS + (number % sets if fixed else 0), arg.layout)
        if constant not in inputs:
            make = partial(constant_bytes, graph, Constant(tensor, arg.layout)) if fixed else partial(_random, type)
            read = packed.setdefault((arg.index, arg.layout.name if arg.layout else ""), _Once(make))
            sources[constant] = Source(f"input {arg.index} of a timed {node.op!r}", type.nbytes, read)
            inputs[constant] = draft.storage("constant", type.nbytes, len(draft.constants))
            draft.constants.append(constant)
        return inputs[constant]

    for number in range(layers):
        before, outputs = turns[number % 2 - 1], turns[number % 2]
        own = {"scratch": [draft.storage("arena", nbytes) for nbytes in kernels.scratch], "output": outputs}

        def storage_of(arg: Arg, number: int = number, own: dict[str, list[int]] = own) -> int:
            return input_storage(arg, number) if arg.role == "input" else own[arg.role][arg.index]

        for dispatch in kernels.dispatches:
            # As if the layer read what the last one wrote; really it reads the same again.
            waits = (before[0],) if number else ()
            draft.steps.append(draft.step(case.node, dispatch, storage_of, waits))
    return Chain(draft.plan(draft.steps, (), ()), layers, sources)
