"""What the benchmarks share: their options, tables and JSON; and a whole network on the device: its file and times."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import torchvk
from benchmarks.anchors import available, graph_seconds, host_seconds
from benchmarks.hollow import fill, hollow
from torchvk.runtime.device import open_device

WARM_SECONDS = 1.0
THREADS = 2  # of PyTorch on the CPU

DeviceOption = Annotated[str | None, typer.Option(help="Vulkan device: index or part of its name.")]
ListOption = Annotated[str, typer.Option(help="Comma-separated.")]
SaveOption = Annotated[Path | None, typer.Option(help="Write hollow models to this folder, and do nothing else.")]
FilesOption = Annotated[Path | None, typer.Option(help="Take hollow models from this folder.")]
TorchOption = Annotated[bool, typer.Option(help="Time PyTorch beside.")]
ProfileOption = Annotated[bool, typer.Option(help="Print the time of each kernel.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")]


@dataclass(frozen=True)
class Times:
    """Seconds of a call on the device (median, and largest less smallest) and of a call from Python; bytes between the
    layers (the arena)."""

    seconds: float
    spread: float
    call: float
    dispatches: int
    barriers: int
    arena: int


@dataclass(frozen=True)
class Peer:
    """What was timed beside, and its seconds of a call."""

    peer: str = ""
    peer_seconds: float = 0.0

    @property
    def beside(self) -> str:
        """What a title says of it."""
        return f"; beside: {self.peer}" if self.peer else ""


def timed(program: Any, inputs: Sequence[Any]) -> Times:
    """Warm clocks first; then some fifty runs on a GPU, few where a run takes seconds."""
    until = time.perf_counter() + WARM_SECONDS
    program(*inputs)
    while time.perf_counter() < until:
        program(*inputs)
    begin = time.perf_counter()
    program(*inputs)
    repeats = int(min(50, max(3, 5 / (time.perf_counter() - begin))))
    result = program.measure(*inputs, repeats=repeats)
    return Times(
        result.median,
        max(result.seconds) - min(result.seconds),
        host_seconds(lambda: program(*inputs), repeats=min(repeats, 20)),
        result.dispatches,
        result.barriers,
        result.arena_bytes,
    )


def measured(path: Path, device: str | None, inputs: Sequence[Any], console: Console | None, title: str) -> Times:
    """Load the program and time it; on a ``console``, its kernels are shown."""
    with torchvk.load(path, device=device) as program:
        times = timed(program, inputs)
        if console is not None:
            console.print(kernels_of(program, inputs, f"{title}: one dispatch at a time"))
    return times


def beside(half: Callable[[], Callable[[], Any]], plain: Callable[[], Any], name: str = "") -> Peer:
    """PyTorch: ``half`` gives the call on CUDA in float16, ``plain`` is the call on the CPU in float32. ``name``: how
    the former runs."""
    import torch

    with torch.no_grad():
        if available():
            seconds = graph_seconds(half(), 1, repeats=50)
            return Peer(f"PyTorch {torch.__version__} CUDA, fp16{name}, CUDA graph", seconds)
        torch.set_num_threads(THREADS)
        return Peer(f"PyTorch {torch.__version__} CPU, fp32, {THREADS} threads", host_seconds(plain, repeats=5))


def files_of(
    stem: str, lowered: Callable[[], bytes], save: Path | None, files: Path | None, scratch: Path, console: Console
) -> Path | None:
    """The .pte of a network in the folder ``scratch``: ``lowered``, or that of its hollow file in ``files``. None where
    there is nothing to time: ``save`` is where its hollow file goes instead, or it is not in ``files``, which is told.
    """
    name = stem.replace("/", "-")
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
        hollow(lowered(), save / f"{name}.hollow")
        return None
    if files is not None and not (files / f"{name}.hollow").exists():
        console.print(f"{stem}: no file {files / name}.hollow, left out")
        return None
    path = scratch / f"{name}.pte"
    path.write_bytes(lowered() if files is None else fill(files / f"{name}.hollow"))
    return path


def kernels_of(program: Any, inputs: Any, title: str) -> Table:
    """Where the time goes, by kernel."""
    sums: dict[tuple[str, str], list[float]] = {}
    runs = [program.profile(*inputs) for _ in range(5)]
    for records in zip(*(run.records for run in runs), strict=True):
        entry = sums.setdefault((records[0].operator, records[0].kernel), [0, 0.0, 0.0])
        entry[0] += 1
        entry[1] += float(np.median([record.seconds for record in records]))
        entry[2] += records[0].flops
    rows = (
        (
            *(operator, kernel, f"{count:.0f}", f"{seconds * 1e6:.1f}", f"{seconds / count * 1e6:.1f}"),
            f"{flops / seconds / 1e12 if seconds else 0:.1f}",
        )
        for (operator, kernel), (count, seconds, flops) in sorted(sums.items(), key=lambda item: -item[1][1])
    )
    return table(title, ("operator", "kernel", "dispatches", "µs", "µs each", "TFLOP/s"), rows, left=2)


# What is written


def table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Table:
    """The first ``left`` columns are words, the others numbers."""
    made = Table(title=title)
    for column, head in enumerate(heads):
        made.add_column(head, justify="left" if column < left else "right")
    for row in rows:
        made.add_row(*row)
    return made


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """The same for a document."""
    marks = ["---" if column < left else "---:" for column in range(len(heads))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, marks, *rows))


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 0.1 else f"{seconds:.2f} s"


def device_name(device: str | None) -> str:
    info = open_device(device).info
    return f"{info.name} ({info.driver} {info.driver_version})"


def write_json(path: Path | None, device: str | None, rows: Iterable[Any], **more: Any) -> None:
    """Rows (dataclasses; those within them lie flat) with the device and the date, if there is a path."""
    if path is None:
        return
    info = open_device(device).info
    facts = {"device": info.name, "driver": f"{info.driver} {info.driver_version}"}
    date = datetime.date.today().isoformat()
    path.write_text(json.dumps({**facts, "date": date, **more, "rows": [_flat(row) for row in rows]}, indent=1))


def _flat(row: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in fields(row):
        value = getattr(row, field.name)
        found |= _flat(value) if is_dataclass(value) else {field.name: value}
    return found
