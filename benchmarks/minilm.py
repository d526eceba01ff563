"""A whole model on the device: the MiniLM sentence encoder, by timestamps, beside PyTorch; and the time to load it.

    python -m benchmarks.minilm [--device NAME] [--schemes fp16,8da4w] [--batches 1,32] [--json FILE]
    python -m benchmarks.minilm --save FOLDER     writes the models, without their weights, for other machines
    python -m benchmarks.minilm --files FOLDER    times such models, with random weights

The time of a call is from the first dispatch to the end of the last, without copies from and to the host; PyTorch's is
that of a CUDA graph with inputs on the GPU. ``/16``: computed in float16 (``force_fp16``). Loading is timed in fresh
processes, after imports: cold with an empty cache folder, warm with the one that the cold one left. Kernels with
variants are timed before (TORCHVK_TUNE=0 leaves them as the rules say), but not in the processes that load.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from benchmarks import network
from benchmarks.network import Peer, Times, microseconds

SCHEMES = {"fp32": ("fp32", False), "fp16": ("fp32", True), "8da4w": ("8da4w", False), "8da4w/16": ("8da4w", True)}
ALL = ",".join(SCHEMES)
TOKENS = 128
# Multiply-adds of a token: 4 projections, 2 of the inner layer, and 2 products with each of the other tokens.
FLOPS = 2 * 6 * (4 * 384 * 384 + 2 * 384 * 1536 + 2 * 384 * TOKENS)


@dataclass(frozen=True)
class Row:
    """cold, warm: seconds of loading, 0 if they were not taken. flops: of a call."""

    scheme: str
    batch: int
    times: Times
    flops: int
    peer: Peer
    cold: float
    warm: float


def lowered(scheme: str, batch: int) -> bytes:
    """The .pte of a scheme."""
    import torch
    from executorch.exir import to_edge_transform_and_lower

    from examples.sentence_encoder import SENTENCES, load_encoder, quantize, tokenize
    from torchvk.partitioner.vulkan_partitioner import VulkanPartitioner

    quantization, half = SCHEMES[scheme]
    inputs = tokenize((SENTENCES * -(-batch // len(SENTENCES)))[:batch], TOKENS)
    with torch.no_grad():
        exported = torch.export.export(quantize(load_encoder(), quantization, inputs), inputs)
        partitioner = VulkanPartitioner({"force_fp16": True} if half else None)
        buffer: bytes = to_edge_transform_and_lower(exported, partitioner=[partitioner]).to_executorch().buffer
    return buffer


def inputs_of(batch: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Sentences of 8 to 128 tokens, padded."""
    rng = np.random.default_rng(batch)
    lengths = rng.integers(8, TOKENS + 1, batch)
    mask = (np.arange(TOKENS) < lengths[:, None]).astype(np.int64)
    return rng.integers(0, 1000, (batch, TOKENS)), mask


def loaded(path: Path, cache: str, device: str | None) -> float:
    """Seconds to load in a fresh process: from torchvk.load to a program that can be called."""
    code = (
        "import sys, time, torchvk.runtime, torchvk.program; begin = time.perf_counter(); "
        "program = torchvk.load(sys.argv[1], device=sys.argv[2] or None); "
        "print(time.perf_counter() - begin); program.close()"
    )
    # NVIDIA's driver keeps a cache of its own, which would make cold warm.
    environment = {
        **os.environ,
        "TORCHVK_CACHE_DIR": cache,
        "TORCHVK_TUNE": "0",
        "__GL_SHADER_DISK_CACHE": "0",
    }
    command = [sys.executable, "-c", code, str(path), device or ""]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


HEADS = ("scheme", "batch", "device", "spread", "TFLOP/s", "PyTorch", "ratio", "call")
MORE_HEADS = ("dispatches", "barriers", "cold load", "warm load")


def cells(row: Row) -> list[str]:
    times, peer = row.times, row.peer
    return [
        row.scheme,
        str(row.batch),
        microseconds(times.seconds),
        microseconds(times.spread),
        f"{row.flops / times.seconds / 1e12:.1f}",
        microseconds(peer.peer_seconds) if peer.peer else "",
        f"{times.seconds / peer.peer_seconds:.2f}" if peer.peer else "",
        microseconds(times.call),
        str(times.dispatches),
        str(times.barriers),
        f"{row.cold:.2f} s" if row.cold else "",
        f"{row.warm:.2f} s" if row.warm else "",
    ]


def main(
    device: network.DeviceOption = None,
    schemes: network.ListOption = ALL,
    batches: network.ListOption = "1,32",
    save: network.SaveOption = None,
    files: network.FilesOption = None,
    torch: network.TorchOption = True,
    loads: Annotated[bool, typer.Option(help="Time loading.")] = True,
    profile: network.ProfileOption = False,
    output: network.JsonOption = None,
) -> None:
    """Time MiniLM on the device."""
    warnings.filterwarnings("ignore")
    console = Console(width=140)
    sizes = [int(batch) for batch in batches.split(",")]
    peers = dict.fromkeys(sizes, Peer())
    if torch and save is None:
        from benchmarks import bert

        peers = {batch: bert.peer(batch, TOKENS, inputs_of(batch)[1]) for batch in sizes}
    rows = []
    for scheme in schemes.split(","):
        for batch in sizes:
            with tempfile.TemporaryDirectory() as scratch:
                model, stem = partial(lowered, scheme, batch), f"minilm-{scheme}-{batch}"
                path = network.files_of(stem, model, save, files, Path(scratch), console)
                if path is None:
                    continue
                title = f"{scheme}, batch {batch}"
                times = network.measured(path, device, inputs_of(batch), console if profile else None, title)
                cache = str(Path(scratch) / "cache")
                cold, warm = (loaded(path, cache, device) if loads else 0.0 for _ in range(2))
                rows.append(Row(scheme, batch, times, FLOPS * batch * TOKENS, peers[batch], cold, warm))
    if rows:
        title = f"MiniLM, {TOKENS} tokens, on {network.device_name(device)}{rows[0].peer.beside}"
        console.print(network.table(title, (*HEADS, *MORE_HEADS), map(cells, rows)))
        network.write_json(output, device, rows)


if __name__ == "__main__":
    typer.run(main)
