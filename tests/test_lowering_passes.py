"""Passes, one at a time, on drafts written by hand; each must leave the results as they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sketches import F32, Sketch, check, number

from torchvk.graph import DType, TensorType
from torchvk.lowering.draft import Value, constant
from torchvk.lowering.passes import optimize
from torchvk.lowering.passes.clean import remove_dead, share
from torchvk.lowering.passes.float16 import to_float16
from torchvk.lowering.passes.fold import MAX_BYTES, fold_constants
from torchvk.lowering.passes.linear import fuse_linear
from torchvk.lowering.passes.views import simplify_views
from torchvk.lowering.refusal import Refused
from torchvk.lowering.types import promote


def test_reshapes_join() -> None:
    s = Sketch((2, 3, 4))
    y = s.op("reshape", s.op("reshape", s.draft.inputs[0], shape=[6, 4]), shape=[24])
    check(s.returns(s.op("exp", y)), simplify_views, "reshape", "exp")


def test_reshape_there_and_back_is_nothing() -> None:
    s = Sketch((2, 3, 4))
    y = s.op("reshape", s.op("reshape", s.draft.inputs[0], shape=[6, 4]), shape=[2, 3, 4])
    check(s.returns(s.op("exp", y)), simplify_views, "exp")


@pytest.mark.parametrize(
    ("shape", "dims", "left"),
    [
        ((2, 3), [0, 1], []),
        ((2, 1, 3), [1, 0, 2], ["reshape"]),
        ((2, 1, 3), [2, 1, 0], ["permute"]),
        ((1, 1), [1, 0], []),
    ],
)
def test_permute(shape: tuple[int, ...], dims: list[int], left: list[str]) -> None:
    """Nothing, or a view, where only sizes of 1 move."""
    s = Sketch(shape)
    check(s.returns(s.op("exp", s.op("permute", s.draft.inputs[0], dims=dims))), simplify_views, *left, "exp")


def test_permutes_join() -> None:
    s = Sketch((2, 3, 4))
    y = s.op("permute", s.op("permute", s.draft.inputs[0], dims=[2, 0, 1]), dims=[2, 0, 1])
    draft = check(s.returns(y), simplify_views, "permute")
    assert draft.calls[0].attributes.dims == [1, 2, 0]


def test_permute_there_and_back_is_nothing() -> None:
    s = Sketch((2, 3, 4))
    y = s.op("permute", s.op("permute", s.draft.inputs[0], dims=[2, 0, 1]), dims=[1, 2, 0])
    check(s.returns(s.op("exp", y)), simplify_views, "exp")


def test_expand_of_nothing_is_a_view() -> None:
    s = Sketch((3, 4))
    check(s.returns(s.op("exp", s.op("expand", s.draft.inputs[0], shape=[1, 3, 4]))), simplify_views, "reshape", "exp")


def test_elementwise_operators_broadcast_by_themselves() -> None:
    s = Sketch((3, 1), (3, 4))
    wide = s.op("expand", s.draft.inputs[0], shape=[3, 4])
    filled = s.op("full", shape=[3, 4], value=2.0, dtype="float32")
    draft = check(s.returns(s.op("add", s.op("mul", wide, s.draft.inputs[1]), filled)), simplify_views, "mul", "add")
    assert draft.calls[1].inputs[1].shape == ()  # type: ignore[union-attr]


def test_a_broadcast_that_gives_the_shape_stays() -> None:
    s = Sketch((3, 1))
    wide = s.op("expand", s.draft.inputs[0], shape=[3, 4])
    check(s.returns(s.op("mul", wide, wide)), simplify_views, "expand", "mul")


def test_constants_fold() -> None:
    s = Sketch((4,))
    c = s.op("mul", s.op("arange", start=0.0, step=1.0, size=4, dtype="float32"), number(2))
    draft = check(s.returns(s.op("add", s.draft.inputs[0], c)), fold_constants, "add")
    assert draft.calls[0].inputs[1].array.tolist() == [0, 2, 4, 6]  # type: ignore[union-attr]


def test_folding_does_not_blow_up_the_file() -> None:
    s = Sketch((1,))
    n = MAX_BYTES // 4 + 1
    large = constant(np.zeros((n, 1), np.float32))
    # As large as its operand: folded. Much larger, or made of nothing: not.
    small = constant(np.zeros(16, np.float32))
    y = s.op("mul", s.draft.inputs[0], s.op("exp", large))
    z = s.op("expand", small, shape=[n, 16])
    f = s.op("full", shape=[n], value=1.0, dtype="float32")
    ops_left = [call.op for call in fold_constants(s.returns(y, z, f)).calls]
    assert ops_left == ["mul", "expand", "full"]


def test_integers_fold_as_integers() -> None:
    s = Sketch()
    big = constant(np.array([2**62], np.int64))
    y = s.op("add", big, constant(np.array([1], np.int64)))
    graph = optimize(s.returns(y)).graph()
    assert graph.nodes == ()
    assert graph.constant_array(graph.outputs[0]).tolist() == [2**62 + 1]


def test_equal_calls_become_one() -> None:
    s = Sketch((4,))
    x = s.draft.inputs[0]
    a = s.op("mul", x, number(2))
    b = s.op("mul", x, number(2))
    c = s.op("mul", x, number(3))
    check(s.returns(s.op("add", s.op("add", a, b), c)), share, "mul", "mul", "add", "add")


def test_attributes_tell_calls_apart() -> None:
    s = Sketch((4,))
    x = s.draft.inputs[0]
    check(s.returns(s.op("gelu", x, approximate="none"), s.op("gelu", x, approximate="tanh")), share, "gelu", "gelu")


def test_dead_calls_go() -> None:
    s = Sketch((4,))
    s.op("exp", s.draft.inputs[0])
    y = s.op("sin", s.draft.inputs[0])
    check(s.returns(y), remove_dead, "sin")


def test_linear_from_its_parts() -> None:
    s = Sketch((5, 4))
    weight, bias = (constant(np.random.default_rng(1).standard_normal(n).astype(np.float32)) for n in ((3, 4), (3,)))
    y = s.op("matmul", s.draft.inputs[0], s.op("permute", weight, dims=[1, 0]))
    draft = check(s.returns(s.op("add", y, bias)), fuse_linear, "linear")
    assert draft.calls[0].inputs[1] is weight


def test_linear_of_a_weight_that_is_not_transposed() -> None:
    s = Sketch((5, 4))
    weight = constant(np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32))
    y = s.op("matmul", s.draft.inputs[0], weight)
    draft = check(s.returns(s.op("add", y, constant(np.ones(3, np.float32)))), fuse_linear, "linear")
    assert draft.calls[0].inputs[1].shape == (3, 4)  # type: ignore[union-attr]


def test_linear_from_a_batched_product() -> None:
    """exir gives a linear of an input that is not contiguous so: bmm of an expanded weight, a view, an addition."""
    s = Sketch((2, 5, 4))
    weight, bias = (constant(np.random.default_rng(1).standard_normal(n).astype(np.float32)) for n in ((3, 4), (3,)))
    w = s.op("expand", s.op("permute", weight, dims=[1, 0]), shape=[2, 4, 3])
    y = s.op("reshape", s.op("matmul", s.draft.inputs[0], w), shape=[1, 2, 5, 3])
    check(s.returns(s.op("add", y, bias)), fuse_linear, "linear", "reshape")


def test_a_product_that_others_read_keeps_its_value() -> None:
    s = Sketch((5, 4))
    weight, bias = constant(np.ones((3, 4), np.float32)), constant(np.ones(3, np.float32))
    y = s.op("linear", s.draft.inputs[0], weight, None)
    check(s.returns(s.op("add", y, bias), s.op("exp", y)), fuse_linear, "linear", "add", "exp")


@pytest.mark.parametrize("shape", [(5, 1), (1,), (5, 3)])
def test_what_is_no_bias_is_added(shape: tuple[int, ...]) -> None:
    s = Sketch((5, 4))
    y = s.op("linear", s.draft.inputs[0], constant(np.ones((3, 4), np.float32)), None)
    check(s.returns(s.op("add", y, constant(np.ones(shape, np.float32)))), fuse_linear, "linear", "add")


def test_products_read_transposed_operands() -> None:
    s = Sketch((2, 3, 4), (2, 5, 4))
    a, b = s.draft.inputs
    y = s.op("matmul", a, s.op("permute", b, dims=[0, 2, 1]))
    draft = check(s.returns(y), fuse_linear, "matmul")
    assert (draft.calls[0].attributes.transpose_a, draft.calls[0].attributes.transpose_b) == (False, True)
    s = Sketch((2, 4, 3), (2, 5, 4))
    a, b = s.draft.inputs
    transposed = s.op("permute", a, dims=[0, 2, 1])
    draft = check(s.returns(s.op("matmul", transposed, b, transpose_b=True)), fuse_linear, "matmul")
    assert (draft.calls[0].attributes.transpose_a, draft.calls[0].attributes.transpose_b) == (True, True)


def test_transpositions_cancel_out() -> None:
    s = Sketch((2, 3, 4), (2, 4, 5))
    a, b = s.draft.inputs
    draft = check(
        s.returns(s.op("matmul", a, s.op("permute", b, dims=[0, 2, 1]), transpose_b=True)), fuse_linear, "matmul"
    )
    assert not draft.calls[0].attributes.transpose_b


def test_keys_of_attention_move_in_whole_rows() -> None:
    """[B, S, H, D] to [B·H, D, S]: the rows of D elements stay together, the product does the rest."""
    s = Sketch((12, 5, 8), (2, 7, 6, 8))
    q, k = s.draft.inputs
    keys = s.op("reshape", s.op("permute", k, dims=[0, 2, 3, 1]), shape=[12, 8, 7])
    draft = check(s.returns(s.op("matmul", q, keys)), fuse_linear, "permute", "reshape", "matmul")
    assert draft.calls[0].attributes.dims == [0, 2, 1, 3]
    assert draft.calls[2].attributes.transpose_b


def test_rank_of_a_product_is_kept() -> None:
    """Both operands are one matrix under an expand: the batch of one stays."""
    s = Sketch((3, 4), (5, 4))
    a = s.op("expand", s.draft.inputs[0], shape=[1, 3, 4])
    b = s.op("permute", s.op("expand", s.draft.inputs[1], shape=[1, 5, 4]), dims=[0, 2, 1])
    after = remove_dead(fuse_linear(s.returns(s.op("matmul", a, b))))
    assert after.outputs[0].shape == (1, 3, 5)


def test_passes_end() -> None:
    """A second run of all passes finds nothing to do."""
    s = Sketch((2, 3, 4))
    weight = constant(np.ones((5, 4), np.float32))
    y = s.op("matmul", s.op("reshape", s.draft.inputs[0], shape=[6, 4]), s.op("permute", weight, dims=[1, 0]))
    y = s.op("add", s.op("reshape", y, shape=[2, 3, 5]), s.op("expand", number(1), shape=[2, 3, 5]))
    once = optimize(s.returns(y))
    assert [c.op for c in optimize(once).calls] == [c.op for c in once.calls]


def test_float16_keeps_the_interface() -> None:
    s = Sketch((4,))
    y = s.op("where", s.op("gt", s.draft.inputs[0], number(0)), number(-3.4e38), number(-np.inf))
    z = s.op("clamp", s.op("add", y, s.draft.inputs[0]), min=-1e30, max=None)
    s.returns(z, s.op("full", shape=[2], value=1e6, dtype="float32"), s.op("cast", s.draft.inputs[0], dtype="int32"))
    draft = to_float16(s.draft, keep_interface=True)
    assert [v.dtype for v in draft.inputs] == [F32]
    assert [v.dtype for v in draft.outputs] == [F32, F32, DType.INT32]
    where = next(call for call in draft.calls if call.op == "where")
    assert [v.array.tolist() for v in where.inputs[1:]] == [-65504.0, -np.inf]  # type: ignore[union-attr]
    assert next(c for c in draft.calls if c.op == "clamp").attributes.min == -65504.0
    assert next(c for c in draft.calls if c.op == "full").attributes.value == 65504.0
    inside = {v.dtype for call in draft.calls if call.op != "cast" for v in call.outputs}
    assert inside == {DType.FLOAT16, DType.BOOL}


def test_emit_says_what_an_operator_says() -> None:
    s = Sketch((3,), (4,))
    with pytest.raises(Refused, match="broadcast"):
        s.op("add", *s.draft.inputs)
    with pytest.raises(Refused, match="not part of this torchvk"):
        s.op("no_such_operator", s.draft.inputs[0])
    with pytest.raises(Refused, match="no such attributes"):
        s.op("permute", s.draft.inputs[0], dims="backwards")


def test_weights_of_quantized_linears_are_constants() -> None:
    s = Sketch((3, 4))
    weight, scale = (Value(TensorType(t, n)) for t, n in ((DType.INT8, (2, 4)), (F32, (2, 1))))
    with pytest.raises(Refused, match="must be a constant"):
        s.op("quantized_linear", s.draft.inputs[0], weight, scale, None, group_size=4)


@pytest.mark.parametrize("a", [torch.float32, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize("b", [torch.float32, torch.float16, torch.int64, torch.int8, torch.bool])
@pytest.mark.parametrize("ranks", [(1, 1), (1, 0), (0, 1), (0, 0)])
def test_type_promotion(a: torch.dtype, b: torch.dtype, ranks: tuple[int, int]) -> None:
    from torchvk.lowering.types import DTYPES, TORCH_DTYPES

    x, y = torch.ones((2,) * ranks[0], dtype=a), torch.ones((2,) * ranks[1], dtype=b)
    types = [TensorType(DTYPES[t.dtype], tuple(t.shape)) for t in (x, y)]
    assert TORCH_DTYPES[promote(*types)] == torch.result_type(x, y)
    assert TORCH_DTYPES[promote(types[0], 2.5)] == torch.result_type(x, 2.5)
    assert TORCH_DTYPES[promote(types[0], 2)] == torch.result_type(x, 2)
