"""Methods that are more than one delegate: instruction by instruction, over memory that was planned in the file.

Memory works as in ExecuTorch's own runtime: a tensor with a planned place *is* that place. Views are often expressed
only by two tensors that share it, and a mutable buffer keeps its content from call to call because no other tensor is
placed there. So the planned buffers are real here as well, allocated once, and each call only copies the inputs in
and the outputs out.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from torchvk.errors import FormatError, OutOfMemoryError, TorchVkError
from torchvk.graph import Graph
from torchvk.program import operators
from torchvk.program.operators import Kernel
from torchvk.program.pte import (
    DelegateCall,
    FreeCall,
    Instruction,
    JumpFalseCall,
    KernelCall,
    ListValue,
    MoveCall,
    Plan,
    TensorValue,
)
from torchvk.program.tensors import Array, NumpyTensors, Tensors, TorchTensors, import_torch, numpy_dtype

MIN_LOOPS = 1024
MAX_LOOPS = 1 << 24


class Runner(Protocol):
    """What a delegate is run by: ``torchvk.runtime.Session``."""

    @property
    def graph(self) -> Graph: ...

    def run(self, inputs: Sequence[Array]) -> list[Array]: ...


Step = Callable[[list[Any]], "int | None"]
Observer = Callable[[int, float, float], None]
DelegateObserver = Callable[[int, "list[Array]"], None]


class Interpreter:
    """One method, ready to be called again and again (by one thread at a time)."""

    def __init__(self, plan: Plan, runners: Sequence[Runner], kernels: Mapping[str, Kernel]) -> None:
        """``runners``: one for each of the plan's delegates. ``kernels``: one for each of its operators."""
        self.plan = plan
        self.runners = runners
        self.kernels = kernels
        tensors = [value for value in plan.values if isinstance(value, TensorValue)]
        called = (
            plan.operators[step.operator] for chain in plan.chains for step in chain if isinstance(step, KernelCall)
        )
        needs_torch = any(name not in operators.BUILT_IN for name in called)
        missing = {tensor.dtype for tensor in tensors if numpy_dtype(tensor.dtype) is None}
        self.tensors: Tensors
        if needs_torch or missing:
            reason = f"tensors of {', '.join(sorted(missing))} need torch, which is not installed" if missing else ""
            self.tensors = TorchTensors(import_torch(reason))
        else:
            self.tensors = NumpyTensors()
        self.steps = [
            [self._step(instruction, position) for position, instruction in enumerate(chain)] for chain in plan.chains
        ]
        self.max_loops = _max_loops(plan)
        self.observe_delegate: DelegateObserver | None = None
        self.initial = self._initial()

    def run(
        self,
        inputs: Sequence[Any],
        as_torch: bool,
        observe: Observer | None = None,
        observe_delegate: DelegateObserver | None = None,
    ) -> list[Any]:
        """Run with checked inputs (arrays, torch tensors or numbers).

        ``observe(step, start, end)``, times in seconds of ``time.perf_counter``, is called after each instruction
        of the (flattened) chains; ``observe_delegate(delegate, arrays)`` before each call of a delegate.
        """
        self.observe_delegate = observe_delegate
        values = list(self.initial)
        for index, given in zip(self.plan.inputs, inputs, strict=True):
            value = self.plan.values[index]
            if isinstance(value, TensorValue):
                self._store(values, index, given)
            else:
                values[index] = given
        number = 0
        for steps in self.steps:
            position = loops = 0
            while position < len(steps):
                start = time.perf_counter() if observe is not None else 0.0
                target = steps[position](values)
                if observe is not None:
                    observe(number + position, start, time.perf_counter())
                if target is None:
                    position += 1
                    continue
                if target <= position:
                    loops += 1
                    if loops > self.max_loops:
                        raise FormatError(f"the program does not end: it jumped back {loops} times")
                position = target
            number += len(steps)
        return [self._output(values[index], index, as_torch) for index in self.plan.outputs]

    # Loading

    def _initial(self) -> list[Any]:
        """The values before a call: planned memory, constants, numbers."""
        extents: dict[int, int] = {}
        for value in self.plan.values:
            if isinstance(value, TensorValue) and value.allocation is not None:
                buffer, offset = value.allocation
                extents[buffer] = max(extents.get(buffer, 0), offset + value.nbytes)
        memory = {buffer: _allocate(size) for buffer, size in extents.items()}
        values: list[Any] = []
        for value in self.plan.values:
            if not isinstance(value, TensorValue):
                values.append(value)
            elif value.constant is not None:
                values.append(self.tensors.view(_constant(value.constant), value))
            elif value.allocation is not None:
                buffer, offset = value.allocation
                place = memory[buffer][offset : offset + value.nbytes]
                if value.initial is not None:
                    place[:] = np.frombuffer(value.initial, np.uint8)
                values.append(self.tensors.view(place, value))
            else:
                values.append(None)
        return values

    def _step(self, instruction: Instruction, position: int) -> Step:
        if isinstance(instruction, KernelCall):
            return self._kernel(instruction)
        if isinstance(instruction, DelegateCall):
            return self._delegate(instruction)
        if isinstance(instruction, MoveCall):
            return _move(instruction)
        if isinstance(instruction, JumpFalseCall):
            return _jump(instruction)
        return _free(instruction)

    def _kernel(self, call: KernelCall) -> Step:
        name = self.plan.operators[call.operator]
        kernel = self.kernels[name]
        if len(call.arguments) < kernel.arguments:
            raise FormatError(f"{name} is called with {len(call.arguments)} arguments, it takes {kernel.arguments}")
        arguments, results = call.arguments[: kernel.arguments], call.arguments[kernel.arguments :]
        getters = [self._getter(index) for index in arguments]
        for position in kernel.written:
            for index in self._tensors_in(arguments[position]):
                value = self.plan.values[index]
                if isinstance(value, TensorValue) and value.constant is not None:
                    raise FormatError(f"{name} writes value {index}, which is a constant")
        fresh = [
            (index, value)
            for position in kernel.outputs
            for index in self._tensors_in(arguments[position])
            if isinstance(value := self.plan.values[index], TensorValue) and (value.dynamic or value.allocation is None)
        ]
        run, replaces, store, empty = kernel.run, kernel.replaces, self._store, self.tensors.empty
        result_indices = [index for result in results for index in self._tensors_in(result)] if results else []

        def step(values: list[Any]) -> None:
            for index, value in fresh:
                values[index] = empty(value)
            try:
                result = run([getter(values) for getter in getters])
                if result is None or not result_indices:
                    return
                if replaces:
                    values[result_indices[0]] = result
                    return
                several = result if isinstance(result, (tuple, list)) else (result,)
                for index, item in zip(result_indices, several, strict=False):
                    store(values, index, item)
            except TorchVkError:
                raise
            except MemoryError as error:
                raise OutOfMemoryError(f"operator {name} ran out of memory on the CPU: {error}") from error
            except Exception as error:
                raise operators.failed(name, error) from error

        return step

    def _delegate(self, call: DelegateCall) -> Step:
        runner = self.runners[call.delegate]
        inputs, outputs = delegate_arguments(self.plan, call, runner)
        getters = [self._getter(index) for index in inputs]
        array, store = self.tensors.array, self._store

        def step(values: list[Any]) -> None:
            arrays = [array(getter(values)) for getter in getters]
            if self.observe_delegate is not None:
                self.observe_delegate(call.delegate, arrays)
            results = runner.run(arrays)
            for index, result in zip(outputs, results, strict=True):
                store(values, index, result)

        return step

    def _getter(self, index: int) -> Callable[[list[Any]], Any]:
        value = self.plan.values[index]
        if not isinstance(value, ListValue):
            return lambda values: values[index]
        if value.kind in ("float", "bool"):
            constant = list(value.items)
            return lambda values: constant
        items = [None if item is None else int(item) for item in value.items]
        return lambda values: [None if item is None else values[item] for item in items]

    def _tensors_in(self, index: int) -> list[int]:
        """The values that an argument stands for: itself, or those in a list of tensors."""
        value = self.plan.values[index]
        if isinstance(value, ListValue) and value.kind in ("tensor", "optional"):
            return [int(item) for item in value.items if item is not None]
        return [index]

    # Running

    def _store(self, values: list[Any], index: int, source: Any) -> None:
        """Give a value its content: into its planned memory, or as a tensor of its own."""
        value, current = self.plan.values[index], values[index]
        if source is current:
            return
        if not isinstance(value, TensorValue):
            values[index] = source
        elif value.constant is not None:
            raise FormatError(f"the program writes value {index}, which is a constant")
        elif value.allocation is None or tuple(source.shape) != value.shape:
            if not value.dynamic and tuple(source.shape) != value.shape:
                raise FormatError(f"value {index} is {value}, the program writes {list(source.shape)}")
            values[index] = self.tensors.copy(source, value)
        else:
            # A dynamic value may have been replaced by a smaller tensor earlier.
            self.tensors.store(self.initial[index] if value.dynamic else current, source)
            if value.dynamic:
                values[index] = self.initial[index]

    def _output(self, value: Any, index: int, as_torch: bool) -> Any:
        if isinstance(self.plan.values[index], TensorValue):
            if value is None:
                raise FormatError(f"output value {index} is never written")
            return self.tensors.give(value, as_torch)
        return value


def _move(call: MoveCall) -> Step:
    def step(values: list[Any]) -> None:
        values[call.target] = values[call.source]

    return step


def _jump(call: JumpFalseCall) -> Step:
    def step(values: list[Any]) -> int | None:
        condition = values[call.condition]
        if hasattr(condition, "shape") and condition.shape not in ((), (1,)):
            raise FormatError(f"a condition of shape {list(condition.shape)}")
        return None if bool(condition) else call.destination

    return step


def _free(call: FreeCall) -> Step:
    def step(values: list[Any]) -> None:
        """Memory is freed by whoever holds it last."""

    return step


def delegate_arguments(plan: Plan, call: DelegateCall, runner: Runner) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Positions of the values that a delegate reads and writes; raises :class:`FormatError` if the method's types
    and those of the delegate's graph do not agree."""
    graph = runner.graph
    declared = [graph.tensors[index] for index in (*graph.inputs, *graph.outputs)]
    if len(call.arguments) != len(declared):
        raise FormatError(
            f"delegate {call.delegate} is called with {len(call.arguments)} arguments, "
            f"its graph has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs"
        )
    for index, tensor in zip(call.arguments, declared, strict=True):
        value = plan.values[index]
        if not isinstance(value, TensorValue) or (value.dtype, value.shape) != (tensor.dtype.value, tensor.shape):
            raise FormatError(
                f"delegate {call.delegate} takes {tensor.type} for {tensor.name!r}, "
                f"the method gives {value if isinstance(value, TensorValue) else type(value).__name__}"
            )
    count = len(graph.inputs)
    return call.arguments[:count], call.arguments[count:]


def _allocate(size: int) -> Array:
    """Zeros, aligned to 64 bytes; pages are taken when they are first touched."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        total = 0
    try:
        if 0 < total < size:
            raise MemoryError
        raw = np.zeros(size + 64, np.uint8)
    except (MemoryError, ValueError):
        raise OutOfMemoryError(
            f"the method's tensors need {size} bytes of host memory" + (f", the machine has {total}" if total else "")
        ) from None
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + size]


def _constant(data: memoryview) -> Array:
    """A constant's bytes as an array that torch takes without a warning: writable, aligned.

    Those of a memory-mapped file are used in place (the mapping is private); others are copied.
    """
    array = np.frombuffer(data, np.uint8)
    return array.copy() if data.readonly or array.ctypes.data % 16 else array


def _max_loops(plan: Plan) -> int:
    """A bound for the jumps back in one chain of a program that ends: exir's loops count over a dimension of a
    tensor, one inside the other."""
    extent = max(
        (size for value in plan.values if isinstance(value, TensorValue) for size in value.shape),
        default=1,
    )
    jumps = sum(
        isinstance(step, JumpFalseCall) and step.destination <= position
        for chain in plan.chains
        for position, step in enumerate(chain)
    )
    # The exponent is bounded first: a hostile file has many jumps and large sizes.
    bound = math.prod([extent + 1] * min(jumps, 8))
    return min(MAX_LOOPS, max(MIN_LOOPS, bound))
