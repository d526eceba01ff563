"""How long a program takes to load, in fresh processes, and the device memory that it takes against what it needs.

    python -m benchmarks.loading model.pte [--device NAME] [--json FILE]

"cold": nothing compiled is on disk, neither in our cache nor in the driver's (where an environment variable turns
that off). "warm": our cache holds the pipelines, and the choices of variants. "load" is ``torchvk.load``, with the
opening of the device, which is shown by itself too (in a process of its own), and without importing Python packages.
"need" is packed weights, arena, inputs and outputs; "taken" what was allocated for them from Vulkan.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import network

RUNS = 3  # of the warm ones; the median counts
NO_DRIVER_CACHE = {"__GL_SHADER_DISK_CACHE": "0", "MESA_SHADER_CACHE_DISABLE": "true"}


def load_once(path: str, device: str | None, opened: bool) -> dict[str, Any]:
    """Load in this process; with ``opened`` the device is opened before the clock starts."""
    import torchvk.program
    import torchvk.runtime
    from torchvk.runtime.device import open_device

    begin = time.perf_counter()
    if opened:
        open_device(device)
    ready = time.perf_counter()
    program = torchvk.program.load(path, device)
    end = time.perf_counter()
    sessions = {session for method in program._methods.values() for session in method._sessions}
    facts = [session.describe() for session in sessions]
    need = sum(f.constant_bytes + f.arena_bytes + f.input_bytes + f.output_bytes for f in facts)
    allocator = open_device(device).allocator
    return {
        "device": facts[0].device if facts else "none",
        "open": ready - begin,
        "load": end - ready,
        "need": need,
        "blocks": allocator.usage()[0],
        "taken": allocator.usage()[1],
    }


def in_a_process(path: Path, device: str | None, opened: bool, environment: dict[str, str]) -> dict[str, Any]:
    arguments = [sys.executable, "-m", "benchmarks.loading", str(path), "--once" if opened else "--once-unopened"]
    arguments += ["--device", device] if device else []
    done = subprocess.run(arguments, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure(path: Path, device: str | None) -> dict[str, dict[str, Any]]:
    """{what: facts} of a cold load and warm ones, with and without tuning."""
    found = {}
    for tuned in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            environment = {"TORCHVK_CACHE_DIR": folder, "TORCHVK_TUNE": str(int(tuned)), **NO_DRIVER_CACHE}
            label = ", tuned" if tuned else ""
            found["cold" + label] = in_a_process(path, device, False, environment)
            runs = [in_a_process(path, device, False, environment) for _ in range(RUNS)]
            found["warm" + label] = sorted(runs, key=lambda run: run["load"])[RUNS // 2]
            found["warm, device open" + label] = in_a_process(path, device, True, environment)
    return found


def main(
    model: Annotated[Path, typer.Argument(metavar="MODEL.PTE")],
    device: network.DeviceOption = None,
    output: network.JsonOption = None,
    once: Annotated[bool | None, typer.Option("--once/--once-unopened", hidden=True)] = None,
) -> None:
    """Measure how a program loads."""
    if once is not None:
        print(json.dumps(load_once(str(model), device, once)))
        return
    found = measure(model, device)
    heads = ("", "device ms", "load ms", "need MB", "taken MB", "more", "blocks")
    rows = (
        (
            label,
            f"{facts['open'] * 1e3:.0f}" if "open" in label else "in load",
            f"{facts['load'] * 1e3:.0f}",
            f"{facts['need'] / 1e6:.1f}",
            f"{facts['taken'] / 1e6:.1f}",
            f"{facts['taken'] / max(facts['need'], 1) - 1:.1%}",
            str(facts["blocks"]),
        )
        for label, facts in found.items()
    )
    Console(width=120).print(network.table(f"Loading {model.name} on {found['cold']['device']}", heads, rows))
    if output is not None:
        output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    typer.run(main)
