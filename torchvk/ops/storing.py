"""How results leave the kernels of linear layers: as floats or as 8-bit integers, at once or by another dispatch."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from torchvk.graph import DType
from torchvk.ops.operator import Arg, Capabilities, Dispatch, grid, scratch_read, scratch_write, write
from torchvk.ops.quantized_sum import NO_SUM, QuantizedSum
from torchvk.ops.requantization import Requantization
from torchvk.ops.rounding import round_to_half

NOTHING = bytes(16) + NO_SUM  # the end of the push constants where results are floats


@dataclass(frozen=True)
class Results:
    """m × n: floats of dtype ``floats``; or these as ``output`` quantizes them, and perhaps a residual is added."""

    m: int
    n: int
    floats: DType
    output: Requantization | None
    sum: QuantizedSum | None

    @property
    def push(self) -> bytes:
        if self.output is None:
            return NOTHING
        return self.output.push() + (NO_SUM if self.sum is None else self.sum.push())


@dataclass(frozen=True)
class Storing:
    """How the results of a linear layer's kernel leave it.

    code: OUTPUT of shaders/quantized_linear.slang. out: what the kernel writes. push: what its push constants end
    with. after, scratch: dispatches that come behind, and the sizes of the scratch buffers between.
    """

    code: int
    out: Arg
    push: bytes
    after: tuple[Dispatch, ...]
    scratch: tuple[int, ...]


def storing(results: Results, own: int, scratch: int, capabilities: Capabilities) -> Storing:
    """own: neighbouring bytes of a row that a thread of the kernel stores at once, 0 if it cannot store bytes. Where
    neighbouring rows share what it stores, results go as float32 to scratch buffer ``scratch``, to be rounded there.
    """
    n, output, push = results.n, results.output, results.push
    if output is None and (results.floats is DType.FLOAT32 or n % 2 == 0):
        return Storing(0 if results.floats is DType.FLOAT32 else 1, write(0), push, (), ())
    if output is not None and own and n % own == 0:
        return Storing(2, write(0), push, (), ())
    if output is None:
        after = round_to_half(results.m * n, scratch, capabilities)
    else:
        after = requantize(results, scratch, capabilities)
    return Storing(0, scratch_write(scratch), push, (after,), (4 * results.m * n,))


def requantize(results: Results, scratch: int, capabilities: Capabilities) -> Dispatch:
    """The dispatch that quantizes the float32 values of a scratch buffer into the node's first output."""
    count, sum = results.m * results.n, results.sum
    values = scratch_read(scratch)
    return Dispatch(
        kernel="requantize",
        buffers=(values, write(0), values if sum is None else sum.argument),
        groups=grid(-(-count // 4), capabilities),
        constants=(capabilities.local_size, 0 if sum is None else sum.kind),
        push=struct.pack("<I", count) + results.push,
        bytes=(5 if sum is None else 6) * count,
    )
