"""Where neither torch nor executorch is installed: the package imports quickly, and delegates run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pte_files import Plan, affine_graph, call, delegate_file, tensor, write

# Stands for an environment in which these packages are not installed.
BLOCKER = """
import importlib.abc, sys

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchao", "executorch", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def python(script: str, *arguments: Any, blocked: bool = True) -> str:
    command = [sys.executable, "-c", (BLOCKER if blocked else "") + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_import_is_quick_and_pulls_in_nothing() -> None:
    script = """
import sys, time
before = set(sys.modules)
start = time.process_time()
import torchvk
seconds = time.process_time() - start
heavy = {"torch", "torchao", "executorch", "numpy", "cffi", "rich", "typer"} & (set(sys.modules) - before)
names = dir(torchvk)
import json
print(json.dumps([seconds, sorted(heavy), names]))
"""
    seconds, heavy, names = json.loads(python(script, blocked=False))
    assert heavy == []
    # The limit is 0.2 s of a user's time; processor time does not depend on what else the machine does.
    assert seconds < 0.2
    assert {"Program", "TorchVkError", "VulkanPartitioner", "VulkanQuantizer", "devices", "load"} <= set(names)
    assert {"__version__", "get_symmetric_quantization_config"} <= set(names)


def test_version() -> None:
    from importlib.metadata import version

    import torchvk

    assert torchvk.__version__ == version("torchvk")
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = torchvk.no_such_name


@pytest.mark.tier
@pytest.mark.parametrize("device", ["reference", None])
def test_delegates_run(tmp_path: Path, device: str | None) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(delegate_file(affine_graph()))
    script = f"""
import numpy as np, torchvk
x = np.ones((2, 3), np.float32)
with torchvk.load(sys.argv[1], device={device!r}) as program:
    print(program(x, x)[0].sum(), program.describe().methods[0].name, len(program.profile(x, x).rows) >= 3)
print(sorted(set(sys.modules) & {{"torch", "torchao", "executorch"}}))
"""
    assert python(script, path) == "18.0 forward True\n[]\n"


@pytest.mark.tier
def test_a_quantized_model_lowered_elsewhere_runs(tmp_path: Path) -> None:
    """The road's two ends: torch, torchao and executorch on this side of the file, none of them on the other."""
    import torch
    from executorch.exir import to_edge_transform_and_lower
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_api import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.utils import unwrap_tensor_subclass

    import torchvk

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)).eval()
    quantize_(model, Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32)))
    unwrap_tensor_subclass(model)
    x = torch.randn(3, 64)
    edge = to_edge_transform_and_lower(torch.export.export(model, (x,)), partitioner=[torchvk.VulkanPartitioner()])
    edge.to_executorch().save(str(tmp_path / "model.pte"))
    np.save(tmp_path / "x.npy", x.numpy())
    script = """
import numpy as np, torchvk
with torchvk.load(sys.argv[1]) as program:
    np.save(sys.argv[3], program(np.load(sys.argv[2])))
    print(dict(program.describe().methods[0].cpu_operators))
"""
    assert python(script, tmp_path / "model.pte", tmp_path / "x.npy", tmp_path / "y.npy") == "{}\n"
    # The integer sums are exact. The hidden float32 values may differ in their last bits and then round to the
    # neighbouring one of 255 steps: less than 1 % of the largest output.
    y = model(x).detach().numpy()
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), y, atol=0.01 * np.abs(y).max())


def test_operators_that_need_torch_are_named(tmp_path: Path) -> None:
    values = [tensor((2,), place=0), 1, tensor((2,), place=16)]
    operators = [("aten::add", "out"), ("aten::neg", "out"), ("executorch_prim::add", "Scalar")]
    steps = [call(0, 0, 0, 1, 2, 2), call(1, 2, 0, 0), call(2, 1, 1, 1)]
    path = tmp_path / "model.pte"
    path.write_bytes(write(Plan(values, [0], [2], steps, operators)))
    script = """
import torchvk
try:
    torchvk.load(sys.argv[1])
except torchvk.errors.MissingDependencyError as error:
    assert isinstance(error, ImportError)
    print(error)
print(torchvk.program.describe(sys.argv[1]).methods[0].cpu_operators)
"""
    message, operators_text = python(script, path).splitlines()
    assert message == (
        f"{path}: operators aten::add.out, aten::neg.out run on the CPU, with torch, which is not installed; "
        "install it with `pip install torch`"
    )
    assert "'aten::neg.out': 1" in operators_text


def test_operators_on_numbers_and_views_do_not(tmp_path: Path) -> None:
    values = [tensor((2, 3)), 3, 2, tensor((3, 2)), 5]
    from executorch.exir.schema import IntList

    plan = Plan([*values, IntList([1, 2])], [0], [3, 4], [call(0, 0, 5, 3), call(1, 1, 2, 4)])
    plan.operators = [("executorch_prim::et_view", "default"), ("executorch_prim::mul", "Scalar")]
    path = tmp_path / "model.pte"
    path.write_bytes(write(plan))
    script = """
import numpy as np, torchvk
view, product = torchvk.load(sys.argv[1])(np.arange(6, dtype=np.float32).reshape(2, 3))
print(view.tolist(), product)
"""
    assert python(script, path) == "[[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]] 6\n"


def test_bfloat16_needs_torch(tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(write(Plan([tensor((2,), "bfloat16")], [0], [0])))
    script = """
import torchvk
try:
    torchvk.load(sys.argv[1])
except torchvk.errors.MissingDependencyError as error:
    print(error)
"""
    assert "tensors of bfloat16 need torch, which is not installed" in python(script, path)


def test_command_line(tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(delegate_file(affine_graph()))
    np.save(tmp_path / "x.npy", np.ones((2, 3), np.float32))
    script = "from torchvk.cli import main; main(sys.argv[1:])"
    inputs = ["--input", tmp_path / "x.npy", "--input", tmp_path / "x.npy"]
    text = python(script, "run", path, *inputs, "--output", tmp_path / "all.npz", "--device", "reference")
    assert "float32[2, 3]" in text
    assert np.load(tmp_path / "all.npz")["output_0"].tolist() == [[3, 3, 3]] * 2
