"""The tables of docs/performance.md from what ``benchmarks.linear`` and ``benchmarks.minilm`` wrote with ``--json``.

python -m benchmarks.report linear.json minilm.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.linear import rate


def linear_table(results: dict[str, Any]) -> list[str]:
    """A line a case: time, share of the limit, bytes and operations a second, PyTorch's kernels."""
    limits = results["limits"]
    lines = [
        f"Copy {limits['bandwidth'] / 1e9:.0f} GB/s. Operations a second: float32 {rate(limits['float32'])}, 8-bit dot",
        f"products {rate(limits['dot8'])}, matrix units float16 {rate(limits['float16'])}, int8 "
        f"{rate(limits['int8'])}.",
        "",
        "| scheme | N × K | M | time | limit | share | GB/s | OP/s | torch bf16 | torch int8 | torch int4 |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in results["rows"]:
        beside = [
            f"{row['peers'][name] * 1e6:.1f} µs" if name in row["peers"] else "" for name in ("bf16", "int8", "int4")
        ]
        cells = [
            row["scheme"],
            f"{row['n']} × {row['k']}",
            str(row["m"]),
            f"{row['seconds'] * 1e6:.1f} µs",
            f"{row['limit'] * 1e6:.1f} µs",
            f"{row['limit'] / row['seconds']:.0%}",
            f"{row['bytes'] / row['seconds'] / 1e9:.0f}",
            rate(row["flops"] / row["seconds"]),
            *beside,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def minilm_table(results: dict[str, Any]) -> list[str]:
    """A line a scheme and batch size, 128 tokens a sentence."""
    lines = [
        f"| scheme | batch | on the device | {results['rows'][0]['peer']} | ratio "
        "| whole call | dispatches | barriers | cold load | warm load |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in results["rows"]:
        loads = [f"{row[name]:.2f} s" if row.get(name) else "" for name in ("cold", "warm")]
        cells = [
            row["scheme"],
            str(row["batch"]),
            f"{row['seconds'] * 1e6:.0f} µs",
            f"{row['peer_seconds'] * 1e6:.0f} µs",
            f"{row['seconds'] / row['peer_seconds']:.2f}",
            f"{row['call'] * 1e6:.0f} µs",
            str(row["dispatches"]),
            str(row["barriers"]),
            *loads,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main(
    linear: Annotated[Path, typer.Argument(help="JSON of benchmarks.linear.")],
    minilm: Annotated[Path, typer.Argument(help="JSON of benchmarks.minilm.")],
) -> None:
    """Print both tables as Markdown."""
    results = json.loads(linear.read_text())
    print(f"### Linear layers on {results['device']}, {results['driver']}, {results['date']}\n")
    print("\n".join(linear_table(results)))
    results = json.loads(minilm.read_text())
    print(f"\n### MiniLM, 128 tokens, on {results['device']}, {results['driver']}, {results['date']}\n")
    print("\n".join(minilm_table(results)))


if __name__ == "__main__":
    typer.run(main)
