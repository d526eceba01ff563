"""ExecuTorch's .pte files: bytes → frozen dataclasses, in one checked step.

The file is hostile until :func:`decode` returns. FlatBuffers' Python runtime checks every single read against the
buffer (``struct.unpack_from``, ``np.frombuffer``), so a wild offset is an exception and never a read outside;
what it does not stop are vectors that claim billions of elements and tables that are referred to again and again.
Those are stopped here: every element that is decoded is paid for from a budget in proportion to the file.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from torchvk.errors import FormatError, UnsupportedError
from torchvk.program.schema import program_generated as schema

IDENTIFIER = b"ET12"
EXTENDED_HEADER = b"eh00"
SCHEMA_VERSION = 0
MAX_RANK = 16
MAX_TENSOR_BYTES = 1 << 40

# ScalarType of schema/scalar_type.fbs → (name that torch and NumPy know it by, bytes)
DTYPES: Mapping[int, tuple[str, int]] = {
    0: ("uint8", 1),
    1: ("int8", 1),
    2: ("int16", 2),
    3: ("int32", 4),
    4: ("int64", 8),
    5: ("float16", 2),
    6: ("float32", 4),
    7: ("float64", 8),
    11: ("bool", 1),
    15: ("bfloat16", 2),
    23: ("float8_e5m2", 1),
    24: ("float8_e4m3fn", 1),
    25: ("float8_e5m2fnuz", 1),
    26: ("float8_e4m3fnuz", 1),
    27: ("uint16", 2),
    28: ("uint32", 4),
    29: ("uint64", 8),
}


@dataclass(frozen=True, slots=True)
class TensorValue:
    """A tensor of a method.

    ``shape`` is the upper bound if ``dynamic``. ``dim_order`` lists the dimensions from the outermost in memory to
    the innermost. ``constant``: its bytes, never written. ``allocation``: (buffer, byte offset) in the memory that
    was planned ahead; tensors whose memory overlaps are meant to (views are expressed that way). ``initial``: what
    a mutable tensor holds before the first call.
    """

    dtype: str
    itemsize: int
    shape: tuple[int, ...]
    dim_order: tuple[int, ...]
    dynamic: bool = False
    constant: memoryview | None = field(default=None, repr=False)
    allocation: tuple[int, int] | None = None
    initial: memoryview | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(f'≤{size}' if self.dynamic else str(size) for size in self.shape)}]"


@dataclass(frozen=True, slots=True)
class ListValue:
    """A list. Items of "int", "tensor" and "optional" lists are positions in the method's values (None: absent);
    "float" and "bool" lists hold the numbers themselves."""

    kind: Literal["int", "float", "bool", "tensor", "optional"]
    items: tuple[int | float | bool | None, ...]


Value = None | bool | int | float | str | TensorValue | ListValue


@dataclass(frozen=True, slots=True)
class KernelCall:
    operator: int
    arguments: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DelegateCall:
    delegate: int
    arguments: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MoveCall:
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class JumpFalseCall:
    condition: int
    destination: int


@dataclass(frozen=True, slots=True)
class FreeCall:
    value: int


Instruction = KernelCall | DelegateCall | MoveCall | JumpFalseCall | FreeCall


@dataclass(frozen=True, slots=True)
class Delegate:
    """A subgraph that another backend runs; ``data`` is a view into the file."""

    backend: str
    data: memoryview = field(repr=False)
    compile_specs: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """One method of the program. ``operators`` are names like ``aten::add.out``."""

    name: str
    values: tuple[Value, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    chains: tuple[tuple[Instruction, ...], ...]
    operators: tuple[str, ...]
    delegates: tuple[Delegate, ...]


@dataclass(frozen=True, slots=True)
class PteFile:
    """A whole .pte file. ``named_data`` are views into it."""

    plans: tuple[Plan, ...]
    named_data: Mapping[str, memoryview]
    size: int


def decode(view: memoryview) -> PteFile:
    """Decode and check a .pte file; raises :class:`FormatError` (or :class:`UnsupportedError`) with words that lack
    only the file's name. All data stay views into ``view``."""
    program_size, segments_begin = read_header(view)
    try:
        return _Decoder(view, program_size, segments_begin).file()
    except (struct.error, ValueError, TypeError, OverflowError, IndexError) as error:
        if isinstance(error, FormatError):
            raise
        # What the FlatBuffers runtime raises on an offset that leads outside or a string that is not UTF-8.
        raise FormatError(f"damaged .pte file: {error}") from None


def read_header(view: memoryview) -> tuple[int, int]:
    """Bytes of the FlatBuffers part and the offset of the first segment (0 if there are none)."""
    size = len(view)
    if size == 0:
        raise FormatError("the file is empty")
    identifier = bytes(view[4:8])
    if identifier != IDENTIFIER:
        if identifier[:2] == b"ET" and identifier[2:].isalnum():
            raise FormatError(
                f"an ExecuTorch program with file identifier {identifier.decode()!r}; this torchvk reads "
                f"{IDENTIFIER.decode()!r}: the file was written by another version of ExecuTorch"
            )
        if bytes(view[:8]) == b"TORCHVK\0":
            raise FormatError("a bare torchvk graph, not a .pte file")
        raise FormatError(f"not a .pte file: bytes 4 to 8 are {identifier!r}, not {IDENTIFIER!r}")
    if bytes(view[8:10]) != EXTENDED_HEADER[:2]:
        return size, 0
    if bytes(view[8:12]) != EXTENDED_HEADER:
        raise FormatError(f"extended header {bytes(view[8:12])!r}; this torchvk reads {EXTENDED_HEADER!r}")
    if size < 32:
        raise FormatError(f"truncated: {size} bytes, the extended header alone ends at byte 32")
    length, program_size, segments_begin = struct.unpack_from("<IQQ", view, 12)
    data_size = struct.unpack_from("<Q", view, 32)[0] if length >= 32 and size >= 40 else 0
    end = max(program_size, segments_begin + data_size)
    if end > size:
        raise FormatError(f"truncated: the header says {end} bytes, the file has {size}")
    if length < 24 or program_size < 8 + length or (segments_begin and segments_begin < program_size):
        raise FormatError(
            f"damaged extended header: length {length}, program size {program_size}, segments at {segments_begin}"
        )
    return program_size, segments_begin


T = TypeVar("T")


class _Decoder:
    def __init__(self, view: memoryview, program_size: int, segments_begin: int) -> None:
        self.file_view = view
        self.program_view = view[:program_size]
        self.segments_begin = segments_begin
        self.budget = 4 * program_size + 1024

    def spend(self, size: int) -> None:
        self.budget -= size
        if self.budget < 0:
            raise FormatError("damaged .pte file: it describes more than its bytes can hold")

    # The readers of vectors take the generated accessors, bound: `length()` and `item(j)`, or `array()`.

    def each(self, length: Callable[[], int], item: Callable[[int], T | None], cost: int = 16) -> list[T]:
        """A vector of tables (16 bytes: an offset and the smallest table that holds anything)."""
        count = length()
        self.spend(count * cost)
        items = [item(position) for position in range(count)]
        return [value for value in items if value is not None]

    def numbers(self, length: Callable[[], int], array: Callable[[], Any]) -> list[Any]:
        """A vector of numbers."""
        count = length()
        if count == 0:
            return []
        values = array()
        self.spend(values.nbytes)
        return list(values.tolist())

    def text(self, raw: bytes | None) -> str:
        raw = raw or b""
        self.spend(len(raw))
        return raw.decode()

    def data(self, length: Callable[[], int], array: Callable[[], Any]) -> memoryview:
        """A vector of bytes, as a view."""
        return memoryview(array()) if length() else memoryview(b"")

    def union(self, kind: type[T], table: Any) -> T:
        if table is None:
            raise FormatError(f"damaged .pte file: a {kind.__name__} without its content")
        value: Any = kind()
        value.Init(table.Bytes, table.Pos)
        result: T = value
        return result

    def file(self) -> PteFile:
        root = int.from_bytes(self.program_view[:4], "little")
        program: Any = schema.Program()
        program.Init(self.program_view, root)
        if program.Version() != SCHEMA_VERSION:
            raise FormatError(
                f"schema version {program.Version()}; this torchvk reads version {SCHEMA_VERSION}: "
                "the file was written by a newer ExecuTorch"
            )
        self.segments = [
            self.segment(item.Offset(), item.Size()) for item in self.each(program.SegmentsLength, program.Segments)
        ]
        self.inline_constants = [
            self.data(item.StorageLength, item.StorageAsNumpy)
            for item in self.each(program.ConstantBufferLength, program.ConstantBuffer)
        ]
        self.constant_segment = self.subsegments(program.ConstantSegment())
        self.mutable_segments = [
            self.subsegments(item) for item in self.each(program.MutableDataSegmentsLength, program.MutableDataSegments)
        ]
        self.inline_delegates = [
            self.data(item.DataLength, item.DataAsNumpy)
            for item in self.each(program.BackendDelegateDataLength, program.BackendDelegateData)
        ]
        named = {
            self.text(item.Key()): self.pick(self.segments, item.SegmentIndex(), "segment")
            for item in self.each(program.NamedDataLength, program.NamedData)
        }
        plans = tuple(self.plan(item) for item in self.each(program.ExecutionPlanLength, program.ExecutionPlan))
        if len({plan.name for plan in plans}) != len(plans):
            raise FormatError("damaged .pte file: two methods have the same name")
        return PteFile(plans, named, len(self.file_view))

    def segment(self, offset: int, size: int) -> memoryview:
        if size == 0:
            return memoryview(b"")
        begin = self.segments_begin + offset
        if not self.segments_begin or begin + size > len(self.file_view):
            raise FormatError(
                f"truncated: a segment of {size} bytes at byte {begin} in a file of {len(self.file_view)} bytes"
            )
        return self.file_view[begin : begin + size]

    def subsegments(self, table: Any) -> tuple[memoryview, list[int]]:
        """A segment and the offsets of the tensors inside."""
        if table is None:
            return memoryview(b""), []
        offsets = self.numbers(table.OffsetsLength, table.OffsetsAsNumpy)
        if not offsets:
            return memoryview(b""), []
        return self.pick(self.segments, table.SegmentIndex(), "segment"), offsets

    def pick(self, items: list[T], index: int, what: str) -> T:
        if not 0 <= index < len(items):
            raise FormatError(f"damaged .pte file: it names {what} {index} of {len(items)}")
        return items[index]

    def plan(self, table: Any) -> Plan:
        name = self.text(table.Name())
        values = tuple(self.value(item) for item in self.each(table.ValuesLength, table.Values))
        operators = tuple(self.operator(item) for item in self.each(table.OperatorsLength, table.Operators))
        delegates = tuple(self.delegate(item) for item in self.each(table.DelegatesLength, table.Delegates))
        chains = tuple(
            tuple(self.instruction(item) for item in self.each(chain.InstructionsLength, chain.Instructions))
            for chain in self.each(table.ChainsLength, table.Chains)
        )
        inputs = tuple(self.numbers(table.InputsLength, table.InputsAsNumpy))
        outputs = tuple(self.numbers(table.OutputsLength, table.OutputsAsNumpy))
        plan = Plan(name, values, inputs, outputs, chains, operators, delegates)
        check_indices(plan)
        return plan

    def operator(self, table: Any) -> str:
        name, overload = self.text(table.Name()), self.text(table.Overload())
        return f"{name}.{overload}" if overload else name

    def delegate(self, table: Any) -> Delegate:
        reference = table.Processed()
        if reference is None:
            raise FormatError("damaged .pte file: a delegate without data")
        index = reference.Index()
        if reference.Location() == schema.DataLocation.SEGMENT:
            data = self.pick(self.segments, index, "segment")
        else:
            data = self.pick(self.inline_delegates, index, "inline delegate")
        specs = {
            self.text(item.Key()): bytes(self.numbers(item.ValueLength, item.ValueAsNumpy))
            for item in self.each(table.CompileSpecsLength, table.CompileSpecs)
        }
        return Delegate(self.text(table.Id()), data, specs)

    def instruction(self, table: Any) -> Instruction:
        kind, content = table.InstrArgsType(), table.InstrArgs()
        kinds = schema.InstructionArguments
        if kind == kinds.KernelCall:
            kernel: Any = self.union(schema.KernelCall, content)
            return KernelCall(kernel.OpIndex(), tuple(self.numbers(kernel.ArgsLength, kernel.ArgsAsNumpy)))
        if kind == kinds.DelegateCall:
            call: Any = self.union(schema.DelegateCall, content)
            return DelegateCall(call.DelegateIndex(), tuple(self.numbers(call.ArgsLength, call.ArgsAsNumpy)))
        if kind == kinds.MoveCall:
            move: Any = self.union(schema.MoveCall, content)
            return MoveCall(move.MoveFrom(), move.MoveTo())
        if kind == kinds.JumpFalseCall:
            jump: Any = self.union(schema.JumpFalseCall, content)
            return JumpFalseCall(jump.CondValueIndex(), jump.DestinationInstruction())
        if kind == kinds.FreeCall:
            free: Any = self.union(schema.FreeCall, content)
            return FreeCall(free.ValueIndex())
        raise FormatError(f"unknown kind of instruction {kind}: the file is damaged or of a newer version")

    def value(self, table: Any) -> Value:
        kind, content = table.ValType(), table.Val()
        kinds = schema.KernelTypes
        if kind in (kinds.Null, kinds.NONE):
            return None
        if kind == kinds.Tensor:
            return self.tensor(self.union(schema.Tensor, content))
        if kind in _SCALARS:
            scalar_kind, accessor = _SCALARS[kind]
            scalar: bool | int | float = getattr(self.union(scalar_kind, content), accessor)()
            return scalar
        if kind == kinds.String:
            string: Any = self.union(schema.String, content)
            return self.text(string.StringVal())
        if kind in _LISTS:
            list_kind, list_name = _LISTS[kind]
            items: Any = self.union(list_kind, content)
            numbers: list[Any] = self.numbers(items.ItemsLength, items.ItemsAsNumpy)
            if list_name == "optional":
                numbers = [None if number == -1 else number for number in numbers]
            return ListValue(list_name, tuple(numbers))
        raise FormatError(f"unknown kind of value {kind}: the file is damaged or of a newer version")

    def tensor(self, table: Any) -> TensorValue:
        scalar_type = table.ScalarType()
        if scalar_type not in DTYPES:
            raise FormatError(f"unknown scalar type {scalar_type}: the file is damaged or of a newer version")
        dtype, itemsize = DTYPES[scalar_type]
        shape = tuple(self.numbers(table.SizesLength, table.SizesAsNumpy))
        order = tuple(self.numbers(table.DimOrderLength, table.DimOrderAsNumpy)) or tuple(range(len(shape)))
        if len(shape) > MAX_RANK or any(size < 0 for size in shape) or sorted(order) != list(range(len(shape))):
            raise FormatError(f"damaged .pte file: a tensor of shape {list(shape)}, dimension order {list(order)}")
        # A size of 0 must not hide an overflow of the others.
        if math.prod(max(size, 1) for size in shape) * itemsize > MAX_TENSOR_BYTES:
            raise FormatError(f"damaged .pte file: a tensor of shape {list(shape)} is too large")
        if table.StorageOffset() != 0:
            raise FormatError(f"damaged .pte file: a tensor has storage offset {table.StorageOffset()}")
        extra = table.ExtraTensorInfo()
        if extra is not None and extra.Location() == schema.TensorDataLocation.EXTERNAL:
            raise UnsupportedError(
                f"tensor {self.text(extra.FullyQualifiedName())!r} is stored in another file (.ptd); "
                "torchvk reads programs that hold all their data"
            )
        dynamic = table.ShapeDynamism() != schema.TensorShapeDynamism.STATIC
        nbytes = math.prod(shape) * itemsize
        index, details = table.DataBufferIdx(), table.AllocationInfo()
        constant = initial = allocation = None
        if details is not None:
            offset = details.MemoryOffsetLow() | details.MemoryOffsetHigh() << 32
            if offset % itemsize:
                raise FormatError(f"damaged .pte file: a {dtype} tensor at the misaligned memory offset {offset}")
            allocation = (details.MemoryId(), offset)
            if index:
                source = extra.MutableDataSegmentsIdx() if extra is not None else 0
                initial = self.tensor_data(self.pick(self.mutable_segments, source, "mutable segment"), index, nbytes)
        elif index:
            if self.inline_constants:
                constant = self.pick(self.inline_constants, index, "constant")[:nbytes]
            else:
                constant = self.tensor_data(self.constant_segment, index, nbytes)
            if len(constant) != nbytes:
                raise FormatError(f"damaged .pte file: a constant of {nbytes} bytes has {len(constant)} in the file")
        return TensorValue(dtype, itemsize, shape, order, dynamic, constant, allocation, initial)

    def tensor_data(self, source: tuple[memoryview, list[int]], index: int, nbytes: int) -> memoryview:
        segment, offsets = source
        begin = self.pick(offsets, index, "constant")
        if begin + nbytes > len(segment):
            raise FormatError(f"damaged .pte file: constant {index} ends outside its segment")
        return segment[begin : begin + nbytes]


_SCALARS: Mapping[int, tuple[type, str]] = {
    schema.KernelTypes.Int: (schema.Int, "IntVal"),
    schema.KernelTypes.Bool: (schema.Bool, "BoolVal"),
    schema.KernelTypes.Double: (schema.Double, "DoubleVal"),
}
_LISTS: Mapping[int, tuple[type, Literal["int", "float", "bool", "tensor", "optional"]]] = {
    schema.KernelTypes.IntList: (schema.IntList, "int"),
    schema.KernelTypes.DoubleList: (schema.DoubleList, "float"),
    schema.KernelTypes.BoolList: (schema.BoolList, "bool"),
    schema.KernelTypes.TensorList: (schema.TensorList, "tensor"),
    schema.KernelTypes.OptionalTensorList: (schema.OptionalTensorList, "optional"),
}


def check_indices(plan: Plan) -> None:
    """Raise :class:`FormatError` unless every index in ``plan`` is in range and of a fitting kind."""

    def check(index: int, count: int, what: str) -> None:
        if not 0 <= index < count:
            raise FormatError(f"damaged .pte file: method {plan.name!r} names {what} {index} of {count}")

    count = len(plan.values)
    for index in (*plan.inputs, *plan.outputs):
        check(index, count, "value")
    for value in plan.values:
        if not isinstance(value, ListValue) or value.kind in ("float", "bool"):
            continue
        for item in value.items:
            if item is None:
                continue
            index = int(item)
            check(index, count, "value")
            found = plan.values[index]
            fits = isinstance(found, int) if value.kind == "int" else isinstance(found, TensorValue)
            if not fits and not (value.kind == "optional" and found is None):
                raise FormatError(f"damaged .pte file: a list of {value.kind}s has {type(found).__name__} inside")
    for chain in plan.chains:
        for step in chain:
            if isinstance(step, KernelCall):
                check(step.operator, len(plan.operators), "operator")
                indices = step.arguments
            elif isinstance(step, DelegateCall):
                check(step.delegate, len(plan.delegates), "delegate")
                indices = step.arguments
            elif isinstance(step, MoveCall):
                indices = (step.source, step.target)
            elif isinstance(step, JumpFalseCall):
                check(step.destination, len(chain) + 1, "instruction")
                indices = (step.condition,)
            else:
                indices = (step.value,)
            for index in indices:
                check(index, count, "value")
