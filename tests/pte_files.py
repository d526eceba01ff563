"""Makes .pte files for tests with ExecuTorch's own writer, from its own schema classes: any program, also such that
exir would never emit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from executorch.exir import schema
from executorch.exir._serialize._program import PTEFile, serialize_pte_binary
from executorch.exir.scalar_type import ScalarType

from torchvk.graph import DType, Graph, TensorType, to_bytes
from torchvk.graph.build import GraphBuilder

BACKEND = "TorchVkBackend"

SCALAR_TYPES = {
    "float32": ScalarType.FLOAT,
    "float16": ScalarType.HALF,
    "float64": ScalarType.DOUBLE,
    "bfloat16": ScalarType.BFLOAT16,
    "int64": ScalarType.LONG,
    "int32": ScalarType.INT,
    "int16": ScalarType.SHORT,
    "int8": ScalarType.CHAR,
    "uint8": ScalarType.BYTE,
    "bool": ScalarType.BOOL,
}


def tensor(
    shape: Sequence[int],
    dtype: str = "float32",
    *,
    place: int | None = None,
    constant: int = 0,
    dynamic: bool = False,
    order: Sequence[int] | None = None,
) -> schema.Tensor:
    """A tensor value; ``place``: byte offset in memory 1; ``constant``: position in the constants, from 1."""
    return schema.Tensor(
        scalar_type=SCALAR_TYPES[dtype],
        storage_offset=0,
        sizes=list(shape),
        dim_order=list(range(len(shape)) if order is None else order),
        requires_grad=False,
        layout=0,
        data_buffer_idx=constant,
        allocation_info=None if place is None else schema.AllocationDetails(1, place, 0),
        shape_dynamism=schema.TensorShapeDynamism.DYNAMIC_BOUND if dynamic else schema.TensorShapeDynamism.STATIC,
    )


@dataclass
class Plan:
    """A method. ``values`` are schema classes; ints, floats, bools, strings and None are wrapped."""

    values: Sequence[Any]
    inputs: Sequence[int]
    outputs: Sequence[int]
    instructions: Sequence[Any] = ()
    operators: Sequence[tuple[str, str]] = ()
    delegates: Sequence[tuple[str, bytes]] = ()
    name: str = "forward"


def call(operator: int, *arguments: int) -> schema.KernelCall:
    return schema.KernelCall(operator, list(arguments))


def delegate_call(delegate: int, *arguments: int) -> schema.DelegateCall:
    return schema.DelegateCall(delegate, list(arguments))


def write(*plans: Plan, constants: Sequence[bytes] = (), segments: bool = True, version: int = 0) -> bytes:
    """The bytes of a .pte file. ``segments``: delegates behind the FlatBuffers part, as exir does by default."""
    blobs: list[bytes] = []
    written = []
    for plan in plans:
        delegates = []
        for backend, blob in plan.delegates:
            if blob not in blobs:
                blobs.append(blob)
            reference = schema.BackendDelegateDataReference(schema.DataLocation.INLINE, blobs.index(blob))
            delegates.append(schema.BackendDelegate(backend, reference, []))
        written.append(
            schema.ExecutionPlan(
                name=plan.name,
                container_meta_type=schema.ContainerMetadata("", ""),
                values=[schema.EValue(_wrap(value)) for value in plan.values],
                inputs=list(plan.inputs),
                outputs=list(plan.outputs),
                chains=[schema.Chain([], [], [schema.Instruction(step) for step in plan.instructions], None)],
                operators=[schema.Operator(name, overload) for name, overload in plan.operators],
                delegates=delegates,
                non_const_buffer_sizes=[0, 1 << 20],
            )
        )
    program = schema.Program(
        version=version,
        execution_plan=written,
        constant_buffer=[schema.Buffer(b""), *map(schema.Buffer, constants)],
        backend_delegate_data=[schema.BackendDelegateInlineData(blob) for blob in blobs],
        segments=[],
        constant_segment=schema.SubsegmentOffsets(0, []),
        mutable_data_segments=None,
        named_data=[],
    )
    return bytes(serialize_pte_binary(PTEFile(program), extract_delegate_segments=segments))


def _wrap(value: Any) -> Any:
    if value is None:
        return schema.Null()
    wrappers = {bool: schema.Bool, int: schema.Int, float: schema.Double, str: schema.String}
    return wrappers[type(value)](value) if type(value) in wrappers else value


@dataclass
class Arguments:
    """The types of a delegate's inputs and outputs, by name."""

    inputs: dict[str, TensorType] = field(default_factory=dict)
    outputs: dict[str, TensorType] = field(default_factory=dict)


def delegate_file(graph: Graph, *, segments: bool = True, name: str = "forward") -> bytes:
    """A program of one method that is one delegate, which is ``graph``."""
    return write(delegate_plan(graph, name), segments=segments)


def delegate_plan(graph: Graph, name: str = "forward") -> Plan:
    types = [graph.tensors[index].type for index in (*graph.inputs, *graph.outputs)]
    values, place = [], 0
    for type in types:
        values.append(tensor(type.shape, type.dtype.value, place=place))
        place += -(-type.nbytes // 16) * 16
    count = len(graph.inputs)
    return Plan(
        values,
        range(count),
        range(count, len(types)),
        [delegate_call(0, *range(len(types)))],
        delegates=[(BACKEND, to_bytes(graph))],
        name=name,
    )


def affine_graph(shape: tuple[int, ...] = (2, 3), dtype: DType = DType.FLOAT32, *, scale: float = 2.0) -> Graph:
    """x, y → (x · scale + y, x − y)."""
    builder = GraphBuilder()
    type = TensorType(dtype, shape)
    x, y = builder.input("x", type), builder.input("y", type)
    constant = builder.constant("scale", np.array(scale, dtype.numpy))
    (scaled,) = builder.node("mul", [x, constant], [type], name="scaled", source="layers.0")
    (total,) = builder.node("add", [scaled, y], [type], name="total", source="layers.1")
    (difference,) = builder.node("sub", [x, y], [type], name="difference", source="layers.1")
    return builder.build([total, difference])
