"""Asking a device where the lanes of a subgroup hold the elements of a cooperative matrix."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from torchvk import shaders
from torchvk.errors import TorchVkError
from torchvk.graph import Graph
from torchvk.ops import Dispatch
from torchvk.ops.fragments import Fragment
from torchvk.ops.operator import read, write
from torchvk.runtime.execution import Execution
from torchvk.runtime.steps import ALIGNMENT, PADDING, Plan, Step, Storage

if TYPE_CHECKING:
    from torchvk.runtime.device import Device

log = logging.getLogger("torchvk.vulkan")

MAX_ELEMENTS = 64  # of a lane, in the kernels' results


def probe(device: Device) -> tuple[Fragment, ...]:
    """Matrix A in float16 and int8 of every shape for which there is a kernel. What cannot be told is left out."""
    found = []
    capabilities = device.physical.capabilities()
    for shape in capabilities.cooperative_matrices:
        kernel = f"matrix_probe_{shape.a}_{shape.m}x{shape.n}x{shape.k}x{capabilities.subgroup_size}"
        types = (shape.a, shape.b, shape.result)
        if types in (("float16", "float16", "float32"), ("int8", "int8", "int32")) and kernel in shaders.names():
            try:
                fragment = _probe(device, kernel, shape.m, shape.k, capabilities.subgroup_size, shape.a)
            except TorchVkError as error:
                log.info("%s failed: %s", kernel, error)
                continue
            if fragment is not None:
                found.append(fragment)
    return tuple(found)


def _probe(device: Device, kernel: str, rows: int, columns: int, lanes: int, dtype: str) -> Fragment | None:
    """Run matrix_probe.slang on the numbers 0, 1, 2, …; int8 takes them in two digits."""
    numbers = np.arange(rows * columns).astype(np.float16)
    if dtype == "int8":
        numbers = np.concatenate([np.arange(rows * columns) % 128, np.arange(rows * columns) // 128]).astype(np.int8)
    size = 4 * (MAX_ELEMENTS * lanes + 1)
    # Both in host memory: a few kilobytes.
    start = -(-numbers.nbytes // ALIGNMENT) * ALIGNMENT
    storages = (Storage("input", numbers.nbytes), Storage("input", -(-size // PADDING) * PADDING, start))
    step = Step(None, Dispatch(kernel, (read(0), write(0)), (1, 1, 1)), (0, 1), (0,), (1,))
    plan = Plan(storages, ((step,),), (), (), (), start + storages[1].nbytes, 0, 0)
    uses: Any = {"input": "upload", "output": "upload", "arena": "device", "constant": "device"}
    with device.lock:
        execution = Execution(device, Graph((), (), (), ()), plan, {}, uses, poison=False)
        try:
            execution.buffer_bytes(storages[0])[:] = numbers.view(np.uint8)
            execution.run([])
            words = execution.buffer_bytes(storages[1])[:size].view(np.uint32).copy()
        finally:
            execution.close()
    count = int(words[-1])
    if not 0 < count <= MAX_ELEMENTS:
        return None
    table = words[:-1].reshape(lanes, MAX_ELEMENTS)[:, :count]
    fragment = Fragment(rows, columns, lanes, tuple(table.reshape(-1).tolist()), dtype)
    return fragment if fragment.complete else None
