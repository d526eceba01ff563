"""Where the time of a call goes: a table per operator, and a trace for Perfetto or chrome://tracing."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Record:
    """One dispatch on the GPU, or one operator on the CPU.

    ``start`` and ``seconds``: on the GPU by its own timestamps, counted from the delegate's first dispatch.
    ``bytes`` and ``flops``: the work that must be done (weights, inputs and outputs once; multiply-add = 2);
    0 where it is not counted.
    """

    operator: str
    where: Literal["GPU", "CPU"]
    start: float
    seconds: float
    bytes: int = 0
    flops: int = 0
    kernel: str = ""
    source: str = ""
    delegate: int | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """What :meth:`Method.measure` gives: seconds on the device, a number a run, and what a run consists of.

    ``arena_bytes``: device memory for what lies between the operators, without weights, inputs and outputs.
    """

    seconds: tuple[float, ...]
    dispatches: int
    barriers: int
    arena_bytes: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True, slots=True)
class Row:
    """All records of one operator. ``share`` of the time of all records, ``gbps`` and ``gflops`` 0 if not counted."""

    operator: str
    where: Literal["GPU", "CPU"]
    count: int
    seconds: float
    share: float
    gbps: float
    gflops: float


@dataclass(frozen=True, slots=True)
class Profile:
    """What :meth:`Method.profile` gives. ``seconds`` is the time of a whole call without timestamps, copies
    included; ``rows`` has one entry per operator, the longest first."""

    method: str
    device: str
    seconds: float
    records: tuple[Record, ...] = field(repr=False)

    @property
    def rows(self) -> tuple[Row, ...]:
        total = sum(record.seconds for record in self.records)
        groups: dict[tuple[str, Literal["GPU", "CPU"]], list[Record]] = {}
        for record in self.records:
            groups.setdefault((record.operator, record.where), []).append(record)
        rows = [_row(operator, where, records, total) for (operator, where), records in groups.items()]
        return tuple(sorted(rows, key=lambda row: -row.seconds))

    def table(self) -> str:
        """The rows as plain text."""
        return f"{plain_table(COLUMNS, map(cells_of, self.rows), left=2)}\n{self.summary()}"

    def summary(self) -> str:
        inside = sum(record.seconds for record in self.records)
        return (
            f"{self.method} on {self.device}: {self.seconds * 1e3:.3f} ms a call, "
            f"{inside * 1e3:.3f} ms of it in {len(self.records)} dispatches and CPU operators"
        )

    def plain(self) -> dict[str, Any]:
        """The profile as plain data, for JSON."""
        rows = [{name: getattr(row, name) for name in Row.__slots__} for row in self.rows]
        return {"method": self.method, "device": self.device, "seconds": self.seconds, "operators": rows}

    def write_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the records in the Trace Event format (JSON), which Perfetto and chrome://tracing open."""
        threads = {"CPU": 1, "GPU": 2}
        events: list[dict[str, Any]] = [
            {"name": "process_name", "ph": "M", "pid": 1, "args": {"name": f"torchvk {self.method}"}},
            *(
                {"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": {"name": name}}
                for name, number in (("CPU", 1), (f"GPU: {self.device}", 2))
            ),
        ]
        for record in self.records:
            details = {"kernel": record.kernel, "module": record.source, "bytes": record.bytes, "flops": record.flops}
            events.append(
                {
                    "name": record.operator,
                    "cat": record.where,
                    "ph": "X",
                    "pid": 1,
                    "tid": threads[record.where],
                    "ts": record.start * 1e6,
                    "dur": record.seconds * 1e6,
                    "args": {key: value for key, value in details.items() if value},
                }
            )
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}))


COLUMNS = ("operator", "where", "count", "time/µs", "share", "GB/s", "GFLOP/s")


def plain_table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """A table as aligned plain text; the first ``left`` columns to the left, the others to the right."""
    cells = [tuple(columns), *(tuple(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column < left else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def cells_of(row: Row) -> tuple[str, ...]:
    """A row as the texts of a table's cells."""
    return (
        row.operator,
        row.where,
        str(row.count),
        f"{row.seconds * 1e6:.1f}",
        f"{row.share:.1%}",
        f"{row.gbps:.2f}" if row.gbps else "",
        f"{row.gflops:.2f}" if row.gflops else "",
    )


def _row(operator: str, where: Literal["GPU", "CPU"], records: Sequence[Record], total: float) -> Row:
    seconds = sum(record.seconds for record in records)
    scale = 1e-9 / seconds if seconds else 0.0
    return Row(
        operator,
        where,
        len(records),
        seconds,
        seconds / total if total else 0.0,
        sum(record.bytes for record in records) * scale,
        sum(record.flops for record in records) * scale,
    )
