"""One case of ``quantized_linear`` as the choice of kernels sees it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torchvk.graph import DType, TensorType
from torchvk.ops.epilogue import Epilogue, epilogue_constants
from torchvk.ops.operator import Capabilities
from torchvk.ops.quantization import Scheme, Static
from torchvk.ops.quantized_packing import UNIT, Packing
from torchvk.ops.quantized_sum import QuantizedSum
from torchvk.ops.requantization import Requantization
from torchvk.ops.storing import Results

X, WEIGHT, SCALE, BIAS, RESIDUAL, ZERO_POINT = range(6)  # the node's inputs


@dataclass(frozen=True)
class Case:
    """x has m rows; zeros: whether the weights have zero points; scheme: how activations are, or become, integers, if
    they do; result: the dtype of float results; output: how results are quantized, if they are; sum: how an 8-bit
    residual is added."""

    packing: Packing
    m: int
    x: TensorType
    scale: TensorType
    bias: TensorType | None
    residual: TensorType | None
    zeros: bool
    epilogue: Epilogue
    scheme: Scheme | Static | None
    result: DType
    output: Requantization | None
    sum: QuantizedSum | None
    capabilities: Capabilities

    @property
    def direct(self) -> bool:
        """Whether kernels can read x as it is: its columns are the weight's, without padding."""
        return self.packing.columns == self.packing.k

    @property
    def piece(self) -> int:
        """Columns of a piece: a uint4 of weights, or a uint2 if they have 2 bits."""
        return UNIT // 2 if self.packing.bits == 8 else UNIT

    @property
    def pieces(self) -> int:
        """Pieces of weights in a row."""
        return self.packing.columns // self.piece

    @property
    def half_scale(self) -> bool:
        return self.scale.dtype is DType.FLOAT16

    @property
    def bias_code(self) -> int:
        """BIAS of quantized_linear.slang: none, float32 or float16."""
        return 0 if self.bias is None else 1 if self.bias.dtype is DType.FLOAT32 else 2

    @property
    def ending(self) -> tuple[int, int]:
        return epilogue_constants(self.epilogue, self.residual)

    @property
    def results(self) -> Results:
        return Results(self.m, self.packing.n, self.result, self.output, self.sum)

    def of_rows(self, rows: int) -> Case:
        """The case of so many rows of x."""
        x = TensorType(self.x.dtype, (rows, self.packing.k))
        residual = None if self.residual is None else TensorType(self.residual.dtype, (rows, self.packing.n))
        return replace(self, m=rows, x=x, residual=residual)

    def row_bytes(self) -> dict[tuple[str, int], int]:
        """Of the buffers of the node that have a row for each of x."""
        packing = self.packing
        output = self.result if self.output is None else self.output.dtype
        sizes = {("input", X): packing.k * self.x.dtype.bits // 8, ("output", 0): packing.n * output.bits // 8}
        if self.residual is not None:
            sizes["input", RESIDUAL] = packing.n * self.residual.dtype.bits // 8
        return sizes
