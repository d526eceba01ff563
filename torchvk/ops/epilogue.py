"""What a linear layer does to its results before it stores them: y = f(x Wᵀ + b) + residual, or, as "sum_relu",
relu(x Wᵀ + b + residual).

In float32 and rounded once, so that float16 graphs come out closer to the exact value than eager mode, which rounds
after each step. f is an activation that follows the layer, the residual what a transformer adds to it; a residual block
of a convolutional network ends with a relu behind that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np

from torchvk.graph import DType, TensorType
from torchvk.ops import arithmetic
from torchvk.ops.operator import Array

Activation = Literal["none", "relu", "gelu", "gelu_tanh", "silu", "relu6", "hardswish"]
Epilogue = Literal[Activation, "sum_relu"]
EPILOGUES: tuple[Epilogue, ...] = get_args(Epilogue)
# From 1 on they are the kinds of the shaders; 8-bit ones: torchvk.ops.quantized_sum.
RESIDUALS = (DType.FLOAT32, DType.FLOAT16, DType.INT8, DType.UINT8)


def epilogue_constants(epilogue: Epilogue, residual: TensorType | None) -> tuple[int, int]:
    """The two specialization constants of shaders/epilogue.slang: the function and the residual's kind."""
    return EPILOGUES.index(epilogue), residual_kind(residual)


def residual_kind(residual: TensorType | None) -> int:
    return 0 if residual is None else 1 + RESIDUALS.index(residual.dtype)


def apply_epilogue(epilogue: Epilogue, y: Array, residual: Array | None) -> Array:
    """The reference: float32 in, float32 out."""
    with np.errstate(all="ignore"):
        if epilogue != "sum_relu":
            y = np.asarray(_FUNCTIONS[epilogue](y))
        y = y if residual is None else np.asarray(y + residual.astype(y.dtype))
        return _relu(y) if epilogue == "sum_relu" else y


def _relu(x: Array) -> Array:
    return np.asarray(np.maximum(x, x.dtype.type(0)))


_FUNCTIONS: dict[Activation, Callable[[Array], Array]] = {
    "none": lambda x: x,
    "relu": _relu,
    "gelu": arithmetic.gelu,
    "gelu_tanh": arithmetic.gelu_tanh,
    "silu": arithmetic.silu,
    "relu6": lambda x: np.asarray(np.minimum(_relu(x), x.dtype.type(6))),
    "hardswish": arithmetic.hardswish,
}
