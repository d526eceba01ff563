"""A comparison as one HTML page that needs nothing else: no scripts, no fonts, no pictures from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchvk.program.compare import Comparison, LayerComparison

# dB from which on a bar has the class, and what that means: 20 dB is a noise of a tenth of the signal's amplitude.
CLASSES = ((-math.inf, "bad", "below 10 dB"), (10.0, "poor", "10 to 20 dB"), (20.0, "fair", "20 to 30 dB"))
BEST = (30.0, "good", "30 dB and more")

WIDTH, LABEL, ROW, TOP, RIGHT = 1000, 310, 22, 34, 70
LETTERS = 42

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1d2330; --soft: #5c6575; --line: #dfe3ea; --stripe: #f5f7fa;
  --bad: #c4314b; --poor: #d9822b; --fair: #b8a100; --good: #2f74c0; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171d; --ink: #e6e9ef; --soft: #9aa3b2; --line: #2c323d;
  --stripe: #1a1e26; --bad: #f0657c; --poor: #f0a35a; --fair: #d8c441; --good: #6aa8ee; } }
body { margin: 0 auto; max-width: 1040px; padding: 24px 20px 60px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 32px 0 8px; }
p { margin: 6px 0; } .soft, figcaption { color: var(--soft); }
code { font: 13px ui-monospace, monospace; overflow-wrap: anywhere; }
.facts { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0; padding: 0; list-style: none; }
.facts li { border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px; flex: 1 1 180px; }
.facts b { display: block; font-size: 19px; overflow-wrap: anywhere; }
input[name=order] { margin: 0 4px 0 0; } label { margin-right: 18px; cursor: pointer; }
figure { display: none; margin: 10px 0 0; overflow-x: auto; }
#worst:checked ~ .worst, #network:checked ~ .network { display: block; }
svg { display: block; width: 100%; min-width: 720px; height: auto; } svg text { fill: var(--ink); font-size: 12.5px; }
svg .path { font-family: ui-monospace, monospace; font-size: 11.5px; }
svg .axis { fill: var(--soft); font-size: 11.5px; }
.grid { stroke: var(--line); } .zero { stroke: var(--soft); } .stripe { fill: var(--stripe); }
.bad { fill: var(--bad); } .poor { fill: var(--poor); } .fair { fill: var(--fair); } .good { fill: var(--good); }
.inputs { stroke: var(--ink); stroke-width: 2; }
.legend span { margin-right: 16px; white-space: nowrap; } .legend svg { display: inline; width: 12px; height: 12px;
  min-width: 0; vertical-align: -1px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
td:nth-child(-n+3), th:nth-child(-n+3) { text-align: left; } td:first-child { white-space: normal; }
"""


def page(comparison: Comparison) -> str:
    """The page. Everything that comes from a file is escaped."""
    by_path = {layer.path: layer for layer in comparison.layers}
    in_order = [by_path[path] for path in comparison.order]
    quantized, reference = escape(comparison.quantized), escape(comparison.reference)
    calls = "one call" if comparison.calls == 1 else f"{comparison.calls} calls"
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{quantized} beside {reference}</title>\n<style>{STYLE}</style>",
            "<h1>Where accuracy is lost, layer by layer</h1>",
            f"<p><code>{quantized}</code> beside <code>{reference}</code></p>",
            f'<p class="soft">{calls} on {escape(comparison.device)}</p>',
            _facts(comparison),
            "<h2>Signal-to-quantization-noise ratio, in dB</h2>",
            '<input type="radio" name="order" id="worst" checked><label for="worst">the worst first</label>',
            '<input type="radio" name="order" id="network"><label for="network">in the order of the network</label>',
            f'<figure class="worst">{_chart(comparison.layers)}</figure>',
            f'<figure class="network">{_chart(in_order)}</figure>',
            _legend(),
            "<h2>Numbers</h2>",
            _table((*comparison.layers, *comparison.outputs)),
            *_alone(f"Only in {reference}", comparison.only_reference),
            *_alone(f"Only in {quantized}", comparison.only_quantized),
            "</html>\n",
        ]
    )


def _facts(comparison: Comparison) -> str:
    worst = comparison.layers[0] if comparison.layers else None
    drop = max(comparison.layers, key=_drop, default=None)
    outputs = ", ".join(_decibels(output.sqnr) for output in comparison.outputs) or "none"
    facts = [(outputs, "the outputs"), (str(len(comparison.layers)), "layers compared")]
    if worst is not None and drop is not None:
        facts.insert(1, (_name(worst.path), f"the worst layer: {_decibels(worst.sqnr)}"))
        facts.insert(2, (_name(drop.path), f"the largest drop below its inputs: {_drop(drop):.1f} dB"))
    items = "".join(f"<li><b>{escape(value).replace('.', '.<wbr>')}</b>{escape(label)}</li>" for value, label in facts)
    return f'<ul class="facts">{items}</ul>'


def _drop(layer: LayerComparison) -> float:
    """How far the layer is below the worst of what it reads; layers that read what is exact do not count."""
    return layer.inputs_sqnr - layer.sqnr if math.isfinite(layer.inputs_sqnr - layer.sqnr) else 0.0


def _chart(layers: Sequence[LayerComparison]) -> str:
    finite = [layer.sqnr for layer in layers if math.isfinite(layer.sqnr)]
    low = min(0.0, math.floor(min(finite, default=0.0) / 10) * 10)
    high = max(10.0, math.ceil(max(finite, default=10.0) / 10) * 10)
    step = next(step for step in (10, 20, 50, 100, 200, 500, 10**9) if (high - low) / step <= 12)

    def x(decibels: float) -> float:
        return LABEL + (min(max(decibels, low), high) - low) / (high - low) * (WIDTH - LABEL - RIGHT)

    height = TOP + ROW * len(layers) + 8
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="dB of each layer">']
    parts += [
        f'<rect class="stripe" x="0" y="{TOP + ROW * row}" width="{WIDTH}" height="{ROW}"/>'
        for row in range(0, len(layers), 2)
    ]
    tick = math.ceil(low / step) * step
    while tick <= high:
        kind = "zero" if tick == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP - 6}" y2="{height - 4}"/>')
        parts.append(f'<text class="axis" x="{x(tick):.1f}" y="{TOP - 12}" text-anchor="middle">{tick:g}</text>')
        tick += step
    parts += [_bar(layer, TOP + ROW * row, x) for row, layer in enumerate(layers)]
    return "\n".join([*parts, "</svg>"])


def _bar(layer: LayerComparison, y: float, x: Callable[[float], float]) -> str:
    name = _name(layer.path)
    short = name if len(name) <= LETTERS else "…" + name[1 - LETTERS :]
    left, right = sorted((x(0.0), x(layer.sqnr)))
    middle = y + ROW / 2 + 4
    details = f"{name}: {layer.operator} {list(layer.shape)}, {_decibels(layer.sqnr)}"
    details += f", largest error {layer.largest_error:.3g}"
    inputs = ""
    if math.isfinite(layer.inputs_sqnr):
        details += f", the worst of its inputs {_decibels(layer.inputs_sqnr)}"
        at = x(layer.inputs_sqnr)
        inputs = f'<line class="inputs" x1="{at:.1f}" x2="{at:.1f}" y1="{y + 4}" y2="{y + ROW - 4}"/>'
    label = "exact" if layer.sqnr == math.inf else f"{layer.sqnr:.1f}"
    end = max(right, x(layer.inputs_sqnr) if inputs else right) + 6
    return (
        f"<g><title>{escape(details)}</title>"
        f'<text class="path" x="{LABEL - 10}" y="{middle}" text-anchor="end">{escape(short)}</text>'
        f'<rect class="{_class(layer.sqnr)}" x="{left:.1f}" y="{y + 4}" width="{max(right - left, 1.5):.1f}" '
        f'height="{ROW - 8}" rx="2"/>{inputs}'
        f'<text x="{end:.1f}" y="{middle}">{label}</text></g>'
    )


def _class(sqnr: float) -> str:
    return [name for limit, name, _ in (*CLASSES, BEST) if sqnr >= limit][-1]


def _legend() -> str:
    marks = "".join(
        f'<span><svg viewBox="0 0 12 12"><rect class="{name}" width="12" height="12" rx="2"/></svg> {text}</span>'
        for _, name, text in (*CLASSES, BEST)
    )
    tick = '<svg viewBox="0 0 12 12"><line class="inputs" x1="6" x2="6" y1="0" y2="12"/></svg>'
    return (
        f'<p class="legend soft">{marks}<span>{tick} the worst of the layers that it reads</span></p>'
        '<p class="soft">20 dB: noise of a tenth of the signal; 6 dB more: half of it. A layer whose bar ends far left '
        "of its mark loses accuracy itself; one whose bar ends at its mark passes on what it was given.</p>"
    )


def _table(layers: Iterable[LayerComparison]) -> str:
    heads = ("layer", "operator", "shape", "SQNR", "of its inputs", "largest error", "largest value")
    lines = ["<tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"]
    for layer in layers:
        cells = (
            f"<code>{escape(_name(layer.path))}</code>",
            escape(layer.operator),
            escape(" × ".join(map(str, layer.shape))),
            _decibels(layer.sqnr),
            _decibels(layer.inputs_sqnr),
            f"{layer.largest_error:.3g}",
            f"{layer.largest_value:.3g}",
        )
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"


def _alone(title: str, paths: Sequence[str]) -> list[str]:
    if not paths:
        return []
    names = ", ".join(f"<code>{escape(_name(path))}</code>" for path in paths)
    return [f"<details><summary>{title}: {len(paths)}</summary><p>{names}</p></details>"]


def _name(path: str) -> str:
    return path or "(the model itself)"


def _decibels(sqnr: float) -> str:
    return "exact" if sqnr == math.inf else f"{sqnr:.1f} dB"
