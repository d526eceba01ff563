"""Linear layers on the device: every scheme, by timestamps, beside the limits of the device and PyTorch's own kernels.

    python -m benchmarks.linear [--device NAME] [--schemes 8da4w,4w] [--sizes 4096x4096] [--rows 1,16] [--json FILE]
    python -m benchmarks.linear --sweep [--json FILE]

A row is a chain of dependent layers (benchmarks/chain.py): activation quantization, bias and output conversion count,
so do the barriers between layers. "limit" is the time that the bytes that must move take at the bandwidth of a copy,
or the multiplications at the peak of their unit, whichever is longer, both measured in the same run; "share" is limit
over time. Where PyTorch has CUDA its kernels are timed beside. ``benchmarks.roofline`` draws the JSON.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import anchors, network
from benchmarks.chain import Layer, Timing, linear, measure, quantized_linear
from benchmarks.limits import Limits, measure_limits
from torchvk.graph import DType
from torchvk.runtime.device import Device, open_device

# "/32" and "/16" say what activations and results are outside: float32 or float16.
SCHEMES: dict[str, dict[str, Any]] = {
    "8da4w/32": {"bits": 4, "group": 32, "activation": "dynamic_per_token", "dtype": DType.FLOAT32},
    "8da4w/16": {"bits": 4, "group": 32, "activation": "dynamic_per_token", "dtype": DType.FLOAT16},
    "8da8w/32": {"bits": 8, "group": 0, "activation": "dynamic_per_token", "dtype": DType.FLOAT32},
    "8da8w/16": {"bits": 8, "group": 0, "activation": "dynamic_per_token", "dtype": DType.FLOAT16},
    "4w/16": {"bits": 4, "group": 32, "dtype": DType.FLOAT16},
    "4w/32": {"bits": 4, "group": 32, "dtype": DType.FLOAT32},
    "4wz/16": {"bits": 4, "group": 32, "dtype": DType.FLOAT16, "zeros": True},  # weights with zero points
    "2w/16": {"bits": 2, "group": 32, "dtype": DType.FLOAT16},
    "8w/16": {"bits": 8, "group": 0, "dtype": DType.FLOAT16},
    "8w/32": {"bits": 8, "group": 0, "dtype": DType.FLOAT32},
    "fp16": {"dtype": DType.FLOAT16},
    "fp32": {"dtype": DType.FLOAT32},
}
ALL = ",".join(SCHEMES)
SIZES = ("4096x4096", "14336x4096", "4096x14336")
ROWS = (1, 2, 4, 8, 16, 128, 512, 2048)
SWEEP_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 513, 1024, 2048, 4096, 8192)
SWEEP_SIZES = (512, 1024, 2048, 4096, 8192, 16384)
# N and K off the size of every tile, and the next multiples.
ODD_SIZES = ((4100, 4128), (4224, 4224))


@dataclass(frozen=True)
class Row:
    """Seconds of a layer. limit: see above; bound: which of the two it is. peers: PyTorch's seconds by kernel."""

    scheme: str
    n: int
    k: int
    m: int
    seconds: float
    spread: float
    dispatches: int
    bytes: int
    flops: int
    limit: float
    bound: str
    peers: dict[str, float]


def layer_of(scheme: str, m: int, n: int, k: int) -> Layer:
    options = SCHEMES[scheme]
    return quantized_linear(m, n, k, **options) if "bits" in options else linear(m, n, k, **options)


def compulsory_bytes(layer: Layer, m: int, n: int) -> int:
    """What must be read once and written once: operands and result."""
    x = layer.inputs[0]
    assert x is not None
    return sum(type.nbytes for type in layer.inputs if type is not None) + m * n * x.dtype.bits // 8


def peak_of(scheme: str, limits: Limits) -> float:
    """Operations a second of the unit that the scheme's multiplications run on at large M."""
    if scheme.startswith("8da"):
        return limits.int8 or limits.dot8
    if SCHEMES[scheme]["dtype"] is DType.FLOAT16:
        return limits.float16 or limits.float32
    return limits.float32


def row_of(scheme: str, layer: Layer, m: int, n: int, k: int, timing: Timing, limits: Limits) -> Row:
    moved, flops = compulsory_bytes(layer, m, n), 2 * m * n * k
    by_bytes, by_flops = moved / limits.bandwidth, flops / peak_of(scheme, limits)
    bound = "bytes" if by_bytes > by_flops else "operations"
    return Row(
        scheme,
        n,
        k,
        m,
        timing.seconds,
        timing.spread,
        timing.dispatches,
        moved,
        flops,
        max(by_bytes, by_flops),
        bound,
        {},
    )


def cases(sweep: bool, schemes: Iterable[str], sizes: Iterable[str], rows: Iterable[int]) -> Iterator[Any]:
    """(scheme, m, n, k) in an order that keeps equal weights together."""
    if not sweep:
        yield from ((s, m, *map(int, size.split("x"))) for s in schemes for size in sizes for m in rows)
        return
    for scheme in schemes:
        yield from ((scheme, m, 4096, 4096) for m in SWEEP_ROWS)
        yield from ((scheme, m, size, size) for size in SWEEP_SIZES for m in (1, 512))
        yield from ((scheme, m, n, k) for n, k in ODD_SIZES for m in (1, 512))


def run(device: Device, wanted: Iterable[Any], limits: Limits, tier: int | None, layers: int) -> Iterator[Row]:
    known: dict[tuple[str, int, int], Layer] = {}
    for number, (scheme, m, n, k) in enumerate(wanted):
        key = (scheme, n, k)
        if key not in known:
            known = {key: layer_of(scheme, 1, n, k)}
        layer = known[key].with_rows(m)
        # A chain long enough to fill the device; one layer of the largest products alone does that.
        length = max(4, min(layers, int(3e13 / (2 * m * n * k)) or 1))
        timing = measure(device, layer, layers=length, max_tier=tier, warm=1.0 if number == 0 else 0.4)
        yield row_of(scheme, layer, m, n, k, timing, limits)


def peers(m: int, n: int, k: int) -> dict[str, float]:
    """PyTorch's kernels on CUDA for these sizes."""
    found = {"bf16": anchors.bf16(m, n, k), "int8": anchors.int8(m, n, k), "int4": anchors.int4(m, n, k)}
    return {name: seconds for name, seconds in found.items() if seconds is not None}


def rate(operations: float) -> str:
    """Operations a second with a unit."""
    return f"{operations / 1e12:.1f} T" if operations >= 1e12 else f"{operations / 1e9:.1f} G"


HEADS = ("scheme", "N x K", "M", "time", "limit", "share", "GB/s", "OP/s", "torch bf16", "int8", "int4")


def cells(row: Row) -> list[str]:
    beside = [f"{row.peers[name] * 1e6:.1f} µs" if name in row.peers else "" for name in ("bf16", "int8", "int4")]
    return [
        row.scheme,
        f"{row.n}x{row.k}",
        str(row.m),
        f"{row.seconds * 1e6:.1f} µs",
        f"{row.limit * 1e6:.1f} µs ({row.bound})",
        f"{row.limit / row.seconds:.0%}",
        f"{row.bytes / row.seconds / 1e9:.0f}",
        rate(row.flops / row.seconds),
        *beside,
    ]


def main(
    device: network.DeviceOption = None,
    schemes: network.ListOption = ALL,
    sizes: Annotated[str, typer.Option(help="NxK, comma-separated.")] = "",
    rows: Annotated[str, typer.Option(help="M, comma-separated.")] = "",
    sweep: Annotated[bool, typer.Option(help="M = 1 … 8192 and N = K = 512 … 16384.")] = False,
    max_tier: Annotated[int | None, typer.Option(help="Cap of the capability tier.")] = None,
    layers: Annotated[int, typer.Option(help="Length of the chain.")] = 50,
    torch: network.TorchOption = True,
    output: network.JsonOption = None,
) -> None:
    """Time linear layers on the device."""
    warnings.filterwarnings("ignore")
    console = Console(width=140)
    opened = open_device(device)
    small = opened.info.kind == "cpu"
    limits = measure_limits(opened, max_tier)
    name = network.device_name(device)
    console.print(
        f"{name}: copy {limits.bandwidth / 1e9:.0f} GB/s; operations a second: float32 {rate(limits.float32)}, 8-bit "
        f"dot products {rate(limits.dot8)}, matrix units float16 {rate(limits.float16)}, int8 {rate(limits.int8)}"
    )
    chosen_sizes = sizes.split(",") if sizes else ["512x512", "1024x1024"] if small else list(SIZES)
    chosen_rows = [int(m) for m in rows.split(",")] if rows else [1, 4, 32] if small else list(ROWS)
    known: dict[Any, dict[str, float]] = {}
    results = []
    for row in run(opened, cases(sweep, schemes.split(","), chosen_sizes, chosen_rows), limits, max_tier, layers):
        if torch and not sweep and anchors.available():
            key = (row.m, row.n, row.k)
            known[key] = known.get(key) or peers(*key)
            row.peers.update(known[key])
        results.append(row)
    console.print(network.table(f"Linear layers on {name}", HEADS, map(cells, results)))
    network.write_json(output, device, results, limits=asdict(limits))


if __name__ == "__main__":
    typer.run(main)
