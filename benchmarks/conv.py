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
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.console import Console

from benchmarks import network
from benchmarks.network import Peer, Times, microseconds

MODELS = "mobilenet_v2,resnet18"
SCHEMES = "fp32,fp16,static"


@dataclass(frozen=True)
class Row:
    """flops: of the convolutions and linears of a call."""

    model: str
    scheme: str
    batch: int
    times: Times
    flops: int
    peer: Peer


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


def peer_of(model: Any, batch: int) -> Peer:
    import torch

    images = torch.from_numpy(images_of(batch))
    plain = folded(model)

    def half() -> Callable[[], Any]:
        torch.backends.cudnn.benchmark = True
        halved = plain.half().cuda().to(memory_format=torch.channels_last)
        on_device = images.half().cuda().to(memory_format=torch.channels_last)
        return lambda: halved(on_device)

    return network.beside(half, lambda: plain(images), ", channels last")


# The table

HEADS = ("model", "scheme", "batch", "device", "spread", "images/s", "TFLOP/s", "of fp32", "PyTorch", "ratio")
MORE_HEADS = ("call", "memory", "of fp32", "dispatches", "barriers")


def cells(row: Row, rows: list[Row]) -> list[str]:
    times, peer = row.times, row.peer
    base = (row.model, "fp32", row.batch)
    plain = next((other.times for other in rows if (other.model, other.scheme, other.batch) == base), None)
    return [
        row.model,
        row.scheme,
        str(row.batch),
        microseconds(times.seconds),
        microseconds(times.spread),
        f"{row.batch / times.seconds:.0f}",
        f"{row.flops / times.seconds / 1e12:.2f}",
        f"{times.seconds / plain.seconds:.2f}" if plain else "",
        microseconds(peer.peer_seconds) if peer.peer else "",
        f"{times.seconds / peer.peer_seconds:.2f}" if peer.peer else "",
        microseconds(times.call),
        f"{times.arena / 2**20:.1f} MiB",
        f"{times.arena / plain.arena:.2f}" if plain and plain.arena else "",
        str(times.dispatches),
        str(times.barriers),
    ]


def main(
    device: network.DeviceOption = None,
    models: network.ListOption = MODELS,
    schemes: network.ListOption = SCHEMES,
    batches: network.ListOption = "1,32",
    save: network.SaveOption = None,
    files: network.FilesOption = None,
    torch: network.TorchOption = True,
    profile: network.ProfileOption = False,
    output: network.JsonOption = None,
) -> None:
    """Time convolutional networks on the device."""
    from tests.models.zoo import make

    warnings.filterwarnings("ignore")
    console = Console(width=180)
    rows: list[Row] = []
    for name in models.split(","):
        model = make(name, tiny=False)
        for batch in map(int, batches.split(",")):
            peer = peer_of(model, batch) if torch and save is None else Peer()
            for scheme in schemes.split(","):
                with tempfile.TemporaryDirectory() as scratch:
                    make_file = partial(lowered, model, name, scheme, batch)
                    path = network.files_of(f"{name}-{scheme}-{batch}", make_file, save, files, Path(scratch), console)
                    if path is None:
                        continue
                    title = f"{name} {scheme}, batch {batch}"
                    times = network.measured(path, device, [images_of(batch)], console if profile else None, title)
                    rows.append(Row(name, scheme, batch, times, flops_of(model, batch), peer))
    if rows:
        title = f"224 × 224 images on {network.device_name(device)}{rows[0].peer.beside}"
        console.print(network.table(title, (*HEADS, *MORE_HEADS), (cells(row, rows) for row in rows), left=2))
        network.write_json(output, device, rows)


if __name__ == "__main__":
    typer.run(main)
