"""Autotuning: cases, chains, the choice, its file, and what a session runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from sample_graphs import Builder
from variants import GPU

from torchvk import ops
from torchvk.graph import DType, Graph, TensorType
from torchvk.graph.build import GraphBuilder
from torchvk.runtime import Session, Tuning, bench
from torchvk.runtime.bench import Bench, chain_of
from torchvk.runtime.choices import LARGEST_FILE, Choice, choices_path, read_choices, write_choices
from torchvk.runtime.device import Device
from torchvk.runtime.hazards import hazards
from torchvk.runtime.pipeline import cache_path
from torchvk.runtime.tune import best, cases

SIZE = 4096


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHVK_CACHE_DIR", str(tmp_path))
    return tmp_path


def products(size: int = SIZE) -> Graph:
    """x * c twice (one class), a product of another class, and an operator without variants."""
    builder = Builder()
    x = builder.input("x", TensorType(DType.FLOAT32, (size,)))
    c = builder.constant("c", np.full(size, 2, np.float32))
    small = builder.input("small", TensorType(DType.FLOAT32, (3,)))
    twice = builder.op("mul", builder.op("mul", x, c), c)
    return builder.build([builder.op("neg", twice), builder.op("mul", small, small)])


def inputs(rng: np.random.Generator, size: int = SIZE) -> list[Any]:
    return [rng.standard_normal(size, np.float32), rng.standard_normal(3, np.float32)]


def run(tuning: Tuning | None, rng: np.random.Generator, **options: Any) -> float:
    """The factor between input and output: -4 by products, else something else."""
    x, small = inputs(rng)
    with Session(products(), tuning=tuning, **options) as session:
        got, _ = session.run([x, small])
    return float(np.median(got / x))


# Pure


@pytest.mark.usefixtures("mul_variants")
def test_cases_are_shape_classes_with_several_variants_the_most_expensive_first() -> None:
    first, second = cases(products(), GPU)
    assert (first.names, first.count, first.node) == (("slow", "fast"), 2, 0)
    assert second.count == 1
    assert first.key.startswith("mul ")
    assert len(cases(products(size=0), GPU)) == 1, "of empty tensors there is nothing to time"


def test_graphs_without_variants_have_no_cases() -> None:
    builder = Builder()
    x = builder.input("x", TensorType(DType.FLOAT32, (4,)))
    assert cases(builder.build([builder.op("neg", x)]), GPU) == []


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({"a": 1.0, "b": 2.0}, "a"),
        ({"a": 2.0, "b": 1.0}, "b"),
        ({"a": 1.02, "b": 1.0, "c": 1.01}, "a"),  # not worth leaving the default for
        ({"a": 1.04, "b": 1.0, "c": 1.01}, "b"),
        ({"a": None, "b": 1.0}, "b"),
        ({"a": 1.0, "b": None}, "a"),
        ({"a": None, "b": None}, "a"),
    ],
)
def test_the_fastest_variant_is_chosen_and_the_default_in_doubt(seconds: dict[str, Any], expected: str) -> None:
    assert best(seconds) == expected


@pytest.mark.usefixtures("mul_variants")
@pytest.mark.parametrize(("layers", "sets"), [(1, 1), (4, 1), (5, 3)])
def test_layers_of_a_chain_wait_for_each_other_and_rotate_constants(layers: int, sets: int) -> None:
    graph = products()
    (case, _) = cases(graph, GPU)
    chain = chain_of(graph, case, case.variants[1][1], GPU, layers, sets, {})
    assert [len(stage) for stage in chain.plan.stages] == [1] * layers
    assert len(chain.plan.constants) == 1 + sets  # x, and the copies of c
    assert set(chain.sources) == set(chain.plan.constants)
    assert {len(source.read()) for source in chain.sources.values()} == {4 * SIZE}
    assert hazards(chain.plan) == []


def test_rows_that_fill_no_tile_are_timed_with_a_residual() -> None:
    """What else a layer reads is a constant of the chain, and bound in parts where the kernels see rows of it."""
    builder = GraphBuilder()
    rows = TensorType(DType.FLOAT32, (513, 4096))
    x, residual = builder.input("x", rows), builder.input("residual", rows)
    w = builder.constant("w", np.zeros((4096, 4096), np.float32))
    (y,) = builder.node("linear", [x, w, None, residual], [rows], ops.get("linear").attributes(), name="y")
    graph = builder.build([y])
    (case,) = cases(graph, GPU)
    chains = [chain_of(graph, case, kernels, GPU, 3, 2, {}) for _, kernels in case.variants]
    parts = [[s for s in chain.plan.storages if s.kind == "constant" and s.whole is not None] for chain in chains]
    assert any(parts)
    assert all(hazards(chain.plan) == [] for chain in chains)


@pytest.mark.usefixtures("mul_variants")
def test_variants_of_one_layout_share_their_constants() -> None:
    graph = products()
    (case, _) = cases(graph, GPU)
    packed: dict[Any, Any] = {}
    slow, fast = (chain_of(graph, case, kernels, GPU, 4, 2, packed) for _, kernels in case.variants)
    assert set(slow.sources) == set(fast.sources)
    for constant, source in slow.sources.items():
        assert source.read() is fast.sources[constant].read()


# The file


def test_choices_are_kept_and_merged(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tuning.json"
    assert read_choices(path) == {}
    one, two = Choice("a", {"a": 1e-6, "b": None}), Choice("b", {"b": 2e-6})
    write_choices(path, {"case 1": one})
    write_choices(path, {"case 2": two})
    assert read_choices(path) == {"case 1": one, "case 2": two}
    write_choices(path, {"case 1": two})
    assert read_choices(path) == {"case 1": two, "case 2": two}
    assert [entry.name for entry in path.parent.iterdir()] == ["tuning.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"case": 1}',
        b'{"case": {"variant": 1, "seconds": {}}}',
        b'{"case": {"variant": "a", "seconds": {"a": "fast"}}}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b" " * (LARGEST_FILE + 1),
    ],
    ids=["empty", "cut", "not text", "list", "number", "types", "times", "deep list", "deep object", "large"],
)
def test_damaged_and_hostile_files_are_ignored_and_replaced(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    path.write_bytes(content)
    assert read_choices(path) == {}
    write_choices(path, {"case": Choice("a", {"a": 1.0})})
    assert list(read_choices(path)) == ["case"]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    write_choices(tmp_path / "file" / "tuning.json", {"case": Choice("a", {"a": 1.0})})
    assert read_choices(tmp_path / "file" / "tuning.json") == {}


def test_the_file_is_of_one_device_driver_and_package(monkeypatch: pytest.MonkeyPatch) -> None:
    first = choices_path("device-driver")
    assert first.suffix == ".json"
    assert first.parent == cache_path("device-driver").parent
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99")
    assert len({first, choices_path("device-driver"), choices_path("device-other")}) == 3


# On the device


def test_a_session_takes_the_fastest_variant_and_remembers_it(
    mul_variants: dict[str, bool], own_device: Device, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = Tuning(seconds=60.0, on_cpu=True)
    assert run(tuning, rng) == pytest.approx(4 * -1)
    assert 0 < tuning.seconds < 60
    first, second = tuning.results
    assert (first.operator, first.count, first.chosen, first.source) == ("mul", 2, "fast", "measured")
    assert 0 < first.seconds["fast"] < first.seconds["slow"]  # type: ignore[operator]
    known = read_choices(choices_path(own_device.physical.tuning_key))
    assert {choice.variant for choice in known.values()} == {first.chosen, second.chosen}

    monkeypatch.setattr(Bench, "run", None)  # nothing is timed again
    again = Tuning(on_cpu=True)
    assert run(again, rng) == pytest.approx(-4)
    assert [(result.chosen, result.source) for result in again.results] == [
        (first.chosen, "cache"),
        (second.chosen, "cache"),
    ]


def test_a_remembered_choice_is_what_runs(
    mul_variants: dict[str, bool], own_device: Device, rng: np.random.Generator
) -> None:
    mul_variants["doubled"] = True
    session_capabilities = own_device.physical.capabilities()
    case = cases(products(), session_capabilities)[0]
    prefix = f"tier {session_capabilities.tier} {session_capabilities.matmul_precision} "
    seconds = dict.fromkeys(case.names, 1.0)
    path = choices_path(own_device.physical.tuning_key)
    write_choices(path, {prefix + case.key: Choice("doubled", seconds)})
    assert run(Tuning(on_cpu=True), rng) != pytest.approx(-4)  # it adds
    assert run(None, rng) == pytest.approx(-4)
    assert run(Tuning(), rng) == pytest.approx(-4) or own_device.info.kind != "cpu"
    # A name that nobody offers (any more) is measured anew.
    write_choices(path, {prefix + case.key: Choice("gone", {**seconds, "gone": 0.1})})
    mul_variants["doubled"] = False
    tuning = Tuning(seconds=60.0, on_cpu=True)
    assert run(tuning, rng) == pytest.approx(-4)
    assert tuning.results[0].source == "measured"


def test_new_variants_are_timed(mul_variants: dict[str, bool], own_device: Device, rng: np.random.Generator) -> None:
    mul_variants["fast"] = False
    only = Tuning(on_cpu=True)
    run(only, rng)
    assert only.results == []
    mul_variants["fast"], mul_variants["broken"] = True, True
    tuning = Tuning(seconds=60.0, on_cpu=True)
    run(tuning, rng)
    assert {result.source for result in tuning.results} == {"measured"}
    assert tuning.results[0].seconds["broken"] is None, "a variant that cannot run is never chosen, and no error"
    assert tuning.results[0].chosen == "fast"


def test_without_time_the_defaults_run_and_nothing_is_kept(
    mul_variants: dict[str, bool], own_device: Device, rng: np.random.Generator
) -> None:
    for seconds in (0.0, -1.0, 1e-9):
        tuning = Tuning(seconds, on_cpu=True)
        assert run(tuning, rng) == pytest.approx(-4)
        assert [(result.chosen, result.source) for result in tuning.results] == [("slow", "default")] * 2
    assert read_choices(choices_path(own_device.physical.tuning_key)) == {}


@pytest.mark.usefixtures("mul_variants", "own_device")
def test_the_time_is_one_budget(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain that never ends is left when time is up."""
    begin = time.perf_counter()
    tuning = Tuning(0.3, thorough=True, on_cpu=True)
    monkeypatch.setattr(bench, "THOROUGH_ROUNDS", 10**9)
    run(tuning, rng)
    assert time.perf_counter() - begin < 30
    assert tuning.seconds < 0.3


@pytest.mark.parametrize("staged", [False, True])
def test_tuning_through_staging_buffers(
    staged: bool, mul_variants: dict[str, bool], own_device: Device, rng: np.random.Generator
) -> None:
    tuning = Tuning(60.0, on_cpu=True)
    assert run(tuning, rng, staged=staged) == pytest.approx(-4)
    assert tuning.results[0].chosen == "fast"


def test_nothing_is_tuned_on_a_cpu_unless_asked(mul_variants: dict[str, bool], own_device: Device) -> None:
    if own_device.info.kind != "cpu":
        pytest.skip("the device is a GPU")
    tuning = Tuning()
    Session(products(), tuning=tuning).close()
    assert tuning.results == []


def test_results_become_json(mul_variants: dict[str, bool], own_device: Device, rng: np.random.Generator) -> None:
    tuning = Tuning(60.0, on_cpu=True)
    run(tuning, rng)
    text = msgspec.json.encode(tuning.results)
    assert msgspec.json.decode(text)[0]["chosen"] == "fast"
