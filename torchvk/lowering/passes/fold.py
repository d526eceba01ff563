"""Compute once, now, what depends on constants alone."""

from __future__ import annotations

import numpy as np

from torchvk import ops
from torchvk.lowering.draft import Call, Draft, Value, constant, is_constant
from torchvk.lowering.passes.rewrite import Rewriter, rewrite

# A result may be this large, or as large as what it is computed from: the file must not grow by it.
MAX_BYTES = 1 << 20
# Less for operators that fill memory from a few attributes: to run them costs next to nothing.
MAX_FILLED_BYTES = 1 << 12
FILLS = ("full", "arange", "expand", "repeat")


def fold_constants(draft: Draft) -> Draft:
    """Replace calls of constant operands by their results, from the operators' own references."""
    return rewrite(draft, _fold)


def fold_parameters(draft: Draft) -> Draft:
    """The same, but for weights that are dequantized, of which passes make integer operators, and those that are
    expanded to a batch, which are linear layers' own."""
    later = ("dequantize", "expand")
    return rewrite(draft, lambda rewriter, call: None if call.op in later else _fold(rewriter, call))


def _fold(rewriter: Rewriter, call: Call) -> Value | None:
    if not is_constant(call.inputs) or any(v is not None and v.dtype.bits < 8 for v in call.inputs):
        return None
    size = call.outputs[0].type.nbytes
    given = sum(value.type.nbytes for value in call.inputs if value is not None)
    if size > max(given, MAX_FILLED_BYTES if call.op in FILLS else MAX_BYTES):
        return None
    arrays = [None if value is None else value.array for value in call.inputs]
    with np.errstate(all="ignore"):
        (result,) = ops.get(call.op).reference(call.attributes, arrays)
    output = call.outputs[0]
    array = np.ascontiguousarray(result, dtype=output.dtype.numpy).reshape(output.shape)
    return constant(array, output.name)
