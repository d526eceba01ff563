"""Which variant of an operator is fastest here: timed on the device at hand, within a budget, and kept on disk.

A case is a shape class (ops.shape_class) of a graph whose operator lists several variants.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torchvk import ops
from torchvk.graph import Graph
from torchvk.ops import Capabilities
from torchvk.runtime.bench import Bench, Case
from torchvk.runtime.choices import Choice, choices_path, read_choices, write_choices
from torchvk.runtime.device import Device
from torchvk.runtime.execution import pipeline_keys
from torchvk.runtime.memory import Use
from torchvk.runtime.plan import make_plan
from torchvk.runtime.steps import Kind

SECONDS = 2.0  # for a program, unless the user asks for more
MARGIN = 1.03  # the default is left only for what is so much faster


@dataclass
class Tuning:
    """What a program may spend on timing, and what came of it. Its sessions share one.

    thorough: time again what is known, and go on while there is time. on_cpu: tune also where the device is a CPU.
    ``results`` collects a row a case.
    """

    seconds: float = SECONDS
    thorough: bool = False
    on_cpu: bool = False
    results: list[Result] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """A case and what was chosen. ``seconds``: a layer, of every variant that was timed (None: it cannot run).

    source: "measured", "cache" (measured earlier), or "default" where there was no time.
    """

    operator: str
    shape: str
    count: int
    chosen: str
    source: str
    seconds: Mapping[str, float | None]


def cases(graph: Graph, capabilities: Capabilities) -> list[Case]:
    """The shape classes with at least two variants, the most expensive first."""
    found: dict[str, Case] = {}
    for position, node in enumerate(graph.nodes):
        operator = ops.get(node.op)
        inputs = tuple(None if index is None else graph.tensors[index].type for index in node.inputs)
        attributes = operator.decode(node)
        key = ops.shape_class(node.op, attributes, inputs)
        if key in found:
            found[key] = replace(found[key], count=found[key].count + 1)
            continue
        outputs = tuple(graph.tensors[index].type for index in node.outputs)
        if any(0 in type.shape for type in outputs):
            continue
        variants = operator.variants(attributes, inputs, outputs, capabilities)
        if len(variants) > 1:
            found[key] = Case(key, position, 1, attributes, inputs, outputs, variants)
    return sorted(found.values(), key=lambda case: -case.cost)


def tuned_variants(
    device: Device,
    graph: Graph,
    capabilities: Capabilities,
    tuning: Tuning,
    uses: Mapping[Kind, Use],
    staged: bool = False,
) -> dict[str, str]:
    """The variant to take for every shape class that is tuned, measured now or before. The caller holds the
    device's lock. Time is taken from ``tuning``."""
    wanted = cases(graph, capabilities)
    if not wanted:
        return {}
    path = choices_path(device.physical.tuning_key)
    choices = read_choices(path)
    prefix = f"tier {capabilities.tier} {capabilities.matmul_precision} "
    known = {case.key: choice for case in wanted if (choice := _usable(case, choices.get(prefix + case.key)))}
    unknown = [case for case in wanted if tuning.thorough or case.key not in known]
    measured: dict[str, dict[str, float | None]] = {}
    if unknown and device.physical.timestamp_bits and tuning.seconds > 0:
        begin = time.perf_counter()
        # What is needed in any case is compiled meanwhile.
        tuned = {key: choice.variant for key, choice in known.items()}
        device.pipelines.start(pipeline_keys(make_plan(graph, capabilities, tuned=tuned)))
        bench = Bench(device, graph, capabilities, uses, staged)
        measured = bench.run(unknown, begin + tuning.seconds, tuning.thorough)
        tuning.seconds -= time.perf_counter() - begin
        write_choices(path, {prefix + key: Choice(best(seconds), seconds) for key, seconds in measured.items()})
    chosen: dict[str, str] = {}
    for case in wanted:
        seconds, source = measured.get(case.key), "measured"
        if seconds is None and case.key in known:
            seconds, source = known[case.key].seconds, "cache"
        if seconds is None:
            source = "default"
        else:
            chosen[case.key] = best(seconds) if source == "measured" else known[case.key].variant
        name = chosen.get(case.key, case.names[0])
        operator = graph.nodes[case.node].op
        shape = case.key.removeprefix(operator).strip()
        tuning.results.append(Result(operator, shape, case.count, name, source, seconds or {}))
    return chosen


def _usable(case: Case, choice: Choice | None) -> Choice | None:
    """A choice from earlier, if it is still offered and every variant of today was timed then."""
    return choice if choice and {choice.variant} <= set(case.names) <= set(choice.seconds) else None


def best(seconds: Mapping[str, float | None]) -> str:
    """The fastest variant; the first one, the default, unless another is faster by more than MARGIN."""
    first = next(iter(seconds))
    times = {name: value for name, value in seconds.items() if value is not None}
    fastest = min(times, key=times.__getitem__, default=first)
    default = seconds[first]
    return first if default is not None and default <= MARGIN * times[fastest] else fastest
