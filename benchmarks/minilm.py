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

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import torchvk
from benchmarks.hollow import fill, hollow

SCHEMES = {"fp32": ("fp32", False), "fp16": ("fp32", True), "8da4w": ("8da4w", False), "8da4w/16": ("8da4w", True)}
TOKENS = 128
WARM_SECONDS = 1.0
# Multiply-adds of a token: 4 projections, 2 of the inner layer, and 2 products with each of the other tokens.
FLOPS = 2 * 6 * (4 * 384 * 384 + 2 * 384 * 1536 + 2 * 384 * TOKENS)


@dataclass(frozen=True)
class Row:
    """Seconds of a call on the device (median, and largest less smallest), of a call from Python, and of loading."""

    scheme: str
    batch: int
    seconds: float
    spread: float
    call: float
    dispatches: int
    barriers: int
    flops: int
    peer: str
    peer_seconds: float
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


def row_of(
    scheme: str,
    batch: int,
    path: Path,
    device: str | None,
    peer: tuple[str, float],
    *,
    loads: bool,
    profile: Console | None,
) -> Row:
    inputs = inputs_of(batch)
    with torchvk.load(path, device=device) as program:
        until = time.perf_counter() + WARM_SECONDS
        while time.perf_counter() < until:
            program(*inputs)
        measured = program.measure(*inputs, repeats=50)
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            program(*inputs)
            times.append(time.perf_counter() - begin)
        if profile is not None:
            profile.print(kernels_of(program, inputs, f"{scheme}, batch {batch}: one dispatch at a time"))
    cold = warm = 0.0
    if loads:
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = loaded(path, cache, device), loaded(path, cache, device)
    return Row(
        scheme,
        batch,
        measured.median,
        max(measured.seconds) - min(measured.seconds),
        float(np.median(times)),
        measured.dispatches,
        measured.barriers,
        FLOPS * batch * TOKENS,
        *peer,
        cold,
        warm,
    )


def kernels_of(program: Any, inputs: Any, title: str) -> Table:
    """Where the time goes, by kernel."""
    sums: dict[tuple[str, str], list[float]] = {}
    runs = [program.profile(*inputs) for _ in range(5)]
    for records in zip(*(run.records for run in runs), strict=True):
        entry = sums.setdefault((records[0].operator, records[0].kernel), [0, 0.0, 0.0])
        entry[0] += 1
        entry[1] += float(np.median([record.seconds for record in records]))
        entry[2] += records[0].flops
    table = Table(title=title)
    for column in ("operator", "kernel", "dispatches", "µs", "µs each", "TFLOP/s"):
        table.add_column(column, justify="left" if column in ("operator", "kernel") else "right")
    for (operator, kernel), (count, seconds, flops) in sorted(sums.items(), key=lambda item: -item[1][1]):
        rate = flops / seconds / 1e12 if seconds else 0
        table.add_row(
            operator, kernel, f"{count:.0f}", f"{seconds * 1e6:.1f}", f"{seconds / count * 1e6:.1f}", f"{rate:.1f}"
        )
    return table


def table_of(rows: list[Row], title: str) -> Table:
    table = Table(title=title)
    for column in (
        "scheme",
        "batch",
        "device",
        "spread",
        "TFLOP/s",
        "PyTorch",
        "ratio",
        "call",
        "dispatches",
        "barriers",
        "cold load",
        "warm load",
    ):
        table.add_column(column, justify="left" if column == "scheme" else "right")
    for row in rows:
        table.add_row(
            row.scheme,
            str(row.batch),
            f"{row.seconds * 1e6:.0f} µs",
            f"{row.spread * 1e6:.0f} µs",
            f"{row.flops / row.seconds / 1e12:.1f}",
            f"{row.peer_seconds * 1e6:.0f} µs" if row.peer else "",
            f"{row.seconds / row.peer_seconds:.2f}" if row.peer else "",
            f"{row.call * 1e6:.0f} µs",
            str(row.dispatches),
            str(row.barriers),
            f"{row.cold:.2f} s" if row.cold else "",
            f"{row.warm:.2f} s" if row.warm else "",
        )
    return table


def models(
    schemes: list[str], batches: list[int], folder: Path | None, scratch: Path
) -> Iterator[tuple[str, int, Path]]:
    """(scheme, batch, path of its .pte)."""
    for scheme in schemes:
        for batch in batches:
            name = f"minilm-{scheme.replace('/', '-')}-{batch}"
            path = scratch / f"{name}.pte"
            path.write_bytes(lowered(scheme, batch) if folder is None else fill(folder / f"{name}.hollow"))
            yield scheme, batch, path


def main(
    device: Annotated[str | None, typer.Option(help="Vulkan device: index or part of its name.")] = None,
    schemes: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(SCHEMES),
    batches: Annotated[str, typer.Option(help="Comma-separated.")] = "1,32",
    save: Annotated[Path | None, typer.Option(help="Write hollow models to this folder, and do nothing else.")] = None,
    files: Annotated[Path | None, typer.Option(help="Take hollow models from this folder.")] = None,
    torch: Annotated[bool, typer.Option(help="Time PyTorch beside.")] = True,
    loads: Annotated[bool, typer.Option(help="Time loading.")] = True,
    profile: Annotated[bool, typer.Option(help="Print the time of each kernel.")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
) -> None:
    """Time MiniLM on the device."""
    warnings.filterwarnings("ignore")
    console = Console(width=140)
    sizes = [int(batch) for batch in batches.split(",")]
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
        for scheme in schemes.split(","):
            for batch in sizes:
                hollow(lowered(scheme, batch), save / f"minilm-{scheme.replace('/', '-')}-{batch}.hollow")
        return
    peers: dict[int, tuple[str, float]] = dict.fromkeys(sizes, ("", 0.0))
    if torch:
        from benchmarks import bert

        peers = {batch: bert.seconds(batch, TOKENS, inputs_of(batch)[1]) for batch in sizes}
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for scheme, batch, path in models(schemes.split(","), sizes, files, Path(scratch)):
            shown = console if profile else None
            rows.append(row_of(scheme, batch, path, device, peers[batch], loads=loads, profile=shown))
    from torchvk.runtime.device import open_device

    info = open_device(device).info
    name = f"{info.name} ({info.driver} {info.driver_version})"
    beside = f"; beside: {rows[0].peer}" if rows and rows[0].peer else ""
    console.print(table_of(rows, f"MiniLM, {TOKENS} tokens, on {name}{beside}"))
    if output is not None:
        facts = {"device": info.name, "driver": f"{info.driver} {info.driver_version}"}
        date = datetime.date.today().isoformat()
        output.write_text(json.dumps({**facts, "date": date, "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    typer.run(main)
