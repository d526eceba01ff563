"""One quantized linear through Program.__call__, side by side with NumPy's float32 matmul; and loading MiniLM.

    python -m benchmarks.call [--device NAME] [--json FILE]

All columns of a row are measured in turns in one run, host copies included; the smallest time of many counts, since
whatever else the machine does only adds. NumPy's time is the CPU's own speed: on lavapipe it says how far the
CPU driver is from it, on a GPU it is no anchor.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.console import Console

import torchvk
from benchmarks import network

K = N = 1024
SECONDS = 2.0  # for each row


@dataclass(frozen=True)
class LinearResult:
    """Times in seconds; ``kernels`` by the device's timestamps. bytes and flops: of the kernels, counted."""

    scheme: str
    m: int
    call: float
    numpy: float
    kernels: float
    bytes: int
    flops: int


@dataclass(frozen=True)
class LoadResult:
    """``host_bytes``: peak resident memory that loading added, less the device's share of it."""

    seconds: float
    file_bytes: int
    host_bytes: int
    device_bytes: int


def smallest(*functions: Callable[[], Any]) -> list[float]:
    """Smallest time of each, called in turns for SECONDS."""
    times = [float("inf")] * len(functions)
    for function in functions:
        function()
    until = time.perf_counter() + SECONDS
    while time.perf_counter() < until:
        for position, function in enumerate(functions):
            start = time.perf_counter()
            function()
            times[position] = min(times[position], time.perf_counter() - start)
    return times


def quantized_linear(scheme: str, m: int) -> bytes:
    """A .pte of one linear N = K = 1024 on float32 [m, 1024]."""
    import torch
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_api import (
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        quantize_,
    )
    from torchao.utils import unwrap_tensor_subclass

    from torchvk.partitioner.vulkan_partitioner import VulkanPartitioner

    model = torch.nn.Sequential(torch.nn.Linear(K, N, bias=False)).eval()
    config = {
        "8da4w": Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32)),
        "4w": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    }
    if scheme in config:
        quantize_(model, config[scheme])
        unwrap_tensor_subclass(model)
    exported = torch.export.export(model, (torch.randn(m, K),))
    edge = to_edge_transform_and_lower(exported, partitioner=[VulkanPartitioner()])
    buffer: bytes = edge.to_executorch().buffer
    return buffer


def measure_linear(scheme: str, m: int, device: str | None) -> LinearResult:
    """One row of the table."""
    generator = np.random.default_rng(m)
    x = generator.standard_normal((m, K), dtype=np.float32)
    w = generator.standard_normal((N, K), dtype=np.float32)
    with torchvk.load(quantized_linear(scheme, m), device) as program:
        call, peer = smallest(lambda: program(x), lambda: x @ w.T)
        profiles = [program.profile(x) for _ in range(20)]
    best = min(profiles, key=lambda profile: sum(record.seconds for record in profile.records))
    return LinearResult(
        scheme,
        m,
        call,
        peer,
        sum(record.seconds for record in best.records),
        sum(record.bytes for record in best.records),
        sum(record.flops for record in best.records),
    )


def measure_python(device: str | None) -> float:
    """Python's share of a call in seconds: a program of one delegate and four inputs, less submit and wait."""
    import torch
    from executorch.exir import to_edge_transform_and_lower

    from torchvk.partitioner.vulkan_partitioner import VulkanPartitioner
    from torchvk.runtime.execution import Execution

    class Sum(torch.nn.Module):
        def forward(self, a: Any, b: Any, c: Any, d: Any) -> Any:
            return a * b + c * d

    tensors = tuple(torch.randn(4, 16) for _ in range(4))
    edge = to_edge_transform_and_lower(torch.export.export(Sum(), tensors), partitioner=[VulkanPartitioner()])
    arrays = [tensor.numpy() for tensor in tensors]
    waited = 0.0
    submit = Execution._submit

    def timed(self: Execution, submission: Any) -> None:
        nonlocal waited
        start = time.perf_counter()
        submit(self, submission)
        waited += time.perf_counter() - start

    def share() -> float:
        nonlocal waited
        waited = 0.0
        start = time.perf_counter()
        program(*arrays)
        return time.perf_counter() - start - waited

    with torchvk.load(edge.to_executorch().buffer, device) as program:
        Execution._submit = timed  # type: ignore[method-assign]
        try:
            return float(np.median([share() for _ in range(2000)]))
        finally:
            Execution._submit = submit  # type: ignore[method-assign]


LOAD = """
import json, sys, time
import torchvk
from torchvk.runtime.device import open_device

def status(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

device = open_device(sys.argv[2] or None)
before = status("VmRSS")
start = time.perf_counter()
program = torchvk.load(sys.argv[1], sys.argv[2] or None)
seconds = time.perf_counter() - start
peak = status("VmHWM")
allocated = device.allocator.usage()[1]
print(json.dumps([seconds, peak - before, allocated if device.info.kind == "cpu" else 0, allocated]))
"""


def measure_load(device: str | None, folder: Path) -> LoadResult:
    """Load the 8da4w MiniLM (batch 1, 128 tokens) in a fresh process without torch."""
    import torch
    from executorch.exir import to_edge_transform_and_lower

    from examples.sentence_encoder import SENTENCES, load_encoder, quantize, tokenize
    from torchvk.partitioner.vulkan_partitioner import VulkanPartitioner

    path = folder / "minilm-8da4w.pte"
    inputs = tokenize(SENTENCES[:1], 128)
    exported = torch.export.export(quantize(load_encoder(), "8da4w", inputs), inputs)
    to_edge_transform_and_lower(exported, partitioner=[VulkanPartitioner()]).to_executorch().save(str(path))
    # The first load fills the pipeline cache, as a first start of the user's does.
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", LOAD, str(path), device or ""], check=True, capture_output=True, text=True
        )
    seconds, grown, shared, allocated = json.loads(done.stdout)
    return LoadResult(seconds, path.stat().st_size, grown - shared, allocated)


HEADS = ("scheme", "M", "call", "NumPy fp32", "ratio", "kernels", "GB/s", "GFLOP/s")


def cells(result: LinearResult) -> list[str]:
    return [
        result.scheme,
        str(result.m),
        f"{result.call * 1e6:.0f} µs",
        f"{result.numpy * 1e6:.0f} µs",
        f"{result.call / result.numpy:.1f}",
        f"{result.kernels * 1e6:.0f} µs",
        f"{result.bytes / result.kernels / 1e9:.1f}",
        f"{result.flops / result.kernels / 1e9:.1f}",
    ]


def main(device: network.DeviceOption = None, output: network.JsonOption = None) -> None:
    """Measure one quantized linear and the loading of MiniLM."""
    warnings.filterwarnings("ignore")
    console = Console()
    with console.status("measuring") as status, tempfile.TemporaryDirectory() as folder:
        results = []
        for scheme in ("8da4w", "4w", "fp32"):
            for m in (1, 32):
                status.update(f"{scheme}, M = {m}")
                results.append(measure_linear(scheme, m, device))
        status.update("Python's share of a call")
        python = measure_python(device)
        status.update("loading MiniLM")
        load = measure_load(device, Path(folder))
    title = f"Linear N = K = {K}, float32 in and out, on {network.device_name(device)}"
    console.print(network.table(title, HEADS, map(cells, results)))
    console.print(f"Python's share of a call with four inputs: {python * 1e6:.0f} µs")
    console.print(
        f"Loading MiniLM 8da4w: {load.seconds:.2f} s, file {load.file_bytes / 1e6:.1f} MB, host memory "
        f"{load.host_bytes / 1e6:.1f} MB ({load.host_bytes / load.file_bytes:.2f} of the file), "
        f"device memory {load.device_bytes / 1e6:.1f} MB"
    )
    network.write_json(output, device, results, python=python, load=asdict(load))


if __name__ == "__main__":
    typer.run(main)
