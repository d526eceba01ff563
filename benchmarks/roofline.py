"""Draw what ``benchmarks.linear --json`` wrote as a roofline chart.

    python -m benchmarks.roofline results.json docs/roofline.png

Each point is a layer: operations a second over operations a byte (bytes that must move). The slanted line is the
bandwidth of a copy, the level ones are the peaks of the units, all measured in the same run (Williams, Waterman and
Patterson, "Roofline: an insightful visual performance model", CACM 2009).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.linear import rate

UNITS = {
    "float32": "float32",
    "dot8": "8-bit dot products",
    "float16": "float16 matrix units",
    "int8": "int8 matrix units",
}
MARKERS = "osD^vP*X<>"


def draw(results: dict[str, Any], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    limits, rows = results["limits"], results["rows"]
    figure, axes = plt.subplots(figsize=(11, 7), dpi=130)
    intensities = [row["flops"] / row["bytes"] for row in rows]
    left, right = min(intensities) / 2, max(intensities) * 3
    for name, label in UNITS.items():
        peak = limits[name]
        if not peak:
            continue
        knee = peak / limits["bandwidth"]
        axes.plot([max(knee, left), right], [peak, peak], color="0.55", linewidth=1)
        axes.text(right, peak, f" {label}, {rate(peak)}/s", va="center", fontsize=8, color="0.35")
    top = max(limits[name] for name in UNITS)
    axes.plot([left, top / limits["bandwidth"]], [left * limits["bandwidth"], top], color="0.3", linewidth=1.2)
    axes.text(
        left * 1.15,
        left * 1.6 * limits["bandwidth"],
        f"copy, {limits['bandwidth'] / 1e9:.0f} GB/s",
        rotation=38,
        fontsize=8,
        color="0.3",
    )
    schemes = list(dict.fromkeys(row["scheme"] for row in rows))
    for scheme, marker, color in zip(schemes, MARKERS, plt.get_cmap("tab10").colors, strict=False):
        chosen = [row for row in rows if row["scheme"] == scheme]
        axes.scatter(
            [row["flops"] / row["bytes"] for row in chosen],
            [row["flops"] / row["seconds"] for row in chosen],
            marker=marker,
            s=26,
            color=color,
            label=scheme,
            zorder=3,
        )
    axes.set(xscale="log", yscale="log", xlim=(left, right), xlabel="operations a byte that must move")
    axes.set_ylabel("operations a second")
    axes.set_title(f"Linear layers, {results['device']}, {results['driver']}, {results['date']}")
    axes.grid(True, which="both", linewidth=0.3, color="0.85")
    axes.legend(title="weights and activations", fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(target)


def main(
    results: Annotated[Path, typer.Argument(help="JSON of benchmarks.linear.")],
    target: Annotated[Path, typer.Argument(help="The PNG to write.")],
) -> None:
    """Draw a roofline chart."""
    draw(json.loads(results.read_text()), target)


if __name__ == "__main__":
    typer.run(main)
