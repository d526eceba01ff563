"""Linear layers with integer weights: ``quantized_linear``.

    y[m, n] = f(sx[m] · Σ_g sw[n, g] · Σ_{k in g} (qx[m, k] − zx[m]) · (qw[n, k] − zw[n, g]) + b[n]) + residual[m, n]

with quantized activations: the inner sums are integers and exact, the sum over groups is in float32. Without (weight
only) the product is Σ_k x[m, k] · (sw[n, g] · (qw[n, k] − zw[n, g])) in float32. Symmetric weights have no zero
points zw. f and the residual: see torchvk.ops.epilogue. float16 results are rounded once, at the end.

Against eager mode, which dequantizes and multiplies matrices: float32 models differ by the order of float32 additions
alone. float16 models there round every dequantized weight and activation to float16. Matrix units take weights rounded
like that; other kernels do not round them: each product may differ from eager's by 2^-10 of itself (twice half a unit
of 11 bits), so y by 2^-10 · Σ |x · w| and its own rounding.

Static activations are 8-bit integers already, with one scale and zero point for all. Results may leave as 8-bit
integers, too (torchvk.ops.requantization).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from torchvk.graph import DType, TensorType
from torchvk.ops import blocked
from torchvk.ops.epilogue import Epilogue, apply_epilogue, epilogue_constants
from torchvk.ops.fragments import Fragment
from torchvk.ops.matrix import Tile, candidates, tiles_of
from torchvk.ops.matrix_half import FRAGMENT_TILES, TILES
from torchvk.ops.operator import (
    Arg,
    Array,
    Capabilities,
    Dispatch,
    Kernels,
    Operator,
    OperatorError,
    Types,
    Variants,
    grid,
    read,
    register,
    scratch_read,
)
from torchvk.ops.quantization import (
    LANES,
    Activation,
    Formulas,
    Scheme,
    Static,
    activations,
    quantize,
    reads_texels,
)
from torchvk.ops.quantization import spreading as spread
from torchvk.ops.quantized_linear_gemv import Case, few_rows
from torchvk.ops.quantized_linear_matrix import (
    FEW_ROWS,
    fragment_candidates,
    fragment_kernel,
    weight_sums,
)
from torchvk.ops.quantized_linear_matrix import candidates as integer_candidates
from torchvk.ops.quantized_packing import UNIT, Packing, pitch_of
from torchvk.ops.requantization import EightBits, Requantization, Storing, check_parameters, storing
from torchvk.ops.rows import stacked, whole_rows

X, WEIGHT, SCALE, BIAS, RESIDUAL, ZERO_POINT = range(6)
# A group's integer sum stays below 2^31: |q − zero point| ≤ 255, |w| ≤ 128, or 255 with zero points.
MAX_GROUP = 1 << 16
MAX_GROUP_ZEROS = 1 << 15
MAX_GEMV_ROWS = 4
MAX_ELEMENTS = 1 << 31  # kernels count elements in 32 bits


@dataclass(frozen=True)
class QuantizedLinearAttributes:
    """group_size: input channels that share a scale; it divides K, and is K for one scale an output channel.

    activation: "none" leaves x as it is (weight only); "dynamic_per_token" and "dynamic_per_tensor" quantize it to
    int8 at run time with the formulas of torchvk.ops.quantization, which say what the other attributes mean. "static":
    x is int8 or uint8 and stands for (x − input_zero_point) · input_scale.
    dtype: of float results, if x is integers. output_dtype: None for float results; else they are quantized to that,
    with output_scale and output_zero_point, and limited to output_min … output_max.
    epilogue: the function that follows the product and the bias; a residual, if there is one, is added to that.
    """

    group_size: int
    activation: Activation = "none"
    symmetric: bool = False
    quant_min: int = -128
    quant_max: int = 127
    eps: float = float(np.finfo(np.float32).tiny)
    qparams: Formulas = "torchao"
    epilogue: Epilogue = "none"
    input_scale: float = 1.0
    input_zero_point: int = 0
    dtype: DType = DType.FLOAT32
    output_dtype: EightBits | None = None
    output_scale: float = 1.0
    output_zero_point: int = 0
    output_min: int = -128
    output_max: int = 127

    @property
    def scheme(self) -> Scheme | None:
        """How activations are quantized at run time, if they are."""
        if self.activation == "none" or self.activation == "static":
            return None
        return Scheme(self.activation, self.symmetric, self.quant_min, self.quant_max, self.eps, self.qparams)

    def integers(self, x: TensorType) -> Scheme | Static | None:
        """How activations are, or become, integers; None if they stay floats."""
        if self.activation == "static":
            return Static.of(self.input_scale, self.input_zero_point, x.dtype)
        return self.scheme

    def floats(self, x: TensorType) -> DType:
        """The dtype of float results, of the bias and the residual."""
        return self.dtype if self.activation == "static" else x.dtype


def _fail(message: str) -> NoReturn:
    raise OperatorError(f"quantized_linear: {message}")


def _operands(inputs: Types) -> tuple[TensorType, TensorType, TensorType, TensorType | None, TensorType | None]:
    if not 3 <= len(inputs) <= 6:
        _fail(f"takes x, weight, scale and perhaps bias, residual and zero point, {len(inputs)} operands were given")
    x, weight, scale, bias, residual = (*inputs, None, None)[:5]
    if x is None or weight is None or scale is None:
        _fail("x, weight and scale must be there")
    return x, weight, scale, bias, residual


def _zero_point(inputs: Types) -> TensorType | None:
    return inputs[ZERO_POINT] if len(inputs) > ZERO_POINT else None


def _infer(attributes: QuantizedLinearAttributes, inputs: Types) -> tuple[TensorType, ...]:
    x, weight, scale, bias, residual = _operands(inputs)
    zero_point = _zero_point(inputs)
    floats = (DType.FLOAT32, DType.FLOAT16)
    static = attributes.activation == "static"
    if x.dtype not in ((DType.INT8, DType.UINT8) if static else floats) or not x.shape:
        _fail(f"x must be {'int8 or uint8' if static else 'float32 or float16'} of rank 1 or more, got {x}")
    result = attributes.floats(x)
    if result not in floats:
        _fail(f"results must be float32 or float16, not {result.value}")
    if weight.dtype not in (DType.INT2, DType.INT4, DType.INT8) or len(weight.shape) != 2:
        _fail(f"the weight must be int2, int4 or int8 of rank 2, got {weight}")
    n, k = weight.shape
    if x.shape[-1] != k:
        _fail(f"x has {x.shape[-1]} columns, the weight {weight} has {k}")
    if k == 0:
        _fail("there must be at least one input channel")
    if attributes.group_size < 1 or k % attributes.group_size:
        _fail(f"group_size {attributes.group_size} does not divide the {k} input channels")
    if scale.dtype not in floats or scale.shape != (n, k // attributes.group_size):
        _fail(f"the scale must be float32 or float16 {[n, k // attributes.group_size]}, got {scale}")
    if zero_point is not None and (zero_point.dtype is not DType.INT8 or zero_point.shape != scale.shape):
        _fail(f"the zero point of the weight must be int8 {[*scale.shape]}, got {zero_point}")
    if bias is not None and (bias.dtype not in (DType.FLOAT32, result) or bias.shape != (n,)):
        _fail(f"the bias must be float32 or {result.value} {[n]}, got {bias}")
    if static:
        check_parameters("input", attributes.input_scale, attributes.input_zero_point, x.dtype)
    elif attributes.activation != "none":
        if not -128 <= attributes.quant_min < attributes.quant_max <= 127:
            _fail(f"activations of [{attributes.quant_min}, {attributes.quant_max}] are not int8")
        if not (math.isfinite(attributes.eps) and attributes.eps >= 0):
            _fail(f"eps must be a number of 0 or more, got {attributes.eps}")
    output = TensorType(result, (*x.shape[:-1], n))
    if residual is not None and residual != output:
        _fail(f"the residual must be of the result's type {output}, got {residual}")
    requantization = Requantization.of(attributes)
    if requantization is not None:
        requantization.check()
        output = TensorType(requantization.dtype, output.shape)
    return (output,)


def _support(attributes: QuantizedLinearAttributes, inputs: Types) -> str | None:
    x, weight, *_ = _operands(inputs)
    most = MAX_GROUP if _zero_point(inputs) is None else MAX_GROUP_ZEROS
    if attributes.activation != "none" and attributes.group_size > most:
        return f"groups of {attributes.group_size} columns may overflow int32; {most} are supported"
    padded = -(-weight.shape[1] // UNIT) * UNIT
    rows = max(math.prod(x.shape[:-1]), weight.shape[0])
    # Spreading odd groups to whole units can take 32 times the columns, at group size 1.
    width = (
        padded
        if attributes.group_size in (16, weight.shape[1])
        else pitch_of(attributes.group_size) * (weight.shape[1] // attributes.group_size)
    )
    if rows * max(padded, width) > MAX_ELEMENTS or math.prod(x.shape[:-1]) * weight.shape[0] > MAX_ELEMENTS:
        return f"{x} times {weight} has more than {MAX_ELEMENTS} elements"
    return None


def _reference(attributes: QuantizedLinearAttributes, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    """As eager mode: dequantize both to x's dtype, multiply matrices in float32, round. Integers exactly."""
    x, weight, scale, bias, residual, zero_point = (*inputs, None, None, None)[:6]
    assert x is not None
    assert weight is not None
    assert scale is not None
    n, k = weight.shape
    output = Requantization.of(attributes)
    if attributes.activation == "static":
        y = _static_product(attributes, x, weight, scale, zero_point)
        if bias is not None:
            y = y + bias.astype(np.float32)
        y = apply_epilogue(attributes.epilogue, y.reshape(*x.shape[:-1], n), residual)
        return (y.astype(attributes.dtype.numpy) if output is None else output.apply(y),)
    with np.errstate(all="ignore"):
        grouped = weight.reshape(n, -1, attributes.group_size).astype(np.float32)
        if zero_point is not None:
            grouped -= zero_point[..., None].astype(np.float32)
        grouped *= scale[..., None].astype(np.float32)
        w = grouped.reshape(n, k).astype(x.dtype).astype(np.float32)
        rows = x.reshape(-1, k)
        scheme = attributes.scheme
        if scheme is not None:
            q, row_scale, zero_point = quantize(rows, scheme)
            rows = ((q - zero_point).astype(np.float32) * row_scale).astype(x.dtype)
        y = rows.astype(np.float32) @ w.T
        if bias is not None:
            y = y + bias.astype(np.float32)
        y = apply_epilogue(attributes.epilogue, y.reshape(*x.shape[:-1], n), residual)
        return (y.astype(x.dtype) if output is None else output.apply(y),)


def _static_product(
    attributes: QuantizedLinearAttributes, x: Array, weight: Array, scale: Array, zero_point: Array | None
) -> Array:
    """Float32 [m, n] of exact sums a group."""
    n, k = weight.shape
    static = Static.of(attributes.input_scale, attributes.input_zero_point, DType.of(x.dtype))
    size = attributes.group_size
    rows = static.integers(x.reshape(-1, k)).reshape(-1, k // size, size)
    groups = weight.reshape(n, -1, size).astype(np.float64)
    if zero_point is not None:
        groups -= zero_point[..., None]
    sums = np.einsum("mgk,ngk->mng", rows, groups, optimize=True)
    y: Array = (sums.astype(np.float32) * scale.astype(np.float32)).sum(axis=-1, dtype=np.float32)
    return y * np.float32(attributes.input_scale)


@dataclass(frozen=True)
class Choice:
    """A kernel: the rows and columns of y that a workgroup computes, its size, and whether it reads texels."""

    kernel: str
    tile_m: int
    tile_n: int
    local_size: int
    texels: bool = False
    matrix: bool = False
    fragment: Fragment | None = None


def choose(m: int, packing: Packing, dynamic: bool, capabilities: Capabilities, half: bool = False) -> Choice:
    """The kernel for m rows: pure, and the one place that a new kernel (cooperative matrices at tier 2) joins."""
    x_bytes = 4 * m * packing.columns
    scale_bytes = 4 * packing.n * (packing.groups + 3)
    if reads_texels(capabilities, x_bytes, packing.nbytes, scale_bytes):
        rows = 1 if m == 1 else 4 if m <= 4 else 8
        suffix = "_broadcast" if capabilities.shuffle else ""
        return Choice(f"quantized_linear_lanes_{rows}{suffix}", rows, 4 * LANES, LANES, texels=True)
    if m <= MAX_GEMV_ROWS:
        # No more threads than units.
        local_size = min(128, max(32, 1 << (packing.units - 1).bit_length()))
        return Choice(f"quantized_gemv{'_subgroup' if capabilities.tier >= 1 else ''}", m, 2, local_size)
    return _block_choice(blocked.pick(_blocks(dynamic, half), capabilities, m, packing.n), dynamic, half)


def _blocks(dynamic: bool, half: bool) -> tuple[blocked.Block, ...]:
    return blocked.INTEGER if dynamic else blocked.WEIGHTS_HALF if half else blocked.WEIGHTS


def _block_choice(block: blocked.Block, dynamic: bool, half: bool) -> Choice:
    name = "integer" if dynamic else "f16" if half else "f32"
    return Choice(f"quantized_gemm_blocked_{name}_{block.name}", block.m, block.n, block.threads)


def _choices(
    m: int, packing: Packing, dynamic: bool, capabilities: Capabilities, half: bool
) -> tuple[tuple[str, Choice], ...]:
    """By name, the chosen kernel first, then those that may be better."""
    chosen = choose(m, packing, dynamic, capabilities, half)
    if chosen.texels or m <= 4:
        return (("plain", chosen),)
    blocks = blocked.plausible(_blocks(dynamic, half), capabilities, m, packing.n)
    choices = dict.fromkeys((chosen, *(_block_choice(block, dynamic, half) for block in blocks)))
    return tuple((choice.kernel, choice) for choice in choices)


def float_choices(m: int, packing: Packing, dtype: DType, capabilities: Capabilities) -> list[tuple[str, Choice]]:
    """Products of float16 cooperative matrices for m rows of floating-point activations, by name, best first. float32
    ones are rounded to float16 where that is allowed."""
    if m <= MAX_GEMV_ROWS or capabilities.kind == "cpu":
        return []
    if dtype is DType.FLOAT32 and capabilities.matmul_precision == "highest":
        return []
    choices = fragment_choices(m, packing, False, capabilities)
    tiles = candidates(tiles_of(TILES, capabilities, "float16", "float32"), m, packing.n)
    return choices + [(tile.name, matrix_choice(tile)) for tile in tiles]


def fragment_choices(m: int, packing: Packing, integers: bool, capabilities: Capabilities) -> list[tuple[str, Choice]]:
    """Products whose weight comes in fragments of matrices, by name, best first."""
    if integers:
        return [
            (f"fragments_{tile.name}", fragment_choice(tile, fragment, fragment_kernel(tile)))
            for tile, fragment in fragment_candidates(m, packing, capabilities)
        ]
    tiles = candidates(tiles_of(FRAGMENT_TILES, capabilities, "float16", "float32", both=False), m, packing.n)
    return [
        (f"fragments_{tile.name}", fragment_choice(tile, fragment, f"quantized_fragments_{tile.name}"))
        for tile in tiles
        for fragment in capabilities.fragments
        if fragment.suits(tile, "float16") and packing.takes(fragment)
    ]


def _variants(
    attributes: QuantizedLinearAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Variants:
    x, weight, scale, bias, residual = _operands(inputs)
    if outputs[0].numel == 0:
        return (("nothing", Kernels(())),)
    packing = Packing.of(weight, attributes.group_size)
    m = math.prod(x.shape[:-1])
    scheme = attributes.integers(x)
    zeros = _zero_point(inputs) is not None
    output, result = Requantization.of(attributes), attributes.floats(x)
    few = few_rows(
        Case(packing, m, x, scale, bias, residual, zeros, attributes.epilogue, scheme, result, output, capabilities)
    )
    choices: list[tuple[str, Choice]] = []
    most = 2 if few else None
    if zeros or packing.few_bits:
        pass  # The kernels of matrix units have neither.
    elif scheme is None:
        choices = float_choices(m, packing, x.dtype, capabilities)[:most]
    elif m > FEW_ROWS:
        choices = fragment_choices(m, packing, True, capabilities)
        for tiles in list(integer_candidates(m, packing, capabilities))[:most]:
            kernel = tiles.kernel(packing.groups == 1)
            choices.append((tiles.name, Choice(kernel, tiles.tile_m, tiles.tile_n, tiles.threads, matrix=True)))
    half = scheme is None and x.dtype is DType.FLOAT16 and packing.columns == packing.k
    plain = _choices(m, packing, scheme is not None, capabilities, half)
    # Where there are matrix units, one of the others is enough.
    others = list(plain[:1] if choices or few else plain)
    # CPUs multiply integer matrices in vectors like anything else.
    choices = [*others, *choices] if scheme is not None and capabilities.kind == "cpu" else [*choices, *others]
    rest = ((name, _with_rest(attributes, inputs, packing, m, choice, capabilities)) for name, choice in choices)
    return (*few, *rest)


def _with_rest(
    attributes: QuantizedLinearAttributes,
    inputs: Types,
    packing: Packing,
    m: int,
    choice: Choice,
    capabilities: Capabilities,
) -> Kernels:
    """The chosen kernel, and for rows that do not fill its tiles another beside it."""
    everything = _chosen(attributes, inputs, packing, m, choice, capabilities)
    whole = m if choice.texels else whole_rows(m, choice.tile_m)
    x, _, _, _, residual = _operands(inputs)
    # (float16 results of odd rows share words, and are rounded by a pass at the end.)
    if whole == m or not _reads(everything.dispatches[-1], "input", WEIGHT):
        return everything

    def some(rows: int) -> Types:
        """The operands with so many rows of x."""
        of_rows = [TensorType(x.dtype, (rows, packing.k)), *inputs[1:]]
        if residual is not None:
            of_rows[RESIDUAL] = TensorType(residual.dtype, (rows, packing.n))
        return of_rows

    # Activations are quantized for all; a kernel that reads something else is no part of this.
    before = Kernels(everything.dispatches[:-1], everything.scratch)
    row_bytes = {("input", X): x.nbytes // m, ("output", 0): _infer(attributes, inputs)[0].nbytes // m}
    if residual is not None:
        row_bytes["input", RESIDUAL] = residual.nbytes // m
    row_bytes |= {("scratch", i): size // m for i, size in enumerate(everything.scratch[:2])}
    tiles = _chosen(attributes, some(whole), packing, whole, choice, capabilities).dispatches[-1]
    rest = m - whole
    few = [kernels for _, kernels in _variants(attributes, some(rest), _infer(attributes, some(rest)), capabilities)]
    if choice.fragment is not None:
        choices = fragment_choices(rest, packing, attributes.integers(x) is not None, capabilities)
        few = [_chosen(attributes, some(rest), packing, rest, small, capabilities) for _, small in choices]
    for kernels in few:
        if _sources(kernels.dispatches[-1]) == _sources(tiles):
            parts = ((whole, Kernels((tiles,))), (rest, Kernels(kernels.dispatches[-1:])))
            return stacked(before, parts, row_bytes) or everything
    return everything


def _reads(dispatch: Dispatch, role: str, index: int) -> bool:
    return any((arg.role, arg.index) == (role, index) for arg in dispatch.buffers if arg.read)


def _sources(dispatch: Dispatch) -> set[tuple[str, int, str]]:
    """What a product reads but scales, bias and residual: x or its copy, and the weight, as it is packed."""
    return {
        (arg.role, arg.index, arg.layout.name if arg.layout else "")
        for arg in dispatch.buffers[:2]
        if arg.read and (arg.role == "scratch" or arg.index in (X, WEIGHT))
    }


def matrix_choice(tile: Tile) -> Choice:
    return Choice(f"quantized_matrix_{tile.name}", tile.m, tile.n, tile.threads, matrix=True)


def fragment_choice(tile: Tile, fragment: Fragment, kernel: str) -> Choice:
    return Choice(kernel, tile.m, tile.n, tile.threads, matrix=True, fragment=fragment)


def _kernels(
    attributes: QuantizedLinearAttributes, inputs: Types, outputs: Sequence[TensorType], capabilities: Capabilities
) -> Kernels:
    return _variants(attributes, inputs, outputs, capabilities)[0][1]


def _chosen(
    attributes: QuantizedLinearAttributes,
    inputs: Types,
    packing: Packing,
    m: int,
    choice: Choice,
    capabilities: Capabilities,
) -> Kernels:
    """All dispatches around the chosen kernel."""
    x, _, scale, bias, residual = _operands(inputs)
    scheme, zeros = attributes.integers(x), _zero_point(inputs) is not None
    dispatches: tuple[Dispatch, ...] = ()
    scratch: tuple[int, ...] = ()
    source, qparams, x_format = read(X, texels=choice.texels), None, 0
    rows = packing.rows(m, x.dtype)
    if scheme is not None:
        # The kernel for CPUs takes bytes where each of eight lanes brings another row.
        takes_bytes = isinstance(scheme, Static) and choice.kernel == "quantized_linear_lanes_8_broadcast"
        quantized = activations(
            *(rows, X, SCALE, scheme, capabilities),
            floats=choice.texels and not takes_bytes,
            texels=choice.texels,
            takes_bytes=takes_bytes and not zeros,
        )
        unsigned = not quantized.dispatches and x.dtype is DType.UINT8
        x_format = 2 if unsigned else 1 if takes_bytes else 0
        source, qparams = quantized.values, quantized.qparams
        dispatches, scratch = quantized.dispatches, quantized.scratch
    elif packing.columns != packing.k or (choice.texels and x.dtype is DType.FLOAT16):
        dispatch, size = spread(rows, X, capabilities, texels=choice.texels)
        dispatches, scratch = (dispatch,), (size,)
        source = scratch_read(0, texels=choice.texels)
    else:
        x_format = int(x.dtype is DType.FLOAT16)
    result, output = attributes.floats(x), Requantization.of(attributes)
    own = _bytes_at_once(choice, scheme is not None)
    ending = epilogue_constants(attributes.epilogue, residual)
    stored = storing(m, packing.n, result, output, own, len(scratch), capabilities)
    main = _product(
        packing, choice, m, x, scale, bias, zeros, ending, scheme, source, qparams, stored, x_format, capabilities
    )
    return Kernels((*dispatches, main, *stored.after), (*scratch, *stored.scratch))


def _bytes_at_once(choice: Choice, integers: bool) -> int:
    """Neighbouring 8-bit results that a thread of the kernel stores at once; 0 if it cannot."""
    if choice.texels or (choice.matrix and integers):
        return 2
    return 4 if choice.kernel.startswith("quantized_gemm_blocked_integer") else 0


def _product(
    packing: Packing,
    choice: Choice,
    m: int,
    x: TensorType,
    scale: TensorType,
    bias: TensorType | None,
    zeros: bool,
    ending: tuple[int, int],
    scheme: Scheme | Static | None,
    source: Arg,
    qparams: Arg | None,
    stored: Storing,
    x_format: int,
    capabilities: Capabilities,
) -> Dispatch:
    """The matrix product proper. ``x_format``: of floats whether they are float16; of bytes, for the kernels that read
    texels, 1 signed, 2 unsigned."""
    half_x = not choice.texels and x_format == 1
    texels = choice.texels
    integer_matrix = choice.matrix and scheme is not None
    tiles_n = -(-packing.n // choice.tile_n)
    tiles = tiles_n * -(-m // choice.tile_m)
    weights = read(WEIGHT, packing.layout, texels)
    weights_as_words = read(WEIGHT, packing.layout)
    scales = read(SCALE, packing.scale_layout(scale.dtype) if texels else None, texels)
    zero_layout = packing.scale_layout(DType.INT8) if texels else None
    bias_code = 0 if bias is None else 1 if bias.dtype is DType.FLOAT32 else 2
    shared = (
        choice.local_size,
        packing.bits,
        scheme is not None,
        packing.half_groups,
        bias_code,
        stored.code,
        *ending,
    )
    if texels:
        # Sums of products below 2^24 are exact in float32; longer groups are summed in pieces of that.
        largest = (1 << packing.bits) - 1 if zeros else 1 << (packing.bits - 1)
        exact_units = (1 << 24) // (255 * largest * UNIT)
        constants: tuple[int, ...] = (
            *shared,
            exact_units,
            scheme is not None and packing.units_per_group > exact_units,
            zeros,
            x_format,
            (packing.k if source.role == "input" else packing.columns) // 16,
        )
    elif integer_matrix:
        zero_points = 0 if scheme is None or scheme.centered else 1 if scheme.per_token else 2
        constants = (*shared, scale.dtype is DType.FLOAT16, packing.units, packing.units_per_group, zero_points)
        if choice.fragment is not None:
            constants = (*shared, scale.dtype is DType.FLOAT16, packing.units, zero_points)
            weights = read(WEIGHT, packing.fragment_layout(choice.fragment))
    elif choice.matrix:
        sizes = (packing.units, packing.units_per_group, packing.groups == 1)
        constants = (*shared, half_x, scale.dtype is DType.FLOAT16, *sizes)
        if choice.fragment is not None:
            slots, slot_shift, lane_shift = choice.fragment.slots() or (1, 0, 0)
            constants = (*constants, slot_shift, lane_shift, slots)
            weights = read(WEIGHT, packing.fragment_layout(choice.fragment))
            if packing.groups > 1:
                scales = read(SCALE, packing.fragment_scale_layout(choice.fragment, scale.dtype))
    else:
        # How groups end: 2 or 1 in each unit, or 0, after several units (or once, after all).
        ends = 2 if packing.half_groups else 1 if packing.units_per_group == 1 else 0
        whole = ends == 0 and packing.groups == 1
        bitwise = packing.pitch <= (64 if zeros else 128)
        half_scale = scale.dtype is DType.FLOAT16
        constants = (*shared, half_x, half_scale, min(m, 4), 1, ends, whole, bitwise, zeros)
    # Products of float16 matrices have no binding for the rows' scales and zero points.
    without = choice.matrix and scheme is None
    rows_qparams = () if without else (weights if qparams is None else qparams,)
    x_bytes = (
        m
        * packing.columns
        * (1 if texels and x_format else 4 if texels or (scheme is None and not half_x) else 2 if half_x else 1)
    )
    return Dispatch(
        kernel=choice.kernel,
        # Every binding needs a buffer: what is absent is replaced by one that is there, and not read.
        buffers=(
            source,
            weights,
            scales,
            weights if bias is None else read(BIAS, texels=texels),
            *rows_qparams,
            stored.out,
            read(RESIDUAL) if ending[1] else weights_as_words,
            *((weights if packing.groups > 1 else read(WEIGHT, weight_sums(packing)),) if integer_matrix else ()),
            *(() if choice.matrix else (read(ZERO_POINT, zero_layout, texels) if zeros else weights,)),
        ),
        groups=grid(tiles, capabilities, 1),
        constants=constants,
        push=struct.pack("<7I", m, packing.n, packing.units, packing.groups, packing.units_per_group, tiles_n, tiles)
        + stored.push,
        bytes=x_bytes + packing.nbytes + scale.nbytes + m * packing.n * (4, 2, 1)[stored.code],
        flops=2 * m * packing.n * packing.k,
    )


register(
    Operator(
        name="quantized_linear",
        summary="linear with int2, int4 or int8 weights, per group or channel, perhaps 8-bit activations (dynamic or "
        "static) and results",
        infer=_infer,
        reference=_reference,
        kernels=_kernels,
        variants=_variants,
        attributes=QuantizedLinearAttributes,
        support=_support,
        constant_inputs=frozenset({WEIGHT, SCALE, BIAS, ZERO_POINT}),
        dtypes=(DType.FLOAT32, DType.FLOAT16, DType.INT8, DType.UINT8),
    )
)
