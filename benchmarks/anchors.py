"""PyTorch's own kernels on the same GPU: matrix products in CUDA graphs, weights rotated past the caches.

A graph holds ``layers`` products one after the other, so that launches cost
nothing; times are medians by CUDA events.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np


def available() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def graph_seconds(body: Callable[[], Any], layers: int, repeats: int = 20) -> float:
    """Seconds of one of the ``layers`` that ``body`` launches, captured in a CUDA graph."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        body()
    for _ in range(20):
        graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return float(np.median(times)) / layers


def host_seconds(body: Callable[[], Any], repeats: int) -> float:
    """Median seconds of ``body`` by the host's clock, after a first run."""
    body()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        body()
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def bf16(m: int, n: int, k: int, layers: int = 20) -> float:
    """Seconds of a bfloat16 linear."""
    import torch

    sets = max(1, min(layers, (400 << 20) // (2 * n * k) + 1))
    w = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    y = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)

    def body() -> None:
        for i in range(layers):
            torch.matmul(x, w[i % sets].T, out=y)

    return graph_seconds(body, layers)


def int8(m: int, n: int, k: int, layers: int = 20) -> float | None:
    """Seconds of int8 × int8 → int32 (``torch._int_mm``, which takes M above 16 only)."""
    import torch

    if m <= 16:
        return None
    sets = max(1, min(layers, (400 << 20) // (n * k) + 1))
    w = [torch.randint(-128, 128, (n, k), device="cuda", dtype=torch.int8) for _ in range(sets)]
    x = torch.randint(-128, 128, (m, k), device="cuda", dtype=torch.int8)
    y = torch.empty(m, n, device="cuda", dtype=torch.int32)

    def body() -> None:
        for i in range(layers):
            torch._int_mm(x, w[i % sets].T, out=y)

    try:
        return graph_seconds(body, layers)
    except RuntimeError:
        return None


def int4(m: int, n: int, k: int, layers: int = 20) -> float | None:
    """Seconds of bfloat16 × int4 in groups of 32 (``torch._weight_int4pack_mm``, "tinygemm")."""
    import torch

    sets = max(1, min(layers, (400 << 20) // (n * k // 2) + 1))
    try:
        packed = [
            torch._convert_weight_to_int4pack(
                torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.int32).to(torch.uint8), 8
            )
            for _ in range(sets)
        ]
        scales = [torch.rand(k // 32, n, 2, device="cuda").to(torch.bfloat16) for _ in range(sets)]
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)

        def body() -> None:
            for i in range(layers):
                torch._weight_int4pack_mm(x, packed[i % sets], 32, scales[i % sets])

        return graph_seconds(body, layers)
    except RuntimeError:
        return None
