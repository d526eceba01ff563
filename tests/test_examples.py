"""Every script in examples/ runs by itself, in its own process, and checks its own result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(directory: Path, script: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("int8_dynamic_int4_weight.py", []),
        ("int4_weight_only.py", []),
        ("pt2e_dynamic.py", ["8"]),
        ("pt2e_dynamic.py", ["4"]),
    ],
)
def test_quantization(tmp_path: Path, script: str, arguments: list[str]) -> None:
    assert "largest error against eager" in run(tmp_path, script, *arguments)
    assert (tmp_path / script.replace(".py", ".pte")).stat().st_size > 0


def test_pt2e_and_run_without_torch(tmp_path: Path) -> None:
    assert "largest error against eager" in run(tmp_path, "pt2e_8bit.py")
    files = ["pt2e_8bit.pte", "pt2e_8bit_input.npy", "pt2e_8bit_output.npy"]
    output = run(tmp_path, "run_without_torch.py", *files)
    assert "output float32 [32, 16], largest difference: 0\n" in output
    assert "torch was not imported" in output
