"""``torchvk.compare`` on small graphs made by hand, and once on a model that was damaged on purpose."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edge import lower_module
from pte_files import Plan, call, delegate_call, delegate_file, tensor, write
from torch import nn

import torchvk
from torchvk import ops
from torchvk.cli import main
from torchvk.errors import ArgumentError, ArgumentTypeError
from torchvk.graph import DType, Graph, TensorType, to_bytes
from torchvk.graph.build import GraphBuilder
from torchvk.program.compare import Comparison
from torchvk.program.describe import BACKEND
from torchvk.program.layers import observe
from torchvk.runtime.reference import run as run_reference

ROWS, COLUMNS = 3, 8
ON_BOTH = pytest.mark.parametrize("device", [None, "reference"])


def chain(weights: list[Any], epilogue: str = "none", act: bool = False, half: bool = False) -> Graph:
    """x → linear 0 → [relu] → linear 1 → …; ``epilogue`` of all but the last, or nodes ``act`` in its place."""
    builder = GraphBuilder()
    dtype = DType.FLOAT16 if half else DType.FLOAT32
    type = TensorType(dtype, (ROWS, COLUMNS))
    x = builder.input("x", type)
    for number, weight in enumerate(weights):
        last = number == len(weights) - 1
        constant = builder.constant(f"w{number}", weight.astype(dtype.numpy))
        attributes = {"epilogue": "none" if last else epilogue}
        (x,) = builder.node("linear", [x, constant], [type], attributes, f"y{number}", f"layers.{number}")
        if act and not last:
            (x,) = builder.node("relu", [x], [type], None, f"a{number}", f"acts.{number}")
    return builder.build([x])


def weights_of(rng: np.random.Generator, count: int = 3) -> list[Any]:
    return [rng.standard_normal((COLUMNS, COLUMNS)).astype(np.float32) for _ in range(count)]


def decibels(reference: Any, given: Any) -> float:
    signal, noise = np.square(reference.astype(np.float64)), np.square(reference.astype(np.float64) - given)
    return float(10 * np.log10(signal.sum() / noise.sum()))


def compared(a: Graph, b: Graph, inputs: Any, **options: Any) -> Comparison:
    return torchvk.compare(delegate_file(a), delegate_file(b), inputs, options.pop("device", "reference"), **options)


@ON_BOTH
def test_numbers(rng: np.random.Generator, device: str | None) -> None:
    """Every layer's SQNR and largest error, from NumPy; several calls add up."""
    weights = weights_of(rng)
    damaged = [weights[0], weights[1] + np.float32(0.1), weights[2]]
    calls = [[rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)] for _ in range(2)]
    result = compared(chain(weights), chain(damaged), calls, device=device)
    x = y = np.concatenate([call[0] for call in calls]).astype(np.float64)
    wanted = {}
    for number in range(3):
        x, y = x @ weights[number].T, y @ damaged[number].T
        wanted[f"layers.{number}"] = (x, y)
    rows = {row.path: row for row in result.layers}
    assert rows.keys() == wanted.keys()
    assert rows["layers.0"].sqnr == math.inf
    for path in ("layers.1", "layers.2"):
        assert rows[path].sqnr == pytest.approx(decibels(*wanted[path]), abs=1e-3)
        assert rows[path].largest_error == pytest.approx(np.abs(wanted[path][0] - wanted[path][1]).max(), rel=1e-4)
        assert rows[path].largest_value == pytest.approx(np.abs(wanted[path][0]).max(), rel=1e-4)
    assert rows["layers.1"].inputs_sqnr == math.inf
    assert rows["layers.2"].inputs_sqnr == rows["layers.1"].sqnr
    assert [row.sqnr for row in result.layers] == sorted(row.sqnr for row in result.layers)
    assert result.order == ("layers.0", "layers.1", "layers.2")
    assert result.outputs[0].sqnr == rows["layers.2"].sqnr
    assert (result.calls, result.only_reference, result.only_quantized) == (2, (), ())


@ON_BOTH
@pytest.mark.parametrize("epilogue", ["relu", "gelu", "gelu_tanh", "silu", "relu6", "hardswish"])
def test_fused_activations_are_taken_out(rng: np.random.Generator, device: str | None, epilogue: str) -> None:
    """A layer is compared before the activation that it is fused with, and the program's result stays the same."""
    weights = weights_of(rng, 2)
    x = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    graph = chain(weights, epilogue)
    observed = observe(graph, alternatives=True)
    from torchvk.runtime import Session

    with Session(graph, device) as plain, Session(observed.graph, device) as whole:
        outputs = whole.run([x])
        np.testing.assert_allclose(outputs[0], plain.run([x])[0], rtol=0, atol=2e-5)
    first = observed.values(outputs)[observed.layers[0].values[0]]
    np.testing.assert_allclose(first, x @ weights[0].T, rtol=0, atol=2e-5)


def test_activation_fused_in_one_of_two(rng: np.random.Generator) -> None:
    weights = weights_of(rng)
    x = [rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)]
    for a, b in (
        (chain(weights, "relu"), chain(weights, act=True)),
        (chain(weights, act=True), chain(weights, "relu")),
    ):
        result = compared(a, b, x)
        assert [row.sqnr for row in result.layers] == [math.inf] * 3
        assert {*result.only_reference, *result.only_quantized} == {"acts.0", "acts.1"}


@pytest.mark.parametrize("epilogue", ["none", "sum_relu"])
def test_residuals_are_taken_out(epilogue: str, rng: np.random.Generator) -> None:
    """x + small(x): the noise of a damaged branch does not hide behind the signal beside it."""

    def block(weight: Any) -> Graph:
        builder, type = GraphBuilder(), TensorType(DType.FLOAT32, (ROWS, COLUMNS))
        x = builder.input("x", type)
        constant = builder.constant("w", weight)
        (y,) = builder.node("linear", [x, constant, None, x], [type], {"epilogue": epilogue}, "y", "branch")
        return builder.build([y])

    weight = rng.standard_normal((COLUMNS, COLUMNS)).astype(np.float32) / 100
    x = 10 * rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    result = compared(block(weight), block(-weight), [x])
    assert result.layers[0].sqnr == pytest.approx(10 * math.log10(1 / 4), abs=1e-3)
    assert result.outputs[0].sqnr > 20


def test_8_bit_residuals_are_taken_out(rng: np.random.Generator) -> None:
    builder = GraphBuilder()
    shape = (ROWS, COLUMNS)
    x, residual = (builder.input(name, TensorType(DType.INT8, shape)) for name in ("x", "residual"))
    weight = rng.integers(-128, 127, (COLUMNS, COLUMNS)).astype(np.int8)
    operands = [x, builder.constant("w", weight), builder.constant("scale", np.ones((COLUMNS, 1), np.float32))]
    zeros = builder.constant("zeros", np.full((COLUMNS, 1), 3, np.int8))
    own = {"output_dtype": "int8", "output_scale": 30.0, "output_zero_point": 5}
    attributes = {"group_size": COLUMNS, "activation": "static", "input_scale": 0.01, **own}
    added = {"residual_scale": 20.0, "sum_dtype": "uint8", "sum_scale": 40.0, "sum_zero_point": 128, "sum_min": 0}
    both = {**attributes, **added, "sum_max": 255}
    result = [TensorType(DType.UINT8, shape)]
    (y,) = builder.node("quantized_linear", [*operands, None, residual, zeros], result, both, "y", "branch")
    graph = builder.build([y])
    observed = observe(graph, alternatives=True)
    arrays = [rng.integers(-128, 127, shape).astype(np.int8) for _ in range(2)]
    outputs = run_reference(observed.graph, arrays)[0]
    np.testing.assert_array_equal(outputs[0], run_reference(graph, arrays)[0][0])
    values = [observed.values(outputs)[index] for index in observed.layers[0].values]
    alone = ops.get("quantized_linear").decode(replace(graph.nodes[0], attributes=attributes))
    inputs = [arrays[0], weight, np.ones((COLUMNS, 1), np.float32), None, None, np.full((COLUMNS, 1), 3, np.int8)]
    (q,) = ops.get("quantized_linear").reference(alone, inputs)
    np.testing.assert_array_equal(values[0], (q.astype(np.float32) - 5) * 30)
    np.testing.assert_array_equal(values[1], (outputs[0].astype(np.float32) - 128) * 40)


def test_8_bit_values_are_dequantized(rng: np.random.Generator) -> None:
    """An integer input is what it stands for; a permute passes scale and zero point on."""
    q = rng.integers(-128, 128, (2, 4, 6)).astype(np.int8)
    builder = GraphBuilder()
    x = builder.input("x", TensorType(DType.INT8, q.shape))
    (moved,) = builder.node("permute", [x], [TensorType(DType.INT8, (6, 2, 4))], {"dims": [2, 0, 1]}, "m", "moved")
    graph = builder.build([moved])
    # No operator that takes such values by attribute is needed here: the nodes around are asked for the names alone.
    from torchvk.program import layers

    known = replace(graph.nodes[0], attributes={"input_scale": 0.25, "input_zero_point": 3})
    affine = layers._quantization(replace(graph, nodes=(known, *graph.nodes)))
    np.testing.assert_array_equal(affine[moved].dequantize(q), (q.astype(np.float32) - 3) * np.float32(0.25))
    blocks = layers.Affine(np.array([[[0.5], [2.0]]], np.float32), np.array([[[1], [0]]], np.int8))
    wanted = np.concatenate([(q[:, :2] - np.float32(1)) * 0.5, q[:, 2:].astype(np.float32) * 2], 1)
    np.testing.assert_array_equal(blocks.dequantize(q), wanted)


def test_images_may_lie_differently(rng: np.random.Generator) -> None:
    """Channels second in one file and last in the other."""

    def image(last: bool) -> Graph:
        builder = GraphBuilder()
        type = TensorType(DType.FLOAT32, (2, 3, 4, 4))
        x = builder.input("x", type)
        (y,) = builder.node("exp", [x], [type], None, "y", "conv")
        if last:
            moved = TensorType(DType.FLOAT32, (2, 4, 4, 3))
            (y,) = builder.node("permute", [y], [moved], {"dims": [0, 2, 3, 1]}, "p", "conv")
        (y,) = builder.node("reshape", [y], [TensorType(DType.FLOAT32, (96,))], {"shape": [96]}, "r", "flat")
        return builder.build([y])

    x = rng.standard_normal((2, 3, 4, 4)).astype(np.float32)
    rows = {row.path: row.sqnr for row in compared(image(False), image(True), [x]).layers}
    assert rows["conv"] == math.inf


def test_operators_on_the_cpu_between_delegates(rng: np.random.Generator) -> None:
    weights = weights_of(rng, 1)
    type = (ROWS, COLUMNS)
    size = ROWS * COLUMNS * 4

    def file(damage: float) -> bytes:
        blobs = [(BACKEND, to_bytes(chain([weights[0] + np.float32(d)]))) for d in (0.0, damage)]
        blobs[1] = (BACKEND, to_bytes(_renamed(chain([weights[0] + np.float32(damage)]), "second")))
        values = [*(tensor(type, place=place * size) for place in range(4))]
        plan = Plan(
            values,
            [0],
            [3],
            [delegate_call(0, 0, 1), call(0, 1, 2, 2), delegate_call(1, 2, 3)],
            operators=[("aten::neg", "out")],
            delegates=blobs,
        )
        return write(plan)

    x = rng.standard_normal(type).astype(np.float32)
    result = torchvk.compare(file(0.0), file(0.5), [x], "reference")
    assert [row.path for row in result.layers] == ["second", "layers.0"]
    assert result.layers[1].sqnr == math.inf


def _renamed(graph: Graph, source: str) -> Graph:
    return replace(graph, nodes=tuple(replace(node, source=source) for node in graph.nodes))


def test_not_finite(rng: np.random.Generator) -> None:
    """Equal infinities differ by nothing; an infinity in one alone is infinitely wrong; JSON stays JSON."""
    weights = weights_of(rng, 2)
    x = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    x[0, 0] = np.inf
    with np.errstate(all="ignore"):
        same = compared(chain(weights), chain(weights), [x])
    assert [row.sqnr for row in same.layers] == [math.inf] * 2
    x[0, 0] = 6e4
    half = compared(chain(weights), _as_half(weights), [x])
    assert half.layers[0].sqnr == -math.inf
    assert half.layers[0].largest_error == math.inf
    assert json.loads(json.dumps(half.plain(), allow_nan=False))["layers"][0]["sqnr"] is None


def _as_half(weights: list[Any]) -> Graph:
    builder = GraphBuilder()
    full, half = (TensorType(dtype, (ROWS, COLUMNS)) for dtype in (DType.FLOAT32, DType.FLOAT16))
    x = builder.input("x", full)
    (x,) = builder.node("cast", [x], [half], {"dtype": "float16"})
    for number, weight in enumerate(weights):
        constant = builder.constant("w", (weight * 100).astype(np.float16))
        (x,) = builder.node("linear", [x, constant], [half], None, "y", f"layers.{number}")
    (x,) = builder.node("cast", [x], [full], {"dtype": "float32"})
    return builder.build([x])


def test_errors(rng: np.random.Generator) -> None:
    weights = weights_of(rng, 2)
    x = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    graph = chain(weights)
    with pytest.raises(ArgumentError, match="do not take the same inputs"):
        compared(graph, chain(weights, half=True), [x])
    with pytest.raises(ArgumentError, match=r"no layer in common: 'layers.0', 'layers.1' here, 'other' there"):
        compared(graph, _renamed(graph, "other"), [x])
    with pytest.raises(ArgumentError, match="takes 1 input"):
        compared(graph, graph, [])
    with pytest.raises(ArgumentTypeError, match="convert it first"):
        compared(graph, graph, [x.astype(np.float64)])
    with pytest.raises(ArgumentTypeError, match="must be a list"):
        compared(graph, graph, x)
    with pytest.raises(ArgumentError, match="no method 'backward'"):
        compared(graph, graph, [x], method="backward")


# A model damaged on purpose, and how it is shown


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.up(x)))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files of an MLP: float32, and int4 with dynamic int8, in which one layer gives half of what it should."""
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_api import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.utils import unwrap_tensor_subclass

    folder = tmp_path_factory.mktemp("compare")
    model = nn.Sequential(*(Block(32) for _ in range(2)), nn.Linear(32, 4)).eval()
    x = torch.randn(16, 32)
    np.save(folder / "x.npy", x.numpy())
    np.savez(folder / "x.npz", x.numpy())
    (folder / "float.pte").write_bytes(lower_module(model, (x,)).edge.to_executorch().buffer)
    with torch.no_grad():
        model[1].down.weight *= 0.5
    quantize_(model, Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32)))
    unwrap_tensor_subclass(model)
    (folder / "quantized.pte").write_bytes(lower_module(model, (x,)).edge.to_executorch().buffer)
    return [str(folder / name) for name in ("float.pte", "quantized.pte", "x.npy", "x.npz")]


def test_the_damaged_layer_is_the_worst(damaged: list[str]) -> None:
    reference, quantized, x, _ = damaged
    result = torchvk.compare(reference, quantized, [torch.from_numpy(np.load(x))])
    assert result.layers[0].path == "1.down"
    assert 4 < result.layers[0].sqnr < 8  # half: 6 dB
    rows = {row.path: row for row in result.layers}
    assert {"0.up", "0.down", "1.up", "2"} <= rows.keys()
    assert rows["0.up"].sqnr > 15
    assert (rows["1.down"].operator, rows["1.down"].shape) == ("quantized_linear", (16, 32))
    assert rows["1.down"].inputs_sqnr - rows["1.down"].sqnr > 5


class Page(HTMLParser):
    """The tags and texts of a page; every tag that is opened must be closed."""

    VOID = ("meta", "input", "line", "rect", "wbr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_command(damaged: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference, quantized, x, together = damaged

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["compare", reference, quantized, *arguments, "--device", "reference"])
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    page = tmp_path / "page.html"
    code, out, _ = run("--inputs", x, "--html", str(page))
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split()[:3] == ["layer", "operator", "SQNR/dB"]
    assert lines[1].split()[:2] == ["1.down", "quantized_linear"]
    facts = json.loads(run("--inputs", together, "--inputs", together, "--json")[1])
    assert facts["calls"] == 2
    assert facts["layers"][0]["path"] == "1.down"
    assert len(facts["outputs"]) == 1
    assert "both" in run("--inputs", x, "--inputs", together)[2]
    assert "cannot be read as .npz" in run("--inputs", str(tmp_path / "missing.npz"))[2]
    text = page.read_text(encoding="utf-8")
    parsed = Page(text)
    assert parsed.tags.count("figure") == 2
    assert "1.down" in parsed.text
    assert not re.search(r"(?:src|href)=|url\(|@import|https?:", text), "something from elsewhere"


def test_names_are_escaped(rng: np.random.Generator, tmp_path: Path) -> None:
    weights = weights_of(rng, 1)
    graph = _renamed(chain(weights), "<script>alert('&')</script>" + "long" * 30)
    path = tmp_path / "page.html"
    compared(graph, graph, [rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)]).write_html(path)
    assert "script" not in Page(path.read_text(encoding="utf-8")).tags
