"""Programs: .pte files, loaded and callable."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from torchvk.errors import ArgumentError, ArgumentTypeError, ClosedError, FormatError, TorchVkError, UnsupportedError
from torchvk.graph import Graph
from torchvk.program import operators
from torchvk.program.arguments import Parameter, check_inputs, parameters
from torchvk.program.describe import BACKEND, Graphs, ProgramDescription, describe_file, value_names
from torchvk.program.interpreter import Interpreter, delegate_arguments
from torchvk.program.profile import Measurement, Profile, Record
from torchvk.program.pte import Delegate, DelegateCall, KernelCall, ListValue, Plan, TensorValue, decode
from torchvk.program.source import ProgramSource, located, open_source
from torchvk.program.tensors import Array, as_array, to_torch

if TYPE_CHECKING:
    from torchvk.runtime import Session, Tuning


class _Shared:
    """What the methods of one program share: one call at a time, and whether it is closed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lock = threading.RLock()
        self.closed = False

    def check_open(self) -> None:
        if self.closed:
            raise ClosedError(f"{self.name}: the program was closed")


class Method:
    """One method of a program; call it with its inputs, flat and in order.

    Inputs are NumPy arrays or CPU torch tensors of exactly the dtypes and shapes that ``parameters`` lists (any
    strides; tensors may require grad), or the very numbers that the program was exported for. torch in, torch out;
    NumPy in, NumPy out; if any input is a torch tensor, all outputs are. A single output is returned bare, several
    as a tuple. Outputs belong to the caller. Calls from several threads queue up.

    ==================  ==============================================================
    ArgumentError       wrong number of inputs, wrong shape, another number than exported
    ArgumentTypeError   wrong type or dtype, a tensor that is not on the CPU
    ClosedError         the program was closed
    OutOfMemoryError    the device or the host has too little memory
    DeviceLostError     the device stopped answering
    TorchVkError        an operator on the CPU failed (an index out of range, say)
    ==================  ==============================================================
    """

    def __init__(
        self, plan: Plan, sessions: Sequence[Session], kernels: Mapping[str, operators.Kernel], shared: _Shared
    ) -> None:
        self.name = plan.name
        self._shared = shared
        self._sessions = sessions
        self._device = _device_name(sessions)
        graphs: dict[int, Graph] = {index: session.graph for index, session in enumerate(sessions)}
        self.parameters: tuple[Parameter, ...] = parameters(plan, value_names(plan, graphs))
        self._call_operators = [
            plan.operators[step.operator] if isinstance(step, KernelCall) else None
            for chain in plan.chains
            for step in chain
        ]
        self._call_delegates = [
            step.delegate if isinstance(step, DelegateCall) else None for chain in plan.chains for step in chain
        ]
        self._direct = _direct(plan, sessions)
        self._interpreter = None if self._direct else Interpreter(plan, sessions, kernels)

    def __repr__(self) -> str:
        return f"Method({self.name!r}: {', '.join(map(str, self.parameters))})"

    def __call__(self, *inputs: Any) -> Any:
        with self._shared.lock:
            self._shared.check_open()
            checked, as_torch = check_inputs(self.name, self.parameters, inputs)
            if self._direct is None:
                assert self._interpreter is not None
                outputs = self._interpreter.run(checked, as_torch)
            else:
                outputs = self._run_direct(checked, as_torch)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _run_direct(self, checked: list[Any], as_torch: bool) -> list[Any]:
        """The whole method is one delegate: no interpreter, no memory of ours."""
        assert self._direct is not None
        session, takes, gives = self._direct
        results = session.run([as_array(checked[position]) for position in takes])
        outputs = [results[position] for position in gives]
        if len(set(gives)) != len(gives):
            outputs = [output.copy() for output in outputs]
        return [to_torch(output) for output in outputs] if as_torch else outputs

    def profile(self, *inputs: Any) -> Profile:
        """Run with these inputs and measure: every dispatch on the GPU by its timestamps, CPU operators by the clock.

        The method runs a few times. Dispatches are measured one by one, so their sum can exceed the time of a call
        in which independent ones overlap. Raises what a call raises.
        """
        with self._shared.lock:
            seconds = math.inf
            for _ in range(4):  # the first one warms up
                start = time.perf_counter()
                self(*inputs)
                seconds = min(seconds, time.perf_counter() - start)
            checked, as_torch = check_inputs(self.name, self.parameters, inputs)
            if self._direct is not None:
                session, takes, _ = self._direct
                arrays = [as_array(checked[position]) for position in takes]
                records = _gpu_records(session, arrays, 0, 0.0)
            else:
                records = self._profile_steps(checked, as_torch)
        return Profile(self.name, self._device, seconds, tuple(records))

    def measure(self, *inputs: Any, repeats: int = 20) -> Measurement:
        """Run ``repeats`` times with these inputs: how long the device was at work, by its timestamps.

        Copies from and to the host, and what runs on the CPU, are not in it. Raises what a call raises.
        """
        with self._shared.lock:
            self._shared.check_open()
            checked, as_torch = check_inputs(self.name, self.parameters, inputs)
            measured: list[tuple[Session, list[float]]] = []
            if self._direct is not None:
                session, takes, _ = self._direct
                measured.append((session, session.measure([as_array(checked[i]) for i in takes], repeats)))
            else:

                def observe_delegate(delegate: int, arrays: list[Array]) -> None:
                    session = self._sessions[delegate]
                    measured.append((session, session.measure(arrays, repeats)))

                assert self._interpreter is not None
                self._interpreter.run(checked, as_torch, None, observe_delegate)
            facts = [session.describe() for session, _ in measured]
        return Measurement(
            tuple(map(sum, zip(*(seconds for _, seconds in measured), strict=True))) or (0.0,) * repeats,
            sum(fact.dispatches for fact in facts),
            sum(fact.barriers for fact in facts),
            sum(fact.arena_bytes for fact in facts),
        )

    def _profile_steps(self, checked: list[Any], as_torch: bool) -> list[Record]:
        assert self._interpreter is not None
        records: list[Record] = []
        origin = time.perf_counter()

        def observe(number: int, start: float, end: float) -> None:
            name = self._call_operators[number]
            if name is not None:
                records.append(Record(name, "CPU", start - origin, end - start))

        def observe_delegate(delegate: int, arrays: list[Array]) -> None:
            begin = time.perf_counter() - origin
            records.extend(_gpu_records(self._sessions[delegate], arrays, delegate, begin))

        self._interpreter.run(checked, as_torch, observe, observe_delegate)
        return records


class Program:
    """A loaded .pte file. Calling it calls its method ``forward``; see :class:`Method` for inputs, outputs, errors.

    Made by :func:`torchvk.load`. ``close()`` (also: leaving a ``with`` block, or the garbage collector) frees the
    device memory; every later use raises :class:`ClosedError`.
    """

    def __init__(self, description: ProgramDescription, methods: Mapping[str, Method], shared: _Shared) -> None:
        self._description = description
        self._methods = dict(methods)
        self._shared = shared

    def __repr__(self) -> str:
        state = ", closed" if self._shared.closed else ""
        return f"Program({self._shared.name!r}, methods: {', '.join(self._methods)}{state})"

    @property
    def method_names(self) -> tuple[str, ...]:
        """The names of the methods that were loaded."""
        return tuple(self._methods)

    def method(self, name: str) -> Method:
        """The method of that name; raises :class:`ArgumentError` for an unknown one."""
        self._shared.check_open()
        try:
            return self._methods[name]
        except KeyError:
            raise ArgumentError(
                f"{self._shared.name} has no method {name!r}; it has {', '.join(self._methods) or 'none'}"
            ) from None

    def __call__(self, *inputs: Any) -> Any:
        return self.method("forward")(*inputs)

    def describe(self) -> ProgramDescription:
        """Delegates, operators with counts, shapes, constants' bytes, and what runs on the CPU. ``print`` it."""
        self._shared.check_open()
        return self._description

    def profile(self, *inputs: Any) -> Profile:
        """Profile ``forward``; see :meth:`Method.profile`."""
        return self.method("forward").profile(*inputs)

    def measure(self, *inputs: Any, repeats: int = 20) -> Measurement:
        """Measure ``forward``; see :meth:`Method.measure`."""
        return self.method("forward").measure(*inputs, repeats=repeats)

    def close(self) -> None:
        """Free what the program holds on the device. Waits for a call in another thread; may be called again."""
        with self._shared.lock:
            self._shared.closed = True
            methods, self._methods = self._methods, {}
            for method in methods.values():
                method._interpreter = method._direct = None
                sessions, method._sessions = method._sessions, ()
                for session in sessions:
                    session.close()

    def __enter__(self) -> Program:
        self._shared.check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load(
    source: ProgramSource,
    device: str | int | None = None,
    *,
    methods: Collection[str] | None = None,
    custom_operators: Collection[str] = (),
    matmul_precision: str | None = None,
    tune: bool | Tuning | None = None,
) -> Program:
    """Load a .pte file.

    source: a path (it is memory-mapped: do not change the file while the program lives), bytes, or what exir's
    ``to_executorch()`` returned. device: index or name substring of a Vulkan device, ``"reference"`` for the NumPy
    references, or None for ``TORCHVK_DEVICE``, else the best device. methods: which to load; all by default.
    custom_operators: namespaces registered with ``torch.library`` that the file may call on the CPU, besides aten,
    quantized_decomposed and torchao. matmul_precision: for float32 matrix products, ``"highest"`` multiplies and
    adds in float32; ``"high"`` may round the operands to float16 where the device has matrix units, and still adds
    in float32 (compare ``torch.set_float32_matmul_precision``; values beyond float16's 65504 overflow). None: what
    ``TORCHVK_MATMUL_PRECISION`` says, else ``"highest"``. float16 graphs do not heed it.
    tune: whether to time kernels that come in several variants, for two seconds at most, the first time that they
    are met on this device; what was found out is kept beside the pipeline cache. False: take what the rules say.
    None: what ``TORCHVK_TUNE`` (0 or 1) says, else yes on a GPU and no on a CPU.

    ======================  ==========================================================================
    FormatError             no such file; empty, truncated, damaged, or not a .pte file; a newer version
    UnsupportedError        a delegate of another backend; an operator nobody here can run; external data
    MissingDependencyError  operators that run on the CPU need torch (or torchao), which is not installed
    ArgumentTypeError       ``source`` is none of the above, ``methods`` is no list
    ArgumentError           no such device, no such method, no such precision
    VulkanError             no loader, no driver, no device that is good enough
    OutOfMemoryError        the weights do not fit on the device
    ======================  ==========================================================================
    """
    if isinstance(methods, str):
        raise ArgumentTypeError(f"methods must be a list of names, not the str {methods!r}: [{methods!r}]")
    opened = open_source(source)
    with located(opened.name):
        file = decode(opened.view)
        wanted = [plan for plan in file.plans if methods is None or plan.name in methods]
        unknown = sorted(set(methods or ()) - {plan.name for plan in wanted})
        if unknown:
            raise ArgumentError(f"no method {', '.join(unknown)}; there are {', '.join(p.name for p in file.plans)}")
        if not wanted:
            raise FormatError("the program has no methods")
        for plan in wanted:
            with located(f"method {plan.name!r}"):
                check_plan(plan)
        graph_of = Graphs()
        # A device takes a tenth of a second to open, and the file something to check.
        with _opened_ahead(device, any(plan.delegates for plan in wanted)):
            description = describe_file(opened.name, file, graph_of)
        kernels = operators.resolve({name for plan in wanted for name in called_operators(plan)}, custom_operators)
        shared = _Shared(opened.name)
        sessions: dict[int, Session] = {}
        # One budget for all sessions.
        tuning = cache(partial(_asked_tuning, tune))

        def open_session(graph: Graph) -> Session:
            from torchvk.runtime import Session

            return Session(graph, device, matmul_precision=matmul_precision, tuning=tuning())

        try:
            loaded = {plan.name: _method(plan, sessions, graph_of, open_session, kernels, shared) for plan in wanted}
        except BaseException:
            for session in sessions.values():
                session.close()
            raise
        return Program(description, loaded, shared)


@contextmanager
def _opened_ahead(device: str | int | None, wanted: bool) -> Iterator[None]:
    """Open the device in another thread meanwhile. What goes wrong there goes wrong again for who needs it."""

    def open_device() -> None:
        from torchvk.runtime import device as devices
        from torchvk.runtime import reference

        asked = devices.default_request() if device is None else device
        if asked != reference.NAME:
            with contextlib.suppress(TorchVkError):
                devices.open_device(asked)

    if not wanted:
        yield
        return
    with ThreadPoolExecutor(max_workers=1) as thread:
        thread.submit(open_device)
        yield


def _asked_tuning(asked: bool | Tuning | None) -> Tuning | None:
    from torchvk.runtime import Tuning

    if isinstance(asked, Tuning):
        return asked
    if asked is None:
        text = os.environ.get("TORCHVK_TUNE", "")
        if text not in ("", "0", "1"):
            raise ArgumentError(f"TORCHVK_TUNE must be 0 or 1, not {text!r}")
        asked = {"0": False, "1": True}.get(text)
    return None if asked is False else Tuning(on_cpu=asked is True)


def _method(
    plan: Plan,
    sessions: dict[int, Session],
    graph_of: Callable[[Delegate], Graph],
    open_session: Callable[[Graph], Session],
    kernels: Mapping[str, operators.Kernel],
    shared: _Shared,
) -> Method:
    """``sessions``: those of the methods before, by graph; methods that share a delegate share its session."""
    own = []
    for index, delegate in enumerate(plan.delegates):
        with located(f"method {plan.name!r}, delegate {index}"):
            graph = graph_of(delegate)
            if id(graph) not in sessions:
                sessions[id(graph)] = open_session(graph)
            own.append(sessions[id(graph)])
    with located(f"method {plan.name!r}"):
        return Method(plan, own, kernels, shared)


def called_operators(plan: Plan) -> set[str]:
    return {plan.operators[step.operator] for chain in plan.chains for step in chain if isinstance(step, KernelCall)}


def check_plan(plan: Plan) -> None:
    for index, delegate in enumerate(plan.delegates):
        if delegate.backend != BACKEND:
            raise UnsupportedError(
                f"delegate {index} is for {delegate.backend!r}; torchvk runs {BACKEND!r}: lower the model with "
                "torchvk's VulkanPartitioner"
                + (" (this one is ExecuTorch's own)" if delegate.backend == "VulkanBackend" else "")
            )
    for index in (*plan.inputs, *plan.outputs):
        if isinstance(plan.values[index], ListValue):
            raise UnsupportedError("lists as inputs or outputs of a method are not supported")


def _direct(plan: Plan, sessions: Sequence[Session]) -> tuple[Session, list[int], list[int]] | None:
    """If the method is nothing but one delegate: its session, which inputs it takes, which results are returned."""
    steps = [step for chain in plan.chains for step in chain]
    if len(steps) != 1 or not isinstance(steps[0], DelegateCall):
        return None
    call = steps[0]
    session = sessions[call.delegate]
    takes, gives = delegate_arguments(plan, call, session)
    places = {index: position for position, index in enumerate(plan.inputs)}
    if any(index not in places for index in takes) or any(index not in gives for index in plan.outputs):
        return None
    if any(isinstance(value := plan.values[index], TensorValue) and value.dynamic for index in (*takes, *gives)):
        return None
    return session, [places[index] for index in takes], [gives.index(index) for index in plan.outputs]


def _device_name(sessions: Sequence[Session]) -> str:
    if not sessions:
        return "CPU"
    info = sessions[0].device
    return "reference" if info is None else info.name


def _gpu_records(session: Session, arrays: list[Array], delegate: int, begin: float) -> list[Record]:
    """The dispatches of one call of a delegate, as if it had begun at ``begin``."""
    where: Literal["GPU", "CPU"] = "CPU" if session.device is None else "GPU"
    return [
        Record(row.op, where, begin + row.start, row.seconds, row.bytes, row.flops, row.kernel, row.source, delegate)
        for row in session.profile(arrays)
    ]
