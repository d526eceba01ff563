"""What the benchmarks are made of, where it can be checked without timing anything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pte_files import delegate_file

import torchvk
from benchmarks.hollow import fill, hollow
from torchvk.graph import DType, Graph, TensorType
from torchvk.graph.build import GraphBuilder


def linear_graph(weight: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> Graph:
    builder = GraphBuilder()
    x = builder.input("x", TensorType(DType.FLOAT32, (3, weight.shape[1])))
    w = builder.constant("w", weight)
    return builder.build(builder.node("linear", [x, w], [TensorType(DType.FLOAT32, (3, weight.shape[0]))], {}))


def test_hollow_files_are_small_and_come_back_with_other_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = (0.1 * rng.standard_normal((128, 256)) + 0.5).astype(np.float32)
    hollow(delegate_file(linear_graph(weight)), tmp_path / "model.hollow")
    assert (tmp_path / "model.hollow").stat().st_size < weight.nbytes / 10
    x = np.eye(3, 256, dtype=np.float32)
    with torchvk.load(fill(tmp_path / "model.hollow"), device="reference") as program:
        y = program(x)
    assert abs(y.mean() - 0.5) < 0.05
    assert abs(y.std() - 0.1) < 0.05
    assert not np.allclose(y, weight[:, :3].T)
