"""What a profiled run measured: rows, sums by operator, and a trace for Perfetto."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ProfileRow:
    """One dispatch or copy, or (from :func:`by_operator`) all of an operator.

    op: the operator, "copy" for a copy. source: path of the nn.Module. kernel: the SPIR-V module, "" for a copy.
    count: dispatches. seconds: their time. bytes, flops: the work that had to be done (multiply-add = 2).
    start, end: seconds since the first one began.
    """

    op: str
    source: str
    kernel: str
    count: int
    seconds: float
    bytes: int
    flops: int
    start: float
    end: float

    @property
    def bandwidth(self) -> float:
        """Bytes a second; 0 where nothing was measured."""
        return self.bytes / self.seconds if self.seconds else 0.0

    @property
    def throughput(self) -> float:
        """Floating-point or integer operations a second; 0 where nothing was measured."""
        return self.flops / self.seconds if self.seconds else 0.0


def by_operator(rows: Iterable[ProfileRow]) -> list[ProfileRow]:
    """One row an operator, the most expensive first; ``kernel`` and ``source`` stay where all agree."""
    groups: dict[str, list[ProfileRow]] = {}
    for row in rows:
        groups.setdefault(row.op, []).append(row)

    def common(values: Iterable[str]) -> str:
        distinct = set(values)
        return distinct.pop() if len(distinct) == 1 else ""

    merged = [
        ProfileRow(
            op,
            common(row.source for row in group),
            common(row.kernel for row in group),
            sum(row.count for row in group),
            sum(row.seconds for row in group),
            sum(row.bytes for row in group),
            sum(row.flops for row in group),
            min(row.start for row in group),
            max(row.end for row in group),
        )
        for op, group in groups.items()
    ]
    return sorted(merged, key=lambda row: -row.seconds)


def chrome_trace(rows: Sequence[ProfileRow], name: str = "device") -> dict[str, Any]:
    """Rows as a Chrome trace (JSON object format), which Perfetto opens; times in microseconds."""
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 0, "tid": 0, "name": "process_name", "args": {"name": "torchvk"}},
        {"ph": "M", "pid": 0, "tid": 0, "name": "thread_name", "args": {"name": name}},
    ]
    events += [
        {
            "ph": "X",
            "pid": 0,
            "tid": 0,
            "name": row.op,
            "cat": row.kernel or row.op,
            "ts": row.start * 1e6,
            "dur": row.seconds * 1e6,
            "args": {"source": row.source, "kernel": row.kernel, "bytes": row.bytes, "flops": row.flops},
        }
        for row in rows
    ]
    return {"traceEvents": events, "displayTimeUnit": "ns"}
