"""Every torch operator that is translated, exported by exir, against eager mode.

The functions of a family are the outputs of one module: it must be delegated whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from executorch.exir import EdgeCompileConfig, to_edge

from tests.edge import Lowered, inspect_edge, lower_module, mismatch
from tests.images import IMAGES, image_inputs
from torchvk import ops
from torchvk.lowering.translate import TRANSLATIONS
from torchvk.partitioner.vulkan_partitioner import VulkanPartitioner

Functions = Mapping[str, Callable[..., Any]]


class Family(torch.nn.Module):
    def __init__(self, functions: Functions) -> None:
        super().__init__()
        self.functions = functions
        self.modules_of = torch.nn.ModuleList(f for f in functions.values() if isinstance(f, torch.nn.Module))

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(function(*inputs) for function in self.functions.values())


def check(functions: Functions, inputs: tuple[torch.Tensor, ...], tolerance: float = 1e-5) -> Lowered:
    lowered = lower_module(Family(functions), inputs)
    assert lowered.report == []
    assert len(lowered.graphs) == 1
    outputs = zip(functions.items(), lowered.run(*inputs), strict=True)
    wrong = {name: mismatch(output, function(*inputs), tolerance) for (name, function), output in outputs}
    assert {name: difference for name, difference in wrong.items() if difference} == {}
    return lowered


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(low: int, high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


UNARY = {
    **{
        name: (lambda function: lambda x, i, b: function(x))(getattr(torch, name))
        for name in (
            *("exp", "expm1", "sin", "cos", "tanh", "erf", "sigmoid", "reciprocal", "floor", "ceil", "round", "trunc"),
            *("abs", "neg", "sign", "relu", "isnan", "isinf", "logical_not"),
        )
    },
    "log": lambda x, i, b: torch.log(x),
    "log1p": lambda x, i, b: torch.log1p(x),
    "sqrt": lambda x, i, b: x.sqrt(),
    "rsqrt": lambda x, i, b: x.rsqrt(),
    "silu": lambda x, i, b: F.silu(x),
    "hardswish": lambda x, i, b: F.hardswish(x),
    "hardsigmoid": lambda x, i, b: F.hardsigmoid(x),
    # Of infinity torch's vector code makes NaN on some processors and infinity on others.
    "gelu": lambda x, i, b: F.gelu(x.clamp(-1e4, 1e4)),
    "gelu tanh": lambda x, i, b: F.gelu(x, approximate="tanh"),
    "leaky_relu": lambda x, i, b: F.leaky_relu(x, 0.2),
    "elu": lambda x, i, b: F.elu(x, 0.7),
    "selu": lambda x, i, b: F.selu(x),
    "relu6": lambda x, i, b: F.relu6(x),
    "hardtanh": lambda x, i, b: F.hardtanh(x, -0.3, 0.4),
    "softplus": lambda x, i, b: F.softplus(x),
    "log_sigmoid": lambda x, i, b: F.logsigmoid(x),
    "square": lambda x, i, b: x.square(),
    "isfinite": lambda x, i, b: torch.isfinite(x),
    "nan_to_num": lambda x, i, b: torch.nan_to_num(x),
    # Integers: float32 where the function is not closed over them, else as they are.
    "exp of integers": lambda x, i, b: torch.exp(i),
    "sqrt of bools": lambda x, i, b: torch.sqrt(b),
    "floor of integers": lambda x, i, b: torch.floor(i),
    "isnan of integers": lambda x, i, b: torch.isnan(i),
    "abs of integers": lambda x, i, b: i.abs(),
    "neg of integers": lambda x, i, b: -i,
    "sign of integers": lambda x, i, b: i.sign(),
    "relu of integers": lambda x, i, b: torch.relu(i),
    "not of integers": lambda x, i, b: ~i,
    "not of bools": lambda x, i, b: ~b,
    "logical_not of integers": lambda x, i, b: torch.logical_not(i),
}

BINARY = {
    "add": lambda x, y, i, j, b: x + y,
    "add, broadcast": lambda x, y, i, j, b: x + y[:, :1] + y[0],
    "add integers to floats": lambda x, y, i, j, b: x + i,
    "add a number": lambda x, y, i, j, b: x + 2,
    "add a float to integers": lambda x, y, i, j, b: i + 2.5,
    "add with alpha": lambda x, y, i, j, b: torch.add(x, y, alpha=2),
    "add int64 and int32": lambda x, y, i, j, b: i + j,
    "sub": lambda x, y, i, j, b: x - y,
    "sub with alpha": lambda x, y, i, j, b: torch.sub(x, 3, alpha=2),
    "rsub": lambda x, y, i, j, b: 1 - x,
    "rsub with alpha": lambda x, y, i, j, b: torch.rsub(x, y, alpha=3),
    "mul": lambda x, y, i, j, b: x * y,
    "mul by bools": lambda x, y, i, j, b: x * b,
    "div": lambda x, y, i, j, b: x / y,
    "div integers": lambda x, y, i, j, b: i / j,
    "div by a number": lambda x, y, i, j, b: i / 3,
    "div of a number": lambda x, y, i, j, b: 1 / y,
    "floor_divide": lambda x, y, i, j, b: x // y,
    "floor_divide integers": lambda x, y, i, j, b: i // j,
    "floor_divide by a number": lambda x, y, i, j, b: i // 3,
    "div rounded down": lambda x, y, i, j, b: torch.div(x, y, rounding_mode="floor"),
    "div truncated": lambda x, y, i, j, b: torch.div(x, y, rounding_mode="trunc"),
    "div integers truncated": lambda x, y, i, j, b: torch.div(i, j, rounding_mode="trunc"),
    "remainder": lambda x, y, i, j, b: x % y,
    "remainder of integers": lambda x, y, i, j, b: i % j,
    "remainder by a number": lambda x, y, i, j, b: i % 3,
    "fmod": lambda x, y, i, j, b: torch.fmod(i, j),
    "fmod by a number": lambda x, y, i, j, b: torch.fmod(x, 0.7),
    "minimum": lambda x, y, i, j, b: torch.minimum(x, y),
    "maximum": lambda x, y, i, j, b: torch.maximum(x, i.float()),
    "atan2": lambda x, y, i, j, b: torch.atan2(x, y),
    "eq": lambda x, y, i, j, b: i == j,
    "eq of bools": lambda x, y, i, j, b: b == (x > 0),
    "ne": lambda x, y, i, j, b: i != 1,
    "lt": lambda x, y, i, j, b: x < y,
    "le": lambda x, y, i, j, b: x <= 0,
    "gt": lambda x, y, i, j, b: i > x,
    "ge": lambda x, y, i, j, b: i >= 0.5,
    "logical_and": lambda x, y, i, j, b: torch.logical_and(i > 0, b),
    "logical_or": lambda x, y, i, j, b: torch.logical_or(x > 0, b),
    "logical_xor": lambda x, y, i, j, b: torch.logical_xor(b, i > 0),
    "bitwise_and": lambda x, y, i, j, b: b & (x > 0),
    "bitwise_or": lambda x, y, i, j, b: i | j,
    "bitwise_xor": lambda x, y, i, j, b: i ^ 3,
    "pow 0": lambda x, y, i, j, b: x**0,
    "pow 1": lambda x, y, i, j, b: x**1,
    "pow 2": lambda x, y, i, j, b: x**2,
    "pow 3": lambda x, y, i, j, b: x**3,
    "pow 4": lambda x, y, i, j, b: x**4,
    "pow 0.5": lambda x, y, i, j, b: x.abs() ** 0.5,
    "pow -0.5": lambda x, y, i, j, b: x.abs() ** -0.5,
    "pow -1": lambda x, y, i, j, b: y**-1,
    "pow -2": lambda x, y, i, j, b: y**-2,
    "pow 1.7": lambda x, y, i, j, b: x.abs() ** 1.7,
    "pow of integers": lambda x, y, i, j, b: i**3 + i**2 + i**5,
    "pow of tensors": lambda x, y, i, j, b: x.abs() ** y,
    "pow of a number": lambda x, y, i, j, b: 2.0**x,
    "clamp": lambda x, y, i, j, b: x.clamp(-0.5, 0.5),
    "clamp below": lambda x, y, i, j, b: x.clamp(min=0.1),
    "clamp integers above": lambda x, y, i, j, b: i.clamp(max=2),
    "clamp integers by a float": lambda x, y, i, j, b: i.clamp(min=0.5),
    "clamp by tensors": lambda x, y, i, j, b: torch.clamp(x, y - 1, y + 1),
    "clamp below by a tensor": lambda x, y, i, j, b: torch.clamp(x, min=y),
    "where": lambda x, y, i, j, b: torch.where(b, x, y),
    "where with a number": lambda x, y, i, j, b: torch.where(b, x, 0.5),
    "where, mixed": lambda x, y, i, j, b: torch.where(b, i, x),
    "masked_fill": lambda x, y, i, j, b: x.masked_fill(b, float("-inf")),
    "masked_fill of integers": lambda x, y, i, j, b: i.masked_fill(b, 7),
    "to float16": lambda x, y, i, j, b: x.half() + 1.5,
    "to int64": lambda x, y, i, j, b: (4 * x).long(),
    "to bool": lambda x, y, i, j, b: i.bool(),
    "to uint8": lambda x, y, i, j, b: i.abs().to(torch.uint8),
    "bool to float": lambda x, y, i, j, b: b.float(),
}

MOVEMENT = {
    "view": lambda x, i: x.view(6, 4),
    "flatten": lambda x, i: x.flatten(1),
    "unflatten": lambda x, i: x.unflatten(2, (2, 2)),
    "unsqueeze": lambda x, i: x.unsqueeze(-1),
    "squeeze": lambda x, i: x[:1, :1].squeeze(),
    "squeeze one": lambda x, i: x[:1].squeeze(0),
    "permute": lambda x, i: x.permute(2, 0, 1),
    "permute, negative": lambda x, i: x.permute(-1, -3, -2),
    "transpose": lambda x, i: x.transpose(0, -1),
    "t": lambda x, i: x[0].t(),
    "expand": lambda x, i: x[:, :1].expand(2, 5, 4),
    "expand to more dimensions": lambda x, i: x.expand(3, -1, -1, -1),
    "slice": lambda x, i: x[:, 1:],
    "slice from behind": lambda x, i: x[..., -2:],
    "slice with a step": lambda x, i: x[:, :, ::2],
    "slice too far": lambda x, i: x[:, 1:100],
    "slice of nothing": lambda x, i: x[:, 3:],
    "select": lambda x, i: x[:, -1],
    "select to a number": lambda x, i: i[1, 2, -1],
    "unbind": lambda x, i: x.unbind(1)[2],
    "flip": lambda x, i: x.flip(0, 2),
    "cat": lambda x, i: torch.cat([x, x * 2, x[:, :1]], 1),
    "cat of several dtypes": lambda x, i: torch.cat([x, i], -1),
    "cat with an empty tensor": lambda x, i: torch.cat([x, torch.zeros(0)], 0),
    "stack": lambda x, i: torch.stack([x, x + 1], 1),
    "split": lambda x, i: x.split(2, 2)[1],
    "split in sizes": lambda x, i: torch.split(x, [1, 2], 1)[1] + torch.split(x, [1, 2], 1)[0],
    "chunk": lambda x, i: x.chunk(3, 1)[2],
    "repeat": lambda x, i: x.repeat(2, 1, 2),
    "repeat to more dimensions": lambda x, i: x.repeat(2, 2, 1, 1),
    "repeat_interleave": lambda x, i: x.repeat_interleave(2, dim=1),
    "roll": lambda x, i: x.roll(1, 1),
    "pad": lambda x, i: F.pad(x, (1, 2, 0, 1), value=3.0),
    "pad, negative": lambda x, i: F.pad(i, (-1, 1), value=2),
    "tril": lambda x, i: x.tril(),
    "slice_scatter": lambda x, i: torch.slice_scatter(x, x[:, :1] * 2, 1, 1, 2),
    "select_scatter": lambda x, i: torch.select_scatter(x, x[:, 0] * 2, 1, 2),
    "clone": lambda x, i: x.clone() + x.detach(),
    "contiguous": lambda x, i: x.permute(1, 0, 2).contiguous().view(3, 8),
    "zeros_like": lambda x, i: torch.zeros_like(x) + x,
    "ones": lambda x, i: x + torch.ones(3, 1),
    "full": lambda x, i: torch.full((2, 2), 7) * i[0, 0, 0],
    "full_like": lambda x, i: torch.full_like(i, 3) * i,
    "arange": lambda x, i: torch.arange(5) + i[0, 0, 0],
    "arange of floats": lambda x, i: torch.arange(0.0, 1.0, 0.25) * x,
    "arange downwards": lambda x, i: torch.arange(10, 0, -3) + i[0, 0, 0],
    "tensor": lambda x, i: x + torch.tensor([1.0, 2.0, 3.0, 4.0]),
}

INDEXING = {
    "embedding": lambda x, i, k: F.embedding(k, x[0]),
    "gather": lambda x, i, k: x.gather(2, i.abs() % 4),
    "take_along_dim": lambda x, i, k: torch.take_along_dim(x, i.abs() % 2, 0),
    "index": lambda x, i, k: x[k % 2],
    "index a later dimension": lambda x, i, k: x[:, k],
    "index two dimensions": lambda x, i, k: x[k % 2, k],
    "index two dimensions apart": lambda x, i, k: x[k % 2, :, k],
    "index_select": lambda x, i, k: x.index_select(1, k),
}

REDUCTIONS = {
    "sum": lambda x, i: x.sum(),
    "sum over a dimension": lambda x, i: x.sum(1),
    "sum, kept": lambda x, i: x.sum((0, -1), keepdim=True),
    "sum of integers": lambda x, i: i.sum(1),
    "sum of bools": lambda x, i: (x > 0).sum(),
    "sum of a number": lambda x, i: x[0, 0, 0].sum(),
    "mean": lambda x, i: x.mean(-1),
    "mean of all": lambda x, i: x.mean(),
    "amax": lambda x, i: x.amax(1),
    "amin": lambda x, i: i.amin((0, 2)),
    "max": lambda x, i: x.max(),
    "max over a dimension": lambda x, i: x.max(1)[0],
    "where the maximum is": lambda x, i: x.max(1)[1],
    "min, kept": lambda x, i: x.min(2, keepdim=True)[0],
    "any": lambda x, i: (x > 1).any(),
    "any over a dimension": lambda x, i: (x > 1).any(1),
    "all": lambda x, i: (x > -1).all(2, keepdim=True),
    "prod": lambda x, i: x.prod(1),
    "argmax": lambda x, i: x.argmax(),
    "argmax over a dimension": lambda x, i: x.argmax(1),
    "argmin, kept": lambda x, i: x.argmin(2, keepdim=True),
    "var": lambda x, i: x.var(1),
    "var, biased": lambda x, i: x.var(1, unbiased=False, keepdim=True),
    "std": lambda x, i: x.std(),
    "norm": lambda x, i: x.norm(dim=1),
    "normalize": lambda x, i: F.normalize(x, dim=-1),
    "logsumexp": lambda x, i: torch.logsumexp(x, 1),
    "cumsum": lambda x, i: x.cumsum(1),
    "cumsum of integers": lambda x, i: i.cumsum(-1),
    "softmax": lambda x, i: x.softmax(-1),
    "softmax over a middle dimension": lambda x, i: x.softmax(1),
    "log_softmax": lambda x, i: x.log_softmax(2),
    "layer_norm": lambda x, i: F.layer_norm(x, (4,)),
    "layer_norm over two dimensions": lambda x, i: F.layer_norm(x, (3, 4), x[0], x[1]),
    "rms_norm": lambda x, i: F.rms_norm(x, (4,)),
}

PRODUCTS = {
    "linear": lambda x, w, v: F.linear(x, w),
    "linear with bias": lambda x, w, v: F.linear(x, w, w[:, 0]),
    "mm": lambda x, w, v: x[0] @ w.t(),
    "matmul": lambda x, w, v: x @ w.t(),
    "matmul, broadcast": lambda x, w, v: x[:, None] @ w.t(),
    "matmul of batches, broadcast": lambda x, w, v: x[None].expand(3, -1, -1, -1) @ x.mT,
    "bmm": lambda x, w, v: torch.bmm(x, x.mT),
    "matrix and vector": lambda x, w, v: w @ v,
    "batch and vector": lambda x, w, v: x @ v,
    "vector and matrix": lambda x, w, v: v @ w.t(),
    "dot": lambda x, w, v: v.dot(v),
    "addmm": lambda x, w, v: torch.addmm(w[0, :3], x[0], x[1].t(), alpha=2, beta=0.5),
    "addmm without addend": lambda x, w, v: torch.addmm(w[:3, :3], x[0], x[1].t(), beta=0),
    "baddbmm": lambda x, w, v: torch.baddbmm(x[:, :, :3], x, x.mT),
    "einsum": lambda x, w, v: torch.einsum("bij,bkj->bik", x, x),
    "einsum with a matrix": lambda x, w, v: torch.einsum("bij,kj->bki", x, w),
    "outer": lambda x, w, v: torch.outer(v, v),
    "attention": lambda x, w, v: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "causal attention": lambda x, w, v: F.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True),
}


def test_unary() -> None:
    x = torch.cat([random(3, 5), torch.tensor([[0.0, -0.0, torch.inf, -torch.inf, torch.nan]])])
    check(UNARY, (x, integers(-9, 9, 3, 5), random(3, 5, seed=1) > 0))


def test_binary() -> None:
    y = random(3, 5, seed=1)
    y = y + y.sign() / 2
    j = integers(1, 6, 5).to(torch.int32)
    check(BINARY, (random(3, 5), y, integers(-5, 6, 3, 5), j, random(3, 5, seed=2) > 0))


def test_movement() -> None:
    check(MOVEMENT, (random(2, 3, 4), integers(-9, 9, 2, 3, 4)))


def test_indexing() -> None:
    check(INDEXING, (random(2, 3, 4), integers(-9, 9, 2, 3, 4), torch.tensor([2, 0, 1])))


def test_reductions() -> None:
    check(REDUCTIONS, (random(2, 3, 4), integers(-9, 9, 2, 3, 4)))


def test_products() -> None:
    check(PRODUCTS, (random(2, 3, 4), random(6, 4, seed=1), random(4, seed=2)))


def test_float16() -> None:
    """A family in float16: compared to 2^-9 of the largest value, twice the rounding of one operation."""
    x, y = random(2, 3, 4).half(), random(2, 3, 4, seed=1).half()
    functions: Functions = {
        "add a number": lambda x, y: x + 0.1,
        "mul": lambda x, y: x * y,
        "gelu": lambda x, y: F.gelu(x),
        "softmax": lambda x, y: x.softmax(-1),
        "softmax in float32": lambda x, y: x.softmax(-1, dtype=torch.float32),
        "layer_norm": lambda x, y: F.layer_norm(x, (4,)),
        "sum": lambda x, y: x.sum(1),
        "matmul": lambda x, y: x @ y.mT,
        "mixed": lambda x, y: x.float() + y,
    }
    check(functions, (x, y), 2**-9)


@pytest.mark.parametrize("rank", [0, 1, 8])
def test_ranks(rank: int) -> None:
    x = random(*range(1, rank + 1)[:3], *(1, 2, 1, 2, 1)[: max(rank - 3, 0)])
    assert x.dim() == rank
    functions: Functions = {
        "arithmetic": lambda x: torch.exp(x) * 2 + x,
        "sum": lambda x: (x + 1).sum(),
        "reverse": lambda x: (x + 2).permute(tuple(reversed(range(rank)))).flatten(),
        "softmax": lambda x: x.softmax(-1),
    }
    check(functions, (x,))


def test_empty_tensors() -> None:
    functions: Functions = {
        "add": lambda x, y: x + y,
        "cat": lambda x, y: torch.cat([x, y, x]) * 2,
        "sum": lambda x, y: x.sum(1),
        "linear": lambda x, y: x @ torch.ones(4, 2),
    }
    check(functions, (torch.zeros(0, 4), torch.zeros(0, 4)))


def test_every_operator_can_be_reached() -> None:
    """Nothing in ops/ that no program could use; a user may tell exir to take some operators not apart."""
    aten = torch.ops.aten
    config = EdgeCompileConfig(
        preserve_ops=[aten.silu.default, aten.hardswish.default, aten.hardsigmoid.default, aten.all.dim],
        _core_aten_ops_exception_list=[aten.silu.default, aten.hardswish.default, aten.hardsigmoid.default],
    )
    x, i, j, b = random(3, 5), integers(-5, 6, 3, 5), integers(1, 6, 5).to(torch.int32), random(3, 5) > 0
    cube, cubes, k = random(2, 3, 4), integers(-9, 9, 2, 3, 4), torch.tensor([2, 0, 1])
    fills = {
        "arange": lambda x: torch.arange(2000) + x[0, 0].int(),
        "full": lambda x: torch.cat([torch.full((2000,), 1.5), x[0]]),
    }
    layer = {"linear": torch.nn.Linear(5, 3)}
    conv = {"conv": torch.nn.Conv1d(2, 3, 2)}
    attention = {"attention": lambda q: F.scaled_dot_product_attention(q, q + 1, q - 1)}
    # See test_lowering_quantized.py, test_quantizer_lowering.py and test_lowering_int8.py.
    used = {
        "quantized_linear",
        "quantize",
        "dequantize",
        "choose_qparams",
        "lookup",
        "quantized_arithmetic",
        "quantized_avg_pool",
        "quantized_adaptive_avg_pool",
    }
    used |= {"quantized_conv", "quantized_embedding"}  # see test_lowering_conv.py and test_lowering_embedding.py
    # Attention is known by its parts, which the configuration above would keep whole.
    used |= set(lower_module(Family(attention), (random(2, 3, 5, 8),)).operators())
    for family, inputs in (
        (UNARY, (x, i, b)),
        (BINARY, (x, x.abs() + 1, i, j, b)),
        (MOVEMENT, (cube, cubes)),
        (INDEXING, (cube, cubes, k)),
        (REDUCTIONS, (cube, cubes)),
        (PRODUCTS, (cube, random(6, 4), random(4))),
        (IMAGES, image_inputs()),
        (fills, (x,)),
        (layer, (x,)),
        (conv, (random(1, 2, 4),)),
    ):
        edge = to_edge(torch.export.export(Family(family), inputs), compile_config=config)
        lowered = inspect_edge(edge.to_backend(VulkanPartitioner()))
        assert lowered.cpu == []
        used |= set(lowered.operators())
    assert used == {operator.name for operator in ops.operators()}


def test_translations_name_operators_of_torch() -> None:
    """A misspelled name in a table would never be met."""
    for name in TRANSLATIONS:
        namespace, packet, overload = name.split(".")
        if namespace == "dim_order_ops":
            continue
        assert hasattr(getattr(getattr(torch.ops, namespace), packet), overload), name
