"""What the device can do at most, measured in the same run as what is compared with it: copy bandwidth (bytes read
plus bytes written), and multiply-adds on registers alone, for each unit that kernels use."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from torchvk.graph import Graph
from torchvk.ops import Capabilities, Dispatch
from torchvk.ops.operator import Arg
from torchvk.runtime.device import Device
from torchvk.runtime.execution import Execution
from torchvk.runtime.steps import Plan, Step, Storage

CHAINS = 16  # independent accumulators of an invocation, as shaders/peak.slang has them
EMPTY = Graph((), (), (), ())


@dataclass(frozen=True)
class Limits:
    """bandwidth: bytes a second. The others in operations a second (a multiply-add is two), 0 where the device has no
    such unit: float32, dot8 (packed 8-bit dot products), float16 and int8 matrix units."""

    bandwidth: float
    float32: float
    dot8: float
    float16: float
    int8: float


def measure_limits(device: Device, max_tier: int | None = None) -> Limits:
    """Seconds of work on a GPU; less on a CPU, where the figures are rough."""
    capabilities = device.physical.capabilities(max_tier)
    return Limits(
        copy_bandwidth(device),
        peak(device, "peak_float32", capabilities, 2),
        peak(device, "peak_dot8", capabilities, 8),
        matrix_peak(device, capabilities, "float16", "float32"),
        matrix_peak(device, capabilities, "int8", "int32"),
    )


def copy_bandwidth(device: Device) -> float:
    """Of a copy from device memory to device memory by a kernel, 16 bytes a load. (Copy commands may be slower.)"""
    cpu = device.info.kind == "cpu"
    size = 32 << 20 if cpu else 1 << 30
    local_size = min(device.physical.vulkan11.subgroupSize if cpu else 256, 256)
    iterations = 64 if cpu else 4
    groups = size // (16 * iterations * local_size)
    dispatch = Dispatch(
        "peak_copy",
        (Arg("output", 0, write=True, read=False), Arg("output", 1)),
        (groups, 1, 1),
        (local_size,),
        struct.pack("<2I", iterations, 3),
    )
    storages = (Storage("arena", size, 0), Storage("arena", size, size))
    copies = 4
    stages = tuple((Step(0, dispatch, (1 - i % 2, i % 2), (i % 2,), (1 - i % 2,)),) for i in range(copies))
    return copies * 2 * size / _best(device, Plan(storages, stages, (), (), (), 0, 0, 2 * size), repeats=10)


def peak(device: Device, kernel: str, capabilities: Capabilities, operations: int, local_size: int = 256) -> float:
    """Operations a second of a kernel whose invocations each do ``operations`` a multiply-add."""
    cpu = capabilities.kind == "cpu"
    local_size = capabilities.subgroup_size if cpu else min(local_size, capabilities.max_workgroup_invocations)
    groups = 8 if cpu else 4096
    iterations = 256 if cpu else 1024
    dispatch = Dispatch(
        kernel,
        (Arg("output", 0, write=True, read=False),),
        (groups, 1, 1),
        (local_size,),
        struct.pack("<2I", iterations, 3),
    )
    step = Step(0, dispatch, (0,), (), (0,))
    seconds = _best(device, Plan((Storage("arena", 256, 0),), ((step,),), (), (), (), 0, 0, 256))
    return groups * local_size * iterations * CHAINS * operations / seconds


def matrix_peak(device: Device, capabilities: Capabilities, element: str, accumulator: str) -> float:
    """Of the largest cooperative matrix with these types that the device lists and peak.slang has."""
    found = 0.0
    for shape in capabilities.cooperative_matrices:
        if (shape.a, shape.b, shape.c, shape.result) != (element, element, accumulator, accumulator):
            continue
        kernel = f"peak_{element}_{shape.m}x{shape.n}x{shape.k}"
        if kernel in KERNELS:
            # A subgroup shares a matrix: so many operations an invocation.
            work = 2 * shape.m * shape.n * shape.k / capabilities.subgroup_size
            found = max(found, peak(device, kernel, capabilities, 1) * work)
    return found


KERNELS = {
    *("peak_float16_16x16x16", "peak_float16_8x8x16", "peak_float16_8x16x16", "peak_float16_8x8x8"),
    *("peak_int8_16x16x32", "peak_int8_16x16x16", "peak_int8_8x8x32", "peak_int8_8x16x32", "peak_int8_8x8x8"),
}


def _best(device: Device, plan: Plan, repeats: int = 20) -> float:
    """Smallest time of many: what else the machine does only adds."""
    with device.lock:
        uses = {"input": "direct", "output": "result", "arena": "device", "constant": "direct"}
        execution = Execution(device, EMPTY, plan, {}, uses, poison=False)  # type: ignore[arg-type]
        try:
            execution.measure(3)
            return min(execution.measure(repeats))
        finally:
            execution.close()
