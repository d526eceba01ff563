"""What an operator is, and what the runtime gets to know of its kernels. Plain data: no Vulkan here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import msgspec
import numpy as np

from torchvk.errors import FormatError, TorchVkError
from torchvk.graph import DType, Graph, Node, TensorType
from torchvk.ops.fragments import Fragment

Array = np.ndarray[Any, Any]


class OperatorError(TorchVkError, ValueError):
    """Operands or attributes that contradict the operator's own rule."""


@dataclass(frozen=True)
class NoAttributes:
    """For operators that have none."""


@dataclass(frozen=True, slots=True)
class CooperativeMatrixShape:
    """One entry of VkCooperativeMatrixPropertiesKHR at subgroup scope; types are DType values or "int32"."""

    m: int
    n: int
    k: int
    a: str
    b: str
    c: str
    result: str


MatmulPrecision = Literal["highest", "high"]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a kernel choice may ask about a device. Sizes in bytes unless the name says otherwise.

    shuffle: subgroup shuffles, at any tier.
    fragments: where lanes hold the elements of cooperative matrices, as far as a probe could tell.
    matmul_precision: what the user asked of matrix products in float32 graphs: "highest", float32 multiply-add, or
    "high", which allows float16 operands (matrix units) with float32 accumulation.
    max_texels: texels (uint4) that one Arg with ``texels`` may have; 0 where that is not to be used.
    """

    tier: int
    kind: Literal["discrete", "integrated", "cpu", "virtual", "other"]
    subgroup_size: int
    max_workgroup_invocations: int
    max_workgroup_size: tuple[int, int, int]
    max_workgroup_count: tuple[int, int, int]
    shared_memory: int
    max_storage_range: int
    cooperative_matrices: tuple[CooperativeMatrixShape, ...] = ()
    shuffle: bool = False
    max_texels: int = 0
    matmul_precision: MatmulPrecision = "highest"
    fragments: tuple[Fragment, ...] = ()

    def matrix_shapes(self, element: str, accumulator: str) -> frozenset[tuple[int, int, int]]:
        """M, N and K of the cooperative matrices with these operands and sums (names as in CooperativeMatrixShape)."""
        wanted = (element, element, accumulator, accumulator)
        return frozenset(
            (shape.m, shape.n, shape.k)
            for shape in self.cooperative_matrices
            if (shape.a, shape.b, shape.c, shape.result) == wanted
        )

    @property
    def local_size(self) -> int:
        """Workgroup size for kernels without shared memory. One subgroup on a CPU (lavapipe likes that best),
        several on a GPU."""
        return self.subgroup_size if self.kind == "cpu" else min(256, self.max_workgroup_invocations)


@dataclass(frozen=True)
class Layout:
    """How a constant is rearranged for a kernel, once, when it is uploaded.

    ``pack`` takes the constant's array (``int4`` unpacked to int8) and gives the array whose bytes are uploaded.
    Layouts are compared by name, so a name must say all that the result depends on.
    """

    name: str
    pack: Callable[[Array], Array] = field(compare=False, repr=False)


PART_ALIGNMENT = 256  # the largest minStorageBufferOffsetAlignment that Vulkan allows


@dataclass(frozen=True, slots=True)
class Arg:
    """A storage buffer of a dispatch: binding i is the i-th Arg. Index counts the node's inputs, outputs, or the
    scratch buffers of its Kernels. ``layout`` only for constant inputs.

    ``texels``: read only, and the shader declares ``Buffer<uint4>``: the same bytes, bound as a uniform texel
    buffer. lavapipe loads from those about ten times faster (measured on Mesa 22.3: 8 lanes × uint4 in 22 ns
    against 245 ns), because it checks a storage buffer's bounds lane by lane.

    ``part``: (first byte, bytes) of the buffer where the kernel sees, and touches, no more of it: dispatches that write
    different parts of a buffer need no order. The first byte is a multiple of PART_ALIGNMENT.
    """

    role: Literal["input", "output", "scratch"]
    index: int
    write: bool = False
    read: bool = True
    layout: Layout | None = None
    texels: bool = False
    part: tuple[int, int] | None = None


def read(index: int, layout: Layout | None = None, texels: bool = False) -> Arg:
    """The node's input ``index``, read."""
    return Arg("input", index, layout=layout, texels=texels)


def write(index: int = 0) -> Arg:
    """The node's output ``index``, written."""
    return Arg("output", index, write=True, read=False)


def scratch_write(index: int) -> Arg:
    return Arg("scratch", index, write=True, read=False)


def scratch_read(index: int, texels: bool = False) -> Arg:
    return Arg("scratch", index, texels=texels)


@dataclass(frozen=True, slots=True)
class Dispatch:
    """One compute dispatch.

    kernel: name of a SPIR-V module of ``torchvk.shaders``. constants: the specialization constants 0, 1, 2, …
    (int or bool as 32-bit integer, float as float32). push: push constants, at most 128 bytes.
    groups: workgroup counts. bytes / flops: the work that must be done, for the profile (multiply-add = 2).
    """

    kernel: str
    buffers: tuple[Arg, ...]
    groups: tuple[int, int, int]
    constants: tuple[int | float, ...] = ()
    push: bytes = b""
    bytes: int = 0
    flops: int = 0


@dataclass(frozen=True, slots=True)
class Kernels:
    """How a node runs: dispatches in order, and the sizes in bytes of the scratch buffers between them."""

    dispatches: tuple[Dispatch, ...]
    scratch: tuple[int, ...] = ()


Types = Sequence[TensorType | None]
Variants = tuple[tuple[str, Kernels], ...]
NOTHING: Variants = (("nothing", Kernels(())),)  # for empty results


def _no_variants(*_: Any) -> Variants:
    return ()


def _no_kernels(*_: Any) -> Kernels:
    raise AssertionError("an operator takes its first variant in place of this")


@dataclass(frozen=True)
class Operator:
    """The one description of an operator.

    attributes: a frozen dataclass; every field typed, so that files can be checked against it.
    infer(attributes, inputs) -> output types; raises OperatorError with words for operands that make no sense.
    reference(attributes, inputs) -> outputs, NumPy; int4 constants arrive unpacked as int8.
    kernels(attributes, inputs, outputs, capabilities) -> Kernels; pure. Every operator has them, for tier 0 up.
    variants(attributes, inputs, outputs, capabilities) -> (name, Kernels) of every plausible way to run this case.
    All are correct; which is fastest on a device is measured there. A name says how (tile sizes, splits), so that a
    choice made for one size can serve another. Operators give one of the two: the first variant is what ``kernels``
    give, and where there is one way there are no variants.
    support(attributes, inputs) -> None, or in words why this (meaningful) case cannot run.
    constant_inputs: inputs that must be constants (weights that get packed).
    alias: the output is the first input's bytes with another shape: no kernel runs.
    summary: one line for the support table; dtypes: what the support table lists for the first input.
    """

    name: str
    summary: str
    infer: Callable[[Any, Types], tuple[TensorType, ...]]
    reference: Callable[[Any, Sequence[Array | None]], tuple[Array, ...]]
    kernels: Callable[[Any, Types, Sequence[TensorType], Capabilities], Kernels] = _no_kernels
    attributes: type = NoAttributes
    support: Callable[[Any, Types], str | None] = lambda attributes, inputs: None
    constant_inputs: frozenset[int] = frozenset()
    alias: bool = False
    dtypes: tuple[DType, ...] = ()
    variants: Callable[[Any, Types, Sequence[TensorType], Capabilities], Variants] = _no_variants

    def __post_init__(self) -> None:
        if self.kernels is _no_kernels:
            if self.variants is _no_variants:
                raise ValueError(f"operator {self.name!r} has neither kernels nor variants")
            object.__setattr__(self, "kernels", lambda *case: self.variants(*case)[0][1])

    def decode(self, node: Node) -> Any:
        """The node's attributes as this operator's dataclass; raises FormatError."""
        try:
            return msgspec.convert(dict(node.attributes), self.attributes, strict=True)
        except msgspec.ValidationError as error:
            raise FormatError(f"operator {self.name!r}: {error}") from None


_registry: dict[str, Operator] = {}


def register(operator: Operator) -> Operator:
    """Make an operator known; names are unique."""
    if operator.name in _registry:
        raise ValueError(f"operator {operator.name!r} is registered twice")
    _registry[operator.name] = operator
    return operator


def get(name: str) -> Operator:
    """The operator of that name; raises FormatError naming an unknown one."""
    try:
        return _registry[name]
    except KeyError:
        raise FormatError(
            f"unknown operator {name!r}: the file needs a newer torchvk, or was not written by torchvk"
        ) from None


def operators() -> tuple[Operator, ...]:
    """Every operator, by name."""
    return tuple(_registry[name] for name in sorted(_registry))


def supports(op: str, attributes: Any, inputs: Types) -> str | None:
    """None if the GPU can run it, else the reason in words. The partitioner and ``check`` both ask this."""
    operator = get(op)
    try:
        operator.infer(attributes, inputs)
    except OperatorError as error:
        return str(error)
    return operator.support(attributes, inputs)


def shape_class(op: str, attributes: Any, inputs: Types) -> str:
    """Cases for which the same variant is taken to be the fastest, as text.

    The operator, its attributes (scales, zero points, bounds and the like change no kernel's speed: left out) and the
    input types, with a star for constants where they need not be. The rows of the first input, and of others with the
    same rows, count in classes: exactly up to 16, then four classes an octave.
    """
    names = [spec.name for spec in fields(attributes)]
    said = [name for name in names if not name.endswith(("_zero_point", "_min", "_max"))]
    words = [f"{name}={value}" for name in said if not isinstance(value := getattr(attributes, name), float)]
    constants = _registry[op].constant_inputs if op in _registry else frozenset()
    leading = inputs[0].shape[:-1] if inputs and inputs[0] is not None else ()

    def text(slot: int, type: TensorType | None) -> str:
        if type is None:
            return "none"
        rows = math.prod(type.shape[:-1])
        sizes = [*type.shape] if type.shape[:-1] != leading else [_size_class(rows), *type.shape[-1:]]
        star = "*" if type.constant and slot not in constants else ""
        return f"{type.dtype.value}{sizes}{star}".replace(" ", "")

    return " ".join([op, *words, *(text(slot, type) for slot, type in enumerate(inputs))])


def _size_class(size: int) -> int:
    """The largest size of the class."""
    step = 1 << max(0, (size - 1).bit_length() - 3) if size > 16 else 1
    return -(-size // step) * step


def choose_kernels(
    op: str,
    attributes: Any,
    inputs: Types,
    outputs: Sequence[TensorType],
    capabilities: Capabilities,
    tuned: Mapping[str, str],
) -> Kernels:
    """The variant that ``tuned`` (shape class → name) names, if the operator offers it here; else its default."""
    operator = get(op)
    if tuned and (name := tuned.get(shape_class(op, attributes, inputs))) is not None:
        for offered, kernels in operator.variants(attributes, inputs, outputs, capabilities):
            if offered == name:
                return kernels
    return operator.kernels(attributes, inputs, outputs, capabilities)


def check(graph: Graph) -> None:
    """Check the meaning of a structurally valid graph; raises FormatError naming the node.

    Every operator known, attributes of the right names and types, constants where constants must be, and
    outputs of the dtype and shape that the operator's own rule gives.
    """
    for position, node in enumerate(graph.nodes):
        operator = get(node.op)
        where = f"node {position} ({node.op!r}{' from ' + node.source if node.source else ''})"
        attributes = operator.decode(node)
        inputs = [None if index is None else graph.tensors[index].type for index in node.inputs]
        try:
            outputs = operator.infer(attributes, inputs)
        except (OperatorError, IndexError, TypeError, AttributeError, OverflowError, ZeroDivisionError) as error:
            raise FormatError(f"{where}: {error}") from None
        declared = tuple(graph.tensors[index].type for index in node.outputs)
        if outputs != declared:
            raise FormatError(
                f"{where}: outputs are declared as {', '.join(map(str, declared))}, "
                f"the operator gives {', '.join(map(str, outputs))}"
            )
        reason = operator.support(attributes, inputs)
        if reason is not None:
            raise FormatError(f"{where}: {reason}")
        for slot, index in enumerate(node.inputs):
            if index is None:
                continue
            tensor = graph.tensors[index]
            if slot in operator.constant_inputs and tensor.data is None:
                raise FormatError(f"{where}: input {slot} must be a constant")
            if tensor.dtype.packed and slot not in operator.constant_inputs:
                raise FormatError(f"{where}: input {slot} cannot be {tensor.dtype.value}")


def expect(condition: bool, message: str) -> None:
    """Raise OperatorError(message) unless ``condition``."""
    if not condition:
        raise OperatorError(message)


def grid(invocations: int, capabilities: Capabilities, local_size: int | None = None) -> tuple[int, int, int]:
    """Workgroup counts for a flat number of invocations, spread over x and y where x alone is too small.

    The kernel's flat id is ``(group.y * groups.x + group.x) * local_size + local`` and must be compared with
    the bound, since the product may exceed it.
    """
    groups = -(-invocations // (local_size or capabilities.local_size))
    limit = capabilities.max_workgroup_count[0]
    if groups <= limit:
        return (groups, 1, 1)
    rows = -(-groups // limit)
    return (-(-groups // rows), rows, 1)
