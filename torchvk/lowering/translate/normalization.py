"""Softmax and layer normalization."""

from __future__ import annotations

from collections.abc import Sequence

from torchvk.graph import DType
from torchvk.lowering.draft import Value
from torchvk.lowering.translate.registry import Translation, Translator, dim_of, register, translates

SOFTMAX = {"aten._softmax.default": "softmax", "aten._log_softmax.default": "log_softmax"}


def softmax(op: str) -> Translation:
    def translate(t: Translator, self: Value, dim: int, half_to_float: bool = False) -> Value:
        x = t.cast(self, DType.FLOAT32) if half_to_float else self
        if not x.shape:
            return t.reshape(t.op(op, t.reshape(x, (1,)), dim=0), ())
        return t.op(op, x, dim=dim_of(dim, len(x.shape)))

    return translate


for _name, _op in SOFTMAX.items():
    register(softmax(_op), _name)


@translates("aten.native_layer_norm.default")
def native_layer_norm(
    t: Translator, input: Value, normalized_shape: Sequence[int], weight: Value | None, bias: Value | None, eps: float
) -> tuple[Value | None, ...]:
    """torch also gives mean and reciprocal standard deviation, which only training uses."""
    return (layer_norm(t, input, normalized_shape, weight, bias, eps), None, None)


@translates("aten.layer_norm.default")
def layer_norm(
    t: Translator,
    input: Value,
    normalized_shape: Sequence[int],
    weight: Value | None = None,
    bias: Value | None = None,
    eps: float = 1e-5,
) -> Value:
    return t.op("layer_norm", input, weight, bias, dims=len(normalized_shape), eps=float(eps))
