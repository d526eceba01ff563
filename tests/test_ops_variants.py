"""Variants of operators: shape classes, the choice by name, and what a session runs of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from harness import one_node_graph, run_op, variant_names
from variants import GPU

from torchvk import ops
from torchvk.graph import DType, TensorType
from torchvk.ops import operator
from torchvk.runtime.plan import make_plan


@dataclass(frozen=True)
class Attributes:
    group_size: int
    eps: float = 1e-6
    input_zero_point: int = 0
    output_max: int = 127


def kinds(x: tuple[int, ...], weight: tuple[int, int] = (512, 256)) -> list[TensorType | None]:
    return [TensorType(DType.FLOAT32, x), TensorType(DType.INT4, weight), None]


def test_a_shape_class_says_operator_attributes_and_types() -> None:
    assert (
        ops.shape_class("quantized_linear", Attributes(32), kinds((8, 256)))
        == "quantized_linear group_size=32 float32[8,256] int4[512,256] none"
    )


def test_scales_zero_points_and_bounds_make_no_class_of_their_own() -> None:
    assert ops.shape_class("op", Attributes(32, 1e-5), kinds((8, 256))) == ops.shape_class(
        "op", Attributes(32, 0.5, 7, 99), kinds((8, 256))
    )
    assert ops.shape_class("op", Attributes(32), kinds((8, 256))) != ops.shape_class(
        "op", Attributes(64), kinds((8, 256))
    )


@pytest.mark.parametrize(
    ("rows", "size"), [(0, 0), (1, 1), (15, 15), (16, 16), (17, 20), (33, 40), (512, 512), (513, 640), (8191, 8192)]
)
def test_rows_count_in_classes(rows: int, size: int) -> None:
    text = ops.shape_class("op", Attributes(32), kinds((rows, 256)))
    assert f"float32[{size},256]" in text
    assert "int4[512,256]" in text, "weights count exactly"


def test_leading_dimensions_are_rows_in_every_input_that_shares_them() -> None:
    residual = TensorType(DType.FLOAT32, (3, 7, 512))
    inputs = [*kinds((3, 7, 256)), residual]
    assert ops.shape_class("op", Attributes(1), inputs).endswith("float32[24,256] int4[512,256] none float32[24,512]")


def test_inputs_may_be_absent_or_have_no_dimensions() -> None:
    assert ops.shape_class("op", Attributes(1), []) == "op group_size=1"
    scalar = TensorType(DType.FLOAT32, ())
    assert ops.shape_class("op", Attributes(1), [None, scalar]) == "op group_size=1 none float32[1]"


@pytest.fixture
def negated() -> Iterator[None]:
    """``neg`` with a second way that gives the absolute value, so that a test sees which one ran."""
    known, other = operator.get("neg"), operator.get("abs")

    def variants(attributes: Any, inputs: Any, outputs: Sequence[TensorType], capabilities: Any) -> ops.Variants:
        if inputs[0].shape == (3,):
            return ()
        return (
            ("plain", known.kernels(attributes, inputs, outputs, capabilities)),
            ("other", other.kernels(attributes, inputs, outputs, capabilities)),
        )

    operator._registry["neg"] = replace(known, variants=variants)
    yield
    operator._registry["neg"] = known


@pytest.mark.usefixtures("negated")
def test_the_plan_takes_the_variant_that_was_tuned() -> None:
    graph, _ = one_node_graph("neg", None, [np.ones(8, np.float32)])
    key = ops.shape_class("neg", ops.NoAttributes(), [TensorType(DType.FLOAT32, (8,))])

    def kernel(tuned: dict[str, str]) -> Any:
        (step,) = make_plan(graph, GPU, tuned=tuned).steps
        return step.dispatch

    default, other = kernel({}), kernel({key: "other"})
    assert other != default
    assert kernel({key: "plain"}) == default
    assert kernel({key: "no longer offered"}) == default
    assert kernel({"another class": "other"}) == default


@pytest.mark.usefixtures("negated")
def test_a_case_without_variants_takes_the_default() -> None:
    graph, _ = one_node_graph("neg", None, [np.ones(3, np.float32)])
    key = ops.shape_class("neg", ops.NoAttributes(), [TensorType(DType.FLOAT32, (3,))])
    assert make_plan(graph, GPU, tuned={key: "other"}) == make_plan(graph, GPU)


@pytest.mark.tier
@pytest.mark.usefixtures("negated")
def test_a_session_runs_the_variant(rng: np.random.Generator) -> None:
    x = rng.standard_normal(8, np.float32)
    assert variant_names("neg", None, [x]) == ["plain", "other"]
    np.testing.assert_array_equal(run_op("neg", None, [x])[0], -x)
    np.testing.assert_array_equal(run_op("neg", None, [x], variant="other")[0], abs(x))
