"""Time single convolutions by every kernel that is offered, as the layers of ResNet-18 and ResNeXt-50 (32 x 4d).

``python -m benchmarks.conv_layers --tier 1`` shows what a GPU without matrix units does. The share is of the peak that
benchmarks.limits measures for multiply-adds of that type without matrix units.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer

from benchmarks.chain import Layer, measure
from torchvk import ops
from torchvk.graph import DType, TensorType
from torchvk.runtime.device import open_device

# Size, channels and groups of 3 x 3 kernels.
SHAPES = {
    "resnet18": [(56, 64, 1), (28, 128, 1), (14, 256, 1), (7, 512, 1)],
    "resnext50": [(56, 128, 32), (28, 256, 32), (14, 512, 32), (7, 1024, 32)],
}


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


def main(
    tier: Annotated[int, typer.Option(help="the highest tier of kernels")] = 2,
    images: Annotated[int, typer.Option()] = 32,
    schemes: Annotated[str, typer.Option()] = "static8,static4,fp16,fp32",
    networks: Annotated[str, typer.Option()] = ",".join(SHAPES),
    kernels: Annotated[str, typer.Option(help="only those whose names begin so")] = "",
    peak_integer: Annotated[float, typer.Option(help="TOP/s of 8-bit dot products")] = 82.7,
    peak_float: Annotated[float, typer.Option(help="TFLOP/s")] = 47.9,
    seconds: Annotated[float, typer.Option(help="to warm the clocks, a case")] = 0.4,
) -> None:
    device = open_device()
    print(device.info)
    for scheme in schemes.split(","):
        peak = peak_integer if scheme.startswith("static") else peak_float
        for network in networks.split(","):
            for size, channels, groups in SHAPES[network]:
                layer = convolution(images, size, channels, groups, scheme)
                operator = ops.get(layer.op)
                outputs = operator.infer(layer.attributes, layer.inputs)
                capabilities = device.physical.capabilities(tier)
                variants = operator.variants(layer.attributes, layer.inputs, outputs, capabilities)
                print(f"{scheme} {network} {images} x {size} x {size} x {channels}, {groups} groups")
                for name in (name for name, _ in variants if name.startswith(kernels)):
                    got = measure(device, layer, layers=10, max_tier=tier, variant=name, repeats=5, warm=seconds)
                    speed = got.flops / got.seconds / 1e12
                    print(f"  {name:32} {got.seconds * 1e6:9.1f} us {speed:8.3f} T/s {speed / peak:6.1%}", flush=True)


if __name__ == "__main__":
    typer.run(main)
