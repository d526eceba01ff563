"""Convolutional networks on the device: MobileNetV2 and ResNet-18 at 224 × 224, by timestamps, beside PyTorch.

    python -m benchmarks.conv [--device NAME] [--models …] [--schemes fp16,static] [--batches 1,32] [--json FILE]
    python -m benchmarks.conv --save FOLDER     writes the models, without their weights, for other machines
    python -m benchmarks.conv --files FOLDER    times such models, with random weights

The time of a call is from the first dispatch to the end of the last, without copies from and to the host. PyTorch's,
with batch norms folded as ours are, is that of a CUDA graph in float16 and channels last, else of float32 on two
threads of the CPU. Memory is what lies between the layers (the arena), without inputs, outputs and weights. The static
int8 networks are calibrated on random images, as their weights are random; that changes nothing of the work.
"""

from __future__ import annotations

import copy
import datetime
import json
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import torchvk
from benchmarks.anchors import available, graph_seconds
from benchmarks.hollow import fill, hollow
from benchmarks.minilm import kernels_of

MODELS = ("mobilenet_v2", "resnet18")
SCHEMES = ("fp32", "fp16", "static")
WARM_SECONDS = 1.0
THREADS = 2


@dataclass(frozen=True)
class Row:
    """Seconds of a call on the device (median, and largest less smallest) and of a call from Python; bytes between the
    layers; ``flops`` of convolutions and linears; PyTorch beside it."""

    model: str
    scheme: str
    batch: int
    seconds: float
    spread: float
    call: float
    dispatches: int
    barriers: int
    arena: int
    flops: int
    peer: str
    peer_seconds: float


def network(model: str) -> Any:
    from tests.models.zoo import make

    return make(model, tiny=False)


def lowered(model: Any, name: str, scheme: str, batch: int) -> bytes:
    """The .pte of a network in a scheme; an error if anything is left to the CPU."""
    import torch
    from executorch.exir import to_edge_transform_and_lower

    from tests.models.zoo import inputs
    from tests.schemes import quantized
    from torchvk.partitioner.vulkan_partitioner import VulkanPartitioner

    images = inputs(name, tiny=False, batch=batch)
    partitioner = VulkanPartitioner({"force_fp16": True} if scheme == "fp16" else None)
    with torch.no_grad():
        exported = torch.export.export(quantized(model, scheme, images), images)
        program = to_edge_transform_and_lower(exported, partitioner=[partitioner]).to_executorch()
    if partitioner.report:
        raise SystemExit(f"{name} in {scheme} is not delegated whole: {partitioner.report[0]}")
    buffer: bytes = program.buffer
    return buffer


def images_of(batch: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(batch).standard_normal((batch, 3, 224, 224), np.float32)


def measured(
    name: str, scheme: str, batch: int, path: Path, device: str | None, peer: tuple[str, float, int], profile: Any
) -> Row:
    images = images_of(batch)
    with torchvk.load(path, device=device) as program:
        until = time.perf_counter() + WARM_SECONDS
        program(images)
        while time.perf_counter() < until:
            program(images)
        # Some twenty runs on a GPU, few where a run takes seconds.
        begin = time.perf_counter()
        program(images)
        repeats = int(min(50, max(3, 5 / (time.perf_counter() - begin))))
        result = program.measure(images, repeats=repeats)
        times = []
        for _ in range(min(repeats, 20)):
            begin = time.perf_counter()
            program(images)
            times.append(time.perf_counter() - begin)
        if profile is not None:
            profile.print(kernels_of(program, [images], f"{name} {scheme}, batch {batch}: one dispatch at a time"))
    return Row(
        name,
        scheme,
        batch,
        result.median,
        max(result.seconds) - min(result.seconds),
        float(np.median(times)),
        result.dispatches,
        result.barriers,
        result.arena_bytes,
        peer[2],
        *peer[:2],
    )


# PyTorch


def folded(model: Any) -> Any:
    """With batch norms folded into the convolutions before them."""
    from torch import nn
    from torch.nn.utils import fuse_conv_bn_eval

    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            for index in range(len(module) - 1):
                if isinstance(module[index], nn.Conv2d) and isinstance(module[index + 1], nn.BatchNorm2d):
                    module[index] = fuse_conv_bn_eval(module[index], module[index + 1])
                    module[index + 1] = nn.Identity()
    return model


def flops_of(model: Any, batch: int) -> int:
    """Of convolutions and linears; a multiply-add counts two."""
    import torch
    from torch import nn

    total = 0

    def count(module: Any, _: Any, output: Any) -> None:
        nonlocal total
        total += 2 * output.numel() * module.weight[0].numel()

    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    return total * batch


def peer_of(model: Any, batch: int, wanted: bool) -> tuple[str, float, int]:
    """What was timed beside, its seconds, and the work of a call."""
    import torch

    flops = flops_of(model, batch)
    if not wanted:
        return "", 0.0, flops
    images = torch.from_numpy(images_of(batch))
    with torch.no_grad():
        if available():
            torch.backends.cudnn.benchmark = True
            half = folded(model).half().cuda().to(memory_format=torch.channels_last)
            on_device = images.half().cuda().to(memory_format=torch.channels_last)
            name = f"PyTorch {torch.__version__} CUDA, fp16, channels last, CUDA graph"
            return name, graph_seconds(lambda: half(on_device), 1, repeats=50), flops
        torch.set_num_threads(THREADS)
        plain, times = folded(model), []
        plain(images)
        for _ in range(5):
            start = time.perf_counter()
            plain(images)
            times.append(time.perf_counter() - start)
        return f"PyTorch {torch.__version__} CPU, fp32, {THREADS} threads", float(np.median(times)), flops


# The table


def table_of(rows: list[Row], title: str) -> Table:
    table = Table(title=title)
    heads = ("model", "scheme", "batch", "device", "spread", "images/s", "TFLOP/s", "of fp32", "PyTorch", "ratio")
    for column in (*heads, "call", "memory", "of fp32", "dispatches", "barriers"):
        table.add_column(column, justify="left" if column in ("model", "scheme") else "right")
    plain = {(row.model, row.batch): row for row in rows if row.scheme == "fp32"}
    for row in rows:
        base = plain.get((row.model, row.batch))
        table.add_row(
            row.model,
            row.scheme,
            str(row.batch),
            _time(row.seconds),
            _time(row.spread),
            f"{row.batch / row.seconds:.0f}",
            f"{row.flops / row.seconds / 1e12:.2f}",
            f"{row.seconds / base.seconds:.2f}" if base else "",
            _time(row.peer_seconds) if row.peer else "",
            f"{row.seconds / row.peer_seconds:.2f}" if row.peer else "",
            _time(row.call),
            f"{row.arena / 2**20:.1f} MiB",
            f"{row.arena / base.arena:.2f}" if base and base.arena else "",
            str(row.dispatches),
            str(row.barriers),
        )
    return table


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 0.1 else f"{seconds:.2f} s"


def main(
    device: Annotated[str | None, typer.Option(help="Vulkan device: index or part of its name.")] = None,
    models: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(MODELS),
    schemes: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(SCHEMES),
    batches: Annotated[str, typer.Option(help="Comma-separated.")] = "1,32",
    save: Annotated[Path | None, typer.Option(help="Write hollow models to this folder, and do nothing else.")] = None,
    files: Annotated[Path | None, typer.Option(help="Take hollow models from this folder.")] = None,
    torch: Annotated[bool, typer.Option(help="Time PyTorch beside.")] = True,
    profile: Annotated[bool, typer.Option(help="Print the time of each kernel.")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
) -> None:
    """Time convolutional networks on the device."""
    warnings.filterwarnings("ignore")
    console = Console(width=180)
    rows = []
    for name in models.split(","):
        model = network(name)
        for batch in map(int, batches.split(",")):
            peer = ("", 0.0, 0) if save else peer_of(model, batch, torch)
            for scheme in schemes.split(","):
                stem = f"{name}-{scheme}-{batch}"
                if save is not None:
                    save.mkdir(parents=True, exist_ok=True)
                    hollow(lowered(model, name, scheme, batch), save / f"{stem}.hollow")
                    continue
                if files is not None and not (files / f"{stem}.hollow").exists():
                    console.print(f"{stem}: no such file, left out")
                    continue
                with tempfile.TemporaryDirectory() as scratch:
                    path = Path(scratch) / f"{stem}.pte"
                    file = fill(files / f"{stem}.hollow") if files else lowered(model, name, scheme, batch)
                    path.write_bytes(file)
                    rows.append(measured(name, scheme, batch, path, device, peer, console if profile else None))
    if not rows:
        return
    from torchvk.runtime.device import open_device

    info = open_device(device).info
    on = f"{info.name} ({info.driver} {info.driver_version})"
    beside = f"; beside: {rows[0].peer}" if rows[0].peer else ""
    console.print(table_of(rows, f"224 × 224 images on {on}{beside}"))
    if output is not None:
        facts = {"device": info.name, "driver": f"{info.driver} {info.driver_version}"}
        date = datetime.date.today().isoformat()
        output.write_text(json.dumps({**facts, "date": date, "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    typer.run(main)
