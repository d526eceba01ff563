"""Out variants of quantization operators that stay on the CPU.

exir writes every operator that no delegate claims as its out variant, and fails where there is none. torchao registers
none. PT2E's are in a library of ExecuTorch that it loads on request only.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

from torchvk.lowering.source import overload

_LIBRARIES: list[torch.library.Library] = []  # what a Library declares lives as long as it does


def declare_out_variants(nodes: Iterable[Node]) -> None:
    """Make sure that the operators of ``nodes`` from ``torchao`` and ``quantized_decomposed`` have out variants."""
    for operator in {overload(node) for node in nodes if node.op == "call_function"}:
        if not isinstance(operator, torch._ops.OpOverload):
            continue
        namespace, _, name = operator._schema.name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), name)
        if namespace not in ("quantized_decomposed", "torchao") or any("out" in o for o in packet.overloads()):
            continue
        if namespace == "quantized_decomposed":
            importlib.import_module("executorch.kernels.quantized")
        else:
            _declare(operator)


def _declare(operator: torch._ops.OpOverload) -> None:
    """``f(…) -> Tensor`` gets ``f.out(…, *, Tensor(a!) out) -> Tensor(a!)``, which copies f's result
    and, as torch's own do, gives ``out`` its shape (known only now where shapes are dynamic)."""
    schema = operator._schema
    namespace, _, name = schema.name.partition("::")
    text = str(schema)
    arguments = text[text.index("(") + 1 : text.rindex(" -> ")].removesuffix(")")
    results = [f"Tensor({letter}!)" for letter, _ in zip("abcdefgh", schema.returns, strict=False)]
    single = len(results) == 1
    names = ["out"] if single else [f"out{i}" for i in range(len(results))]
    outs = ", ".join(f"{kind} {out}" for kind, out in zip(results, names, strict=True))
    returned = results[0] if single else f"({', '.join(results)})"
    only_keywords = "" if "*, " in arguments else "*, "
    library = torch.library.Library(namespace, "FRAGMENT")
    library.define(f"{name}.out({arguments}, {only_keywords}{outs}) -> {returned}")

    def out_variant(*inputs: Any, **keywords: Any) -> Any:
        targets = [keywords.pop(out) for out in names]
        given = operator(*inputs, **keywords)
        for target, value in zip(targets, [given] if single else given, strict=True):
            if target.shape != value.shape:
                target.resize_(value.shape)
            target.copy_(value)
        return targets[0] if single else tuple(targets)

    library.impl(f"{name}.out", out_variant, "CompositeExplicitAutograd")
    _LIBRARIES.append(library)
