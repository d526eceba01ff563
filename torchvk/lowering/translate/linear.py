"""Matrix products in floating point. Quantized ones are patterns: see ``torchvk.lowering.patterns``.

exir hands a linear over as a transposition, a product and perhaps an addition. Here each becomes what it is; the
pass ``torchvk.lowering.passes.linear`` puts them together to one operator.
"""

from __future__ import annotations

from torchvk.lowering.draft import Value
from torchvk.lowering.translate.registry import Translator, translates


@translates("aten.mm.default", "aten.bmm.default")
def mm(t: Translator, self: Value, mat2: Value) -> Value:
    return t.op("matmul", self, mat2)


@translates("aten.matmul.default")
def matmul(t: Translator, self: Value, other: Value) -> Value:
    a = t.reshape(self, (1, *self.shape)) if len(self.shape) == 1 else self
    b = t.reshape(other, (*other.shape, 1)) if len(other.shape) == 1 else other
    return t.reshape(t.op("matmul", a, b), t.out.shape)


@translates("aten.mv.default")
def mv(t: Translator, self: Value, vec: Value) -> Value:
    return matmul(t, self, vec)


@translates("aten.dot.default")
def dot(t: Translator, self: Value, tensor: Value) -> Value:
    return matmul(t, self, tensor)


@translates("aten.linear.default")
def linear(t: Translator, input: Value, weight: Value, bias: Value | None = None) -> Value:
    return t.op("linear", input, weight, bias)


@translates("aten.addmm.default")
def addmm(t: Translator, self: Value, mat1: Value, mat2: Value, beta: float = 1, alpha: float = 1) -> Value:
    return add_product(t, self, t.op("matmul", mat1, mat2), beta, alpha)


@translates("aten.baddbmm.default")
def baddbmm(t: Translator, self: Value, batch1: Value, batch2: Value, beta: float = 1, alpha: float = 1) -> Value:
    return add_product(t, self, t.op("matmul", batch1, batch2), beta, alpha)


def add_product(t: Translator, addend: Value, product: Value, beta: float = 1, alpha: float = 1) -> Value:
    """``beta * addend + alpha * product``; with ``beta`` 0 the addend is not looked at, NaN or not."""
    if alpha != 1:
        product = t.op("mul", product, t.scalar(alpha, product.dtype))
    if beta == 0:
        return product
    if beta != 1:
        addend = t.op("mul", addend, t.scalar(beta, addend.dtype))
    return t.op("add", product, addend)
