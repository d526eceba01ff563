"""How the integer weights of linear layers lie in device memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from torchvk.graph import DType, TensorType
from torchvk.ops.fragments import Fragment
from torchvk.ops.operator import Array, Layout
from torchvk.ops.quantization import Rows

UNIT = 32  # columns of a unit: one uint4 of int4 weights


def pitch_of(group: int) -> int:
    return -(-group // UNIT) * UNIT


@dataclass(frozen=True)
class Packing:
    """The weight [n, k] as kernels want it: rows of ``units`` units, groups of ``group`` columns spread to ``pitch``.

    Groups are whole units, or half a unit (16 columns); others are spread, with zeros between. One group to a row is
    padded at the end.
    """

    n: int
    k: int
    bits: int
    group: int
    pitch: int

    @staticmethod
    def of(weight: TensorType, group: int) -> Packing:
        n, k = weight.shape
        pitch = 16 if group == 16 and k > 16 else pitch_of(group)
        return Packing(n, k, weight.dtype.bits, group, pitch)

    @property
    def groups(self) -> int:
        return self.k // self.group

    @property
    def units(self) -> int:
        return -(-self.groups * self.pitch // UNIT)

    @property
    def columns(self) -> int:
        return self.units * UNIT

    @property
    def half_groups(self) -> bool:
        return self.pitch < UNIT

    @property
    def units_per_group(self) -> int:
        return max(1, self.pitch // UNIT)

    @property
    def nbytes(self) -> int:
        return self.n * self.columns * self.bits // 8

    @property
    def few_bits(self) -> bool:
        """Fewer than fit into fragments of matrices, and than integer products on matrix units take."""
        return self.bits == 2

    def rows(self, m: int, dtype: DType) -> Rows:
        """The copy of x that meets the weight; it says nothing of groups where they are not spread."""
        spread_out = self.pitch != self.group and self.groups > 1
        group, pitch = (self.group, self.pitch) if spread_out else (self.columns, self.columns)
        return Rows(m, self.k, dtype, group, pitch, self.columns)

    @property
    def layout(self) -> Layout | None:
        """How the constant is rearranged, or None if it can stay as it is."""
        if self.bits == 8 and self.columns == self.k:
            return None
        return Layout(f"quantized_weight_{self.bits}_{self.group}_{self.pitch}_{self.columns}", self.pack)

    def pad(self, weight: Array) -> Array:
        """int8 [n, k] to [n, columns], zeros between the groups and behind them."""
        if self.columns == self.k:
            return weight
        padded = np.zeros((self.n, self.columns), np.int8)
        spread_out = padded[:, : self.groups * self.pitch].reshape(self.n, self.groups, self.pitch)
        spread_out[:, :, : self.group] = weight.reshape(self.n, self.groups, self.group)
        return padded

    def pack(self, weight: Array) -> Array:
        """int8 [n, k] to bytes [n, columns · bits / 8]; see quantized_linear.slang for the order in a word."""
        padded = self.pad(weight)
        if self.bits == 8:
            return np.ascontiguousarray(padded)
        # Four columns a word; so many words share one: the first goes to the lowest bits of each byte.
        words = np.ascontiguousarray(padded).view(np.uint32)
        count, mask = 8 // self.bits, np.uint32(0x01010101 * ((1 << self.bits) - 1))
        packed: Array = words[:, 0::count] & mask
        for place in range(1, count):
            packed |= (words[:, place::count] & mask) << np.uint32(self.bits * place)
        return packed

    def takes(self, fragment: Fragment) -> bool:
        """Whether the weight can be packed for it: with scales within a row, they must be where lanes find them."""
        return fragment.complete and (self.groups == 1 or (not self.half_groups and fragment.slots() is not None))

    def fragment_layout(self, fragment: Fragment) -> Layout:
        """For the kernels that take fragments of the weight from memory."""
        name = f"quantized_fragments_{fragment.digest}_{self.bits}_{self.group}_{self.pitch}_{self.columns}"
        return Layout(name, lambda weight: fragment.pack_weight(self.pad(weight), self.bits))

    def fragment_scale_layout(self, fragment: Fragment, dtype: DType) -> Layout:
        return Layout(f"fragment_scales_{fragment.digest}_{dtype.value}_{self.groups}", fragment.pack_scale)

    def scale_layout(self, dtype: DType) -> Layout | None:
        """Scales, or zero points, for the kernels that read texels: float32, whole texels a row."""
        width = -(-self.groups // 4) * 4
        if dtype is DType.FLOAT32 and width == self.groups:
            return None

        def pack(scale: Array) -> Array:
            padded = np.zeros((self.n, width), np.float32)
            padded[:, : self.groups] = scale
            return padded

        return Layout(f"quantized_scale_{dtype.value}_{self.groups}_{width}", pack)
