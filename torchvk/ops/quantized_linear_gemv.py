"""quantized_linear for few rows on GPUs with subgroup shuffles: which kernel of quantized_linear_gemv.slang, and how.

A workgroup owns some columns of y. Its subgroups are teams of ``split`` that share k; a lane of a team meets one
piece (a uint4 of weights: 32 int4 or 16 int8) of each of ``COLUMNS`` columns at a time.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from torchvk.graph import DType, TensorType
from torchvk.ops.operator import Arg, Array, Capabilities, Dispatch, Layout, grid, read, scratch_read
from torchvk.ops.quantization import Rows, Scheme, quantization, spreading

UNIT = 32
COLUMNS = 4  # columns of y whose weights a lane holds at a time
MAX_SHARED = 32 << 10  # what a workgroup may take of shared memory


@dataclass(frozen=True)
class Gemv:
    """rows: of x that the kernel computes (the next power of two). columns: of y that a workgroup owns.

    mode: "integer" meets x quantized by a dispatch before, "quantize" does that itself, "float" has x as floats.
    stationary: a lane has one piece of x, which stays in its registers. chunk: pieces of x in shared memory.
    """

    kernel: str
    mode: str
    rows: int
    columns: int
    local_size: int
    split: int
    stationary: bool
    chunk: int
    x_words: int  # uint4s of x in shared memory

    @property
    def sums(self) -> int:
        return self.rows * self.columns * self.split


def scale_layout(n: int, groups: int, dtype: DType) -> Layout:
    """[N, groups] to [N / COLUMNS, groups, COLUMNS], so that a lane loads COLUMNS scales at once."""

    def pack(scale: Array) -> Array:
        blocks = -(-n // COLUMNS)
        padded = np.zeros((blocks * COLUMNS, groups), scale.dtype)
        padded[:n] = scale
        return np.ascontiguousarray(padded.reshape(blocks, COLUMNS, groups).transpose(0, 2, 1))

    return Layout(f"quantized_scale_blocks_{COLUMNS}_{dtype.value}_{n}_{groups}", pack)
