"""Where a quantized program loses accuracy: its layers beside those of the program in floating point."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from torchvk.errors import ArgumentError, ArgumentTypeError
from torchvk.graph import Graph
from torchvk.program import operators
from torchvk.program.arguments import check_inputs, parameters
from torchvk.program.describe import Graphs, value_names
from torchvk.program.interpreter import Interpreter
from torchvk.program.layers import Layer, Observed, observe
from torchvk.program.program import called_operators, check_plan
from torchvk.program.pte import Plan, decode
from torchvk.program.source import ProgramSource, located, open_source
from torchvk.program.tensors import Array, as_array

COLUMNS = ("layer", "operator", "SQNR/dB", "of its inputs", "largest error", "largest value")
CLEARLY = 10.0  # dB


@dataclass(frozen=True, slots=True)
class LayerComparison:
    """One layer (or output). ``sqnr``: 10 · log10(Σ reference² / Σ (reference − quantized)²) over all its elements,
    in dB: infinite where nothing differs. ``inputs_sqnr``: the smallest of the layers that it reads; infinite where it
    reads what is exact. ``largest_error`` is the largest |reference − quantized|, ``largest_value`` the largest
    |reference|; ``shape`` that of the quantized program."""

    path: str
    operator: str
    shape: tuple[int, ...]
    sqnr: float
    inputs_sqnr: float
    largest_error: float
    largest_value: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """What :func:`compare` gives. ``layers``: the worst first; ``order``: their paths as the program runs them;
    ``only_reference`` and ``only_quantized``: paths that one of the two lacks, fused into others or foldable."""

    reference: str
    quantized: str
    device: str
    calls: int
    layers: tuple[LayerComparison, ...]
    outputs: tuple[LayerComparison, ...]
    order: tuple[str, ...] = field(repr=False)
    only_reference: tuple[str, ...] = field(repr=False)
    only_quantized: tuple[str, ...] = field(repr=False)

    def __str__(self) -> str:
        from torchvk.program.profile import plain_table

        return f"{plain_table(COLUMNS, map(cells_of, (*self.layers, *self.outputs)), left=2)}\n{self.summary()}"

    def summary(self) -> str:
        count = len(self.only_reference) + len(self.only_quantized)
        alone = f"; {count} more are in one file only" if count else ""
        return (
            f"{self.quantized} beside {self.reference} on {self.device}: {len(self.layers)} layers{alone}; "
            "SQNR: signal-to-quantization-noise ratio, the worst first"
        )

    def plain(self) -> dict[str, Any]:
        """As plain data, for JSON: None where a number is not finite (an infinite SQNR means no difference)."""
        named = {name: getattr(self, name) for name in Comparison.__slots__}
        for name in ("layers", "outputs"):
            named[name] = [
                {key: _finite(getattr(layer, key)) for key in LayerComparison.__slots__} for layer in named[name]
            ]
        return named

    def write_html(self, path: str | os.PathLike[str]) -> None:
        """Write one page that needs nothing else: a bar chart and a table."""
        from torchvk.program.page import page

        Path(path).write_text(page(self), encoding="utf-8")


def compare(
    reference: ProgramSource,
    quantized: ProgramSource,
    inputs: Sequence[Any],
    device: str | int | None = None,
    *,
    method: str = "forward",
    matmul_precision: str | None = None,
) -> Comparison:
    """Run two programs of one model on the same inputs, and compare what their layers give.

    reference, quantized: .pte files (as :func:`torchvk.load` takes them) of the same model: in floating point, and
    quantized in any way. inputs: the inputs of one call, flat and in order, as :class:`Method` takes them; or a list
    of such lists, for several calls. device, matmul_precision: as :func:`torchvk.load` takes them.

    Layers are known by the paths of their modules, which the files keep, and are compared by the value of the last
    node of each path. Where one program fuses an activation into a layer and the other does not, they are compared
    where they agree best, before or after it. 8-bit values are dequantized first.

    Raises ArgumentError if the two do not take the same inputs or have no layer in common, and whatever loading and
    calling them raises.
    """
    with (
        _opened(reference, device, method, matmul_precision, True) as ours,
        _opened(quantized, device, method, matmul_precision, False) as theirs,
    ):
        if [str(entry) for entry in ours.parameters] != [str(entry) for entry in theirs.parameters]:
            raise ArgumentError(
                f"{ours.name} and {theirs.name} do not take the same inputs: "
                f"({', '.join(map(str, ours.parameters))}) and ({', '.join(map(str, theirs.parameters))})"
            )
        layers = theirs.layers()
        known = ours.layers()
        common = [path for path in layers if path in known]
        if not common:
            raise ArgumentError(
                f"{ours.name} and {theirs.name} have no layer in common: {_some(known)} here, {_some(layers)} there"
            )
        calls = _calls(inputs)
        sums = {path: _Sums() for path in common}
        results = _add_calls(ours, theirs, calls, sums)
        # What has another number of elements is not the same layer.
        sums = {path: entry for path, entry in sums.items() if entry.signal}
        rows = {path: _row(path, layers[path], sums) for path in sums}
        outputs = tuple(_result(position, entry) for position, entry in enumerate(results))
        return Comparison(
            ours.name,
            theirs.name,
            theirs.device,
            len(calls),
            tuple(sorted(rows.values(), key=lambda row: row.sqnr)),
            outputs,
            tuple(sums),
            tuple(path for path in known if path not in sums),
            tuple(path for path in layers if path not in sums),
        )


def _add_calls(ours: _Opened, theirs: _Opened, calls: Sequence[Any], sums: dict[str, _Sums]) -> list[_Sums]:
    """Run both on all calls; ``sums`` are those of the layers, what is returned those of the outputs."""
    results: list[_Sums] = []
    for call in calls:
        left, right = ours.run(call), theirs.run(call)
        for path, entry in sums.items():
            entry.add(left.values[path], right.values[path][0])
        results = results or [_Sums() for _ in right.outputs]
        if len(left.outputs) != len(right.outputs):
            raise ArgumentError(f"{ours.name} gives {len(left.outputs)} outputs, {theirs.name} {len(right.outputs)}")
        for entry, a, b in zip(results, left.outputs, right.outputs, strict=True):
            entry.add([a], b)
    return results


def cells_of(row: LayerComparison) -> tuple[str, ...]:
    """A row as the texts of a table's cells."""
    return (
        row.path or "(the model itself)",
        row.operator,
        decibels(row.sqnr),
        decibels(row.inputs_sqnr),
        f"{row.largest_error:.3g}",
        f"{row.largest_value:.3g}",
    )


def decibels(sqnr: float) -> str:
    return "exact" if sqnr == math.inf else f"{sqnr:.1f}"


# Running and recording


@dataclass(frozen=True)
class _Run:
    """What one call gave: the method's outputs, and each layer's values, the last node's first."""

    outputs: list[Array]
    values: Mapping[str, list[Array]]


class _Recorder:
    """A delegate that keeps what its layers give. (The interpreter's Runner.)"""

    def __init__(self, graph: Graph, observed: Observed, session: Any) -> None:
        self.graph, self.observed, self.session = graph, observed, session
        self.values: list[Array] = []

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        outputs: list[Array] = self.session.run(inputs)
        self.values = self.observed.values(outputs)
        return outputs[: self.observed.own]


class _Opened:
    """One method of a file, with recorders for its delegates."""

    def __init__(self, name: str, plan: Plan, recorders: Sequence[_Recorder], device: str) -> None:
        self.name, self.device = name, device
        self._method = plan.name
        self._recorders = recorders
        graphs = {index: recorder.graph for index, recorder in enumerate(recorders)}
        self.parameters = parameters(plan, value_names(plan, graphs))
        self._interpreter = Interpreter(plan, recorders, operators.resolve(called_operators(plan)))

    def layers(self) -> dict[str, Layer]:
        """By path, in the order of the first delegate that has one."""
        return {layer.path: layer for recorder in self._recorders for layer in recorder.observed.layers}

    def run(self, inputs: Sequence[Any]) -> _Run:
        with located(self.name):
            checked, as_torch = check_inputs(self._method, self.parameters, inputs)
            outputs = [as_array(output) for output in self._interpreter.run(checked, as_torch)]
        values = {
            layer.path: [recorder.values[position] for position in layer.values]
            for recorder in self._recorders
            for layer in recorder.observed.layers
        }
        return _Run(outputs, values)


@contextmanager
def _opened(
    source: ProgramSource, device: str | int | None, method: str, matmul_precision: str | None, alternatives: bool
) -> Iterator[_Opened]:
    from torchvk.runtime import Session

    opened = open_source(source)
    with located(opened.name), ExitStack() as stack:
        file = decode(opened.view)
        plan = next((plan for plan in file.plans if plan.name == method), None)
        if plan is None:
            raise ArgumentError(f"no method {method!r}; there are {', '.join(plan.name for plan in file.plans)}")
        check_plan(plan)
        graph_of = Graphs()
        recorders = []
        for delegate in plan.delegates:
            graph = graph_of(delegate)
            observed = observe(graph, alternatives)
            session = stack.enter_context(Session(observed.graph, device, matmul_precision=matmul_precision))
            recorders.append(_Recorder(graph, observed, session))
        info = recorders[0].session.device if recorders else None
        entered = _Opened(opened.name, plan, recorders, "reference" if info is None else info.name)
        yield entered


def _calls(inputs: Sequence[Any]) -> list[Sequence[Any]]:
    if not isinstance(inputs, list | tuple):
        raise ArgumentTypeError(f"inputs must be a list of a call's inputs, not {type(inputs).__name__}")
    if inputs and all(isinstance(entry, list | tuple) for entry in inputs):
        return list(inputs)
    return [inputs]


# The numbers


@dataclass
class _Sums:
    """Sums of squares over calls, for each value that the reference has under the layer's name."""

    signal: list[float] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    value: list[float] = field(default_factory=list)
    shape: tuple[int, ...] = ()

    def add(self, candidates: Sequence[Array], given: Array) -> None:
        measured = [_measure(other, given) for candidate in candidates for other in _arranged(candidate, given.shape)]
        if not self.signal:
            count = len(measured)
            self.signal, self.noise = [0.0] * count, [0.0] * count
            self.error, self.value = [0.0] * count, [0.0] * count
        self.shape = given.shape
        for position, (signal, noise, error, value) in enumerate(measured):
            self.signal[position] += signal
            self.noise[position] += noise
            self.error[position] = max(self.error[position], error)
            self.value[position] = max(self.value[position], value)

    @property
    def best(self) -> int:
        """The first, which is the layer's own value, unless another fits so much better that it must be meant."""
        ratios = [_sqnr(signal, noise) for signal, noise in zip(self.signal, self.noise, strict=True)]
        best = max(range(len(ratios)), key=ratios.__getitem__)
        return best if ratios[best] > ratios[0] + CLEARLY else 0

    @property
    def sqnr(self) -> float:
        return _sqnr(self.signal[self.best], self.noise[self.best])


def _arranged(candidate: Array, shape: tuple[int, ...]) -> Iterator[Array]:
    """The candidate in that shape: as it lies, or with its channels last or second, as the two programs may lay images
    out differently. Nothing if it has another number of elements."""
    if candidate.size != math.prod(shape):
        return
    yield candidate.reshape(shape)
    if candidate.ndim > 2:
        yield np.moveaxis(candidate, 1, -1).reshape(shape)
        yield np.moveaxis(candidate, -1, 1).reshape(shape)


def _measure(reference: Array, given: Array) -> tuple[float, float, float, float]:
    """Σ reference², Σ (reference − given)², largest difference, largest value. Elements that are equal, infinities
    and NaN among them, differ by nothing."""
    a, b = reference.astype(np.float64).ravel(), given.astype(np.float64).ravel()
    finite = np.isfinite(a)
    with np.errstate(all="ignore"):
        difference = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    difference = np.where(np.isnan(difference), math.inf, difference)
    magnitude = np.abs(a[finite])
    signal = float(np.dot(magnitude, magnitude))
    noise = float(np.dot(difference, difference)) if np.isfinite(difference).all() else math.inf
    return signal, noise, float(difference.max(initial=0.0)), float(magnitude.max(initial=0.0))


def _sqnr(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and noise < math.inf else -math.inf


def _row(path: str, layer: Layer, sums: Mapping[str, _Sums]) -> LayerComparison:
    entry = sums[path]
    inputs = min((sums[read].sqnr for read in layer.reads if read in sums), default=math.inf)
    best = entry.best
    return LayerComparison(path, layer.operator, entry.shape, entry.sqnr, inputs, entry.error[best], entry.value[best])


def _result(position: int, entry: _Sums) -> LayerComparison:
    return LayerComparison(f"output {position}", "", entry.shape, entry.sqnr, math.inf, entry.error[0], entry.value[0])


def _some(layers: Mapping[str, Layer]) -> str:
    names = [repr(path) for path in layers][:3]
    return ", ".join(names) + (", …" if len(layers) > 3 else "") if names else "none"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
