"""Time an operator on the device as a model runs it: a recorded chain of dependent layers, by timestamps.

Layer i reads what layer i - 1 wrote, so that the barriers of a real model stand between them; every dispatch of the
operator counts (activation quantization, the product, roundings). Weight sets rotate over more bytes than caches
hold, the data are random, and the clocks are warm before the first time that counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from torchvk import ops
from torchvk.graph import DType, Graph, TensorType, pack_bits
from torchvk.ops import Arg, Capabilities, Kernels
from torchvk.ops.operator import Array
from torchvk.runtime.device import Device
from torchvk.runtime.execution import Execution
from torchvk.runtime.memory import Allocation
from torchvk.runtime.plan import Draft
from torchvk.runtime.steps import Constant, Plan

ROTATED_BYTES = 400 << 20  # weights that a chain goes through before it meets the first again
WARM_SECONDS = 1.0
REPEATS = 20

KernelChoice = Callable[[Any, Sequence[TensorType | None], Sequence[TensorType], Capabilities], Kernels]


@dataclass(frozen=True)
class Timing:
    """Median seconds a layer, the spread of it (largest less smallest), and what the kernels say of their work."""

    seconds: float
    spread: float
    dispatches: int
    bytes: int
    flops: int


@dataclass(frozen=True)
class Layer:
    """One operator with fixed types. ``constants``: data of its constant inputs by slot, int4 unpacked to int8."""

    op: str
    attributes: Any
    inputs: tuple[TensorType | None, ...]
    constants: dict[int, Array]

    def with_rows(self, m: int) -> Layer:
        """The same layer for x of m rows."""
        x = self.inputs[0]
        assert x is not None
        return replace(self, inputs=(TensorType(x.dtype, (m, *x.shape[1:])), *self.inputs[1:]))


def quantized_linear(
    m: int,
    n: int,
    k: int,
    *,
    bits: int = 4,
    group: int = 32,
    activation: str = "none",
    dtype: DType = DType.FLOAT32,
    bias: bool = True,
    zeros: bool = False,
    seed: int = 0,
) -> Layer:
    """y [m, n] of x [m, k] with random weights in groups (``group`` 0: per output channel), with zero points if
    ``zeros``, scaled so that a long chain of them neither grows nor fades."""
    rng = np.random.default_rng(seed)
    group = group or k
    low, high = (-127, 128) if bits == 8 else (-(1 << (bits - 1)), 1 << (bits - 1))
    weight = rng.integers(low, high, (n, k), np.int8)
    rms = float(np.sqrt(np.mean(weight[:64].astype(np.float32) ** 2) * k))
    scale_dtype = np.float16 if dtype is DType.FLOAT16 else np.float32
    scale = (rng.uniform(0.8, 1.2, (n, k // group)) / rms).astype(scale_dtype)
    constants: dict[int, Array] = {1: weight, 2: scale}
    types: list[TensorType | None] = [
        TensorType(dtype, (m, k)),
        TensorType(DType(f"int{bits}"), (n, k)),
        TensorType(DType.of(scale.dtype), scale.shape),
    ]
    if bias:
        constants[3] = (0.1 * rng.standard_normal(n)).astype(dtype.numpy)
        types.append(TensorType(dtype, (n,)))
    if zeros:
        constants[5] = rng.integers(low, high, scale.shape, np.int8)
        types += [None] * (5 - len(types)) + [TensorType(DType.INT8, scale.shape)]
    attributes = ops.get("quantized_linear").attributes(group_size=group, activation=activation)
    return Layer("quantized_linear", attributes, tuple(types), constants)


def linear(m: int, n: int, k: int, *, dtype: DType = DType.FLOAT32, bias: bool = True, seed: int = 0) -> Layer:
    """y [m, n] of x [m, k] in floating point."""
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((n, k), np.float32) / np.sqrt(k)).astype(dtype.numpy)
    constants: dict[int, Array] = {1: weight}
    types: list[TensorType | None] = [TensorType(dtype, (m, k)), TensorType(dtype, (n, k), constant=True)]
    if bias:
        constants[2] = (0.1 * rng.standard_normal(n)).astype(dtype.numpy)
        types.append(TensorType(dtype, (n,)))
    return Layer("linear", ops.get("linear").attributes(), tuple(types), constants)


def measure(
    device: Device,
    layer: Layer,
    *,
    layers: int = 50,
    max_tier: int | None = None,
    kernels: KernelChoice | None = None,
    variant: str | None = None,
    repeats: int = REPEATS,
    warm: float = WARM_SECONDS,
    rotated: int = ROTATED_BYTES,
) -> Timing:
    """Run the chain; ``kernels`` takes the place of the operator's own choice, ``variant`` names one of its own."""
    operator = ops.get(layer.op)
    capabilities = device.physical.capabilities(max_tier)
    outputs = operator.infer(layer.attributes, layer.inputs)
    case = (layer.attributes, layer.inputs, outputs, capabilities)
    chosen = (kernels or operator.kernels)(*case) if variant is None else dict(operator.variants(*case))[variant]
    weights = sum(type.nbytes for slot, type in enumerate(layer.inputs) if type is not None and slot)
    sets = max(1, min(layers, -(-rotated // max(weights, 1))))
    plan, wanted = _plan(layer, outputs[0], chosen, capabilities, layers, sets)
    constants: dict[Constant, Allocation] = {}
    with device.lock:
        try:
            constants.update(_upload(device, layer, wanted))
            graph = Graph((), (), (), ())
            uses: Any = {"input": "direct", "output": "result", "arena": "device", "constant": "direct"}
            execution = Execution(device, graph, plan, constants, uses, poison=False)
            try:
                _fill(execution, plan, layer.inputs[0])
                until = time.perf_counter() + warm
                while time.perf_counter() < until:
                    execution.measure(1)
                times = execution.measure(repeats)
            finally:
                execution.close()
        finally:
            for allocation in constants.values():
                device.allocator.free(allocation)
    times = sorted(seconds / layers for seconds in times)
    return Timing(
        seconds=float(np.median(times)),
        spread=times[-1] - times[0],
        dispatches=len(chosen.dispatches),
        bytes=sum(dispatch.bytes for dispatch in chosen.dispatches),
        flops=sum(dispatch.flops for dispatch in chosen.dispatches),
    )


def _plan(
    layer: Layer, output: TensorType, kernels: Kernels, capabilities: Capabilities, layers: int, sets: int
) -> tuple[Plan, list[tuple[Constant, int, Any, int]]]:
    """The chain's plan and its constants as (key, slot, layout, number of the weight set)."""
    draft = Draft(Graph((), (), (), ()), capabilities)
    x = layer.inputs[0]
    assert x is not None
    size = max(x.nbytes, output.nbytes)
    ends = [draft.storage("input", size), draft.storage("input", size)]
    known: dict[tuple[int, str, int], int] = {}
    wanted: list[tuple[Constant, int, Any, int]] = []

    def weight(arg: Arg, number: int) -> int:
        key = (arg.index, arg.layout.name if arg.layout else "", number % sets)
        if key not in known:
            constant = Constant(len(wanted), arg.layout)
            type = layer.inputs[arg.index]
            assert type is not None
            known[key] = draft.storage("constant", type.nbytes, len(draft.constants))
            draft.constants.append(constant)
            wanted.append((constant, arg.index, arg.layout, number % sets))
        return known[key]

    for number in range(layers):
        scratch = [draft.storage("arena", nbytes) for nbytes in kernels.scratch]

        def storage_of(arg: Arg, number: int = number, scratch: list[int] = scratch) -> int:
            if arg.role == "scratch":
                return scratch[arg.index]
            if arg.role == "output" or arg.index == 0:
                return ends[(number + (arg.role == "output")) % 2]
            return weight(arg, number)

        draft.steps += [draft.step(0, dispatch, storage_of) for dispatch in kernels.dispatches]
    plan = draft.plan(draft.steps, tuple(ends), ())
    # The two ends are buffers like inputs, of no tensor.
    return replace(plan, inputs=()), wanted


def _upload(
    device: Device, layer: Layer, wanted: Sequence[tuple[Constant, int, Any, int]]
) -> dict[Constant, Allocation]:
    packed: dict[tuple[int, str], Array] = {}
    result: dict[Constant, Allocation] = {}
    for constant, slot, layout, number in wanted:
        key = (slot, layout.name if layout else "")
        if key not in packed:
            data = layer.constants[slot]
            type = layer.inputs[slot]
            if layout is not None:
                data = layout.pack(data)
            elif type is not None and type.dtype.packed:
                data = pack_bits(data, type.dtype.bits)
            packed[key] = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        data = packed[key]
        allocation = device.allocator.allocate(data.size, "direct", "weights of the benchmark")
        result[constant] = allocation
        # Other sets hold the same values elsewhere: as random, at the cost of a copy.
        turn = 4096 * 37 * number % max(data.size, 1) // 64 * 64 if data.size > 1 << 16 else 0
        target = allocation.bytes()
        target[: data.size - turn] = data[turn:]
        target[data.size - turn : data.size] = data[:turn]
    return result


def _fill(execution: Execution, plan: Plan, x: TensorType | None) -> None:
    """Random activations in both ends of the chain."""
    assert x is not None
    rng = np.random.default_rng(1)
    for storage in plan.storages:
        if storage.kind != "input" or storage.whole is not None:
            continue
        raw = execution.buffer_bytes(storage)
        values = rng.standard_normal(raw.size // x.dtype.numpy.itemsize, np.float32).astype(x.dtype.numpy)
        raw[: values.nbytes] = values.view(np.uint8)
