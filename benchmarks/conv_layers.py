"""Time single convolutions by every kernel that is offered, as the layers of ResNet-18 and ResNeXt-50 (32 x 4d).

    python -m benchmarks.conv_layers [--device NAME] [--schemes static8,fp16] [--networks resnet18] [--json FILE]
    python -m benchmarks.conv_layers --max-tier 1     what a GPU without matrix units does

The share is of the peak of multiply-adds of that type without matrix units, measured in the same run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from benchmarks import network
from benchmarks.chain import Layer, measure
from benchmarks.limits import Limits, measure_limits
from torchvk import ops
from torchvk.graph import DType, TensorType
from torchvk.runtime.device import Device, open_device

SCHEMES = "static8,static4,fp16,fp32"
# Size, channels and groups of 3 x 3 kernels.
SHAPES = {
    "resnet18": [(56, 64, 1), (28, 128, 1), (14, 256, 1), (7, 512, 1)],
    "resnext50": [(56, 128, 32), (28, 256, 32), (14, 512, 32), (7, 1024, 32)],
}
NETWORKS = ",".join(SHAPES)


def convolution(images: int, size: int, channels: int, groups: int, scheme: str) -> Layer:
    """A layer whose result has the type of x, with random weights: scheme is static8, static4, fp32 or fp16."""
    rng = np.random.default_rng(0)
    x, shape = (images, size, size, channels), (channels, 3, 3, channels // groups)
    geometry = {"stride": [1, 1], "padding": [1] * 4, "dilation": [1, 1], "input_dilation": [1, 1], "groups": groups}
    per_channel = rng.uniform(0.5, 1, channels).astype(np.float32)
    if scheme in ("static8", "static4"):
        bits = int(scheme[-1])
        weight = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), shape, np.int8)
        constants = {1: weight, 2: per_channel, 3: per_channel}
        types = [DType.INT8, DType(f"int{bits}"), DType.FLOAT32, DType.FLOAT32]
        quantized = {"activation": "static", "input_scale": 0.01, "output_dtype": "int8", "output_scale": 3.0}
        op, attributes = "quantized_conv", {**geometry, **quantized}
    else:
        dtype = DType.FLOAT16 if scheme == "fp16" else DType.FLOAT32
        k = 9 * channels // groups
        weight = (rng.standard_normal(shape) / np.sqrt(k)).astype(dtype.numpy)
        constants = {1: weight, 2: per_channel.astype(dtype.numpy)}
        types = [dtype] * 3
        op, attributes = "conv", geometry
    shapes = [x, *(constant.shape for constant in constants.values())]
    inputs = [TensorType(type, each, constant=i > 0) for i, (type, each) in enumerate(zip(types, shapes, strict=True))]
    return Layer(op, ops.get(op).attributes(**attributes), tuple(inputs), constants)


@dataclass(frozen=True)
class Row:
    """Seconds of a layer by one of its kernels. share: of the peak."""

    scheme: str
    network: str
    images: int
    size: int
    channels: int
    groups: int
    kernel: str
    seconds: float
    flops: int
    share: float


HEADS = ("scheme", "network", "kernel", "layer", "groups", "time", "TOP/s", "share")


def cells(row: Row) -> list[str]:
    return [
        *(row.scheme, row.network, row.kernel),
        f"{row.images} x {row.size} x {row.size} x {row.channels}",
        str(row.groups),
        f"{row.seconds * 1e6:.1f} µs",
        f"{row.flops / row.seconds / 1e12:.2f}",
        f"{row.share:.1%}",
    ]


def rows_of(
    device: Device, scheme: str, name: str, images: int, kernels: str, tier: int | None, limits: Limits
) -> Iterator[Row]:
    peak = limits.dot8 if scheme.startswith("static") else limits.float32
    for size, channels, groups in SHAPES[name]:
        layer = convolution(images, size, channels, groups, scheme)
        operator = ops.get(layer.op)
        outputs = operator.infer(layer.attributes, layer.inputs)
        offered = operator.variants(layer.attributes, layer.inputs, outputs, device.physical.capabilities(tier))
        for kernel in (kernel for kernel, _ in offered if kernel.startswith(kernels)):
            got = measure(device, layer, layers=10, max_tier=tier, variant=kernel, repeats=5, warm=0.4)
            share = got.flops / got.seconds / peak
            yield Row(scheme, name, images, size, channels, groups, kernel, got.seconds, got.flops, share)


def main(
    device: network.DeviceOption = None,
    schemes: network.ListOption = SCHEMES,
    networks: network.ListOption = NETWORKS,
    images: Annotated[int, typer.Option(help="In a batch.")] = 32,
    kernels: Annotated[str, typer.Option(help="Only those whose names begin so.")] = "",
    max_tier: Annotated[int | None, typer.Option(help="Cap of the capability tier.")] = None,
    output: network.JsonOption = None,
) -> None:
    """Time single convolutions on the device."""
    opened = open_device(device)
    limits = measure_limits(opened, max_tier)
    rows = [
        row
        for scheme in schemes.split(",")
        for name in networks.split(",")
        for row in rows_of(opened, scheme, name, images, kernels, max_tier, limits)
    ]
    title = f"Convolutions on {network.device_name(device)}"
    Console(width=140).print(network.table(title, HEADS, map(cells, rows), left=3))
    network.write_json(output, device, rows, limits=asdict(limits))


if __name__ == "__main__":
    typer.run(main)
