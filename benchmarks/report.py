"""The tables of docs/performance.md from what ``benchmarks.linear`` and ``benchmarks.minilm`` wrote with ``--json``.

python -m benchmarks.report linear.json minilm.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import linear, network
from benchmarks.linear import rate


def linear_table(results: dict[str, Any]) -> str:
    """A line a case: time, share of the limit, bytes and operations a second, PyTorch's kernels."""
    limits = results["limits"]
    return (
        f"Copy {limits['bandwidth'] / 1e9:.0f} GB/s. Operations a second: float32 {rate(limits['float32'])}, 8-bit "
        f"dot products {rate(limits['dot8'])}, matrix units float16 {rate(limits['float16'])}, int8 "
        f"{rate(limits['int8'])}.\n\n"
        + network.markdown(linear.HEADS, (linear.cells(linear.Row(**row)) for row in results["rows"]), left=2)
    )


def minilm_table(results: dict[str, Any]) -> str:
    """A line a scheme and batch size, 128 tokens a sentence."""
    heads = ("scheme", "batch", "on the device", results["rows"][0]["peer"], "ratio", "whole call", "dispatches")
    rows = (
        (
            row["scheme"],
            str(row["batch"]),
            f"{row['seconds'] * 1e6:.0f} µs",
            f"{row['peer_seconds'] * 1e6:.0f} µs",
            f"{row['seconds'] / row['peer_seconds']:.2f}",
            f"{row['call'] * 1e6:.0f} µs",
            str(row["dispatches"]),
            str(row["barriers"]),
            *(f"{row[name]:.2f} s" if row.get(name) else "" for name in ("cold", "warm")),
        )
        for row in results["rows"]
    )
    return network.markdown((*heads, "barriers", "cold load", "warm load"), rows)


def main(
    of_linear: Annotated[Path, typer.Argument(metavar="LINEAR", help="JSON of benchmarks.linear.")],
    of_minilm: Annotated[Path, typer.Argument(metavar="MINILM", help="JSON of benchmarks.minilm.")],
) -> None:
    """Print both tables as Markdown."""
    results = json.loads(of_linear.read_text())
    print(f"### Linear layers on {results['device']}, {results['driver']}, {results['date']}\n")
    print(linear_table(results))
    results = json.loads(of_minilm.read_text())
    print(f"\n### MiniLM, 128 tokens, on {results['device']}, {results['driver']}, {results['date']}\n")
    print(minilm_table(results))


if __name__ == "__main__":
    typer.run(main)
