"""What a compute kernel's SPIR-V says of its interface: enough to hold dispatches against it."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from torchvk import shaders
from torchvk.ops import Capabilities, Dispatch

# Opcodes, decorations and storage classes by the SPIR-V specification's numbers.
OP_ENTRY_POINT, OP_CAPABILITY, OP_FUNCTION = 15, 17, 54
SHUFFLE = 65  # the capability GroupNonUniformShuffle
OP_TYPE_BOOL, OP_TYPE_INT, OP_TYPE_FLOAT, OP_TYPE_VECTOR, OP_TYPE_MATRIX = 20, 21, 22, 23, 24
OP_TYPE_ARRAY, OP_TYPE_RUNTIME_ARRAY, OP_TYPE_STRUCT, OP_TYPE_POINTER = 28, 29, 30, 32
OP_CONSTANT, OP_SPEC_TRUE, OP_SPEC_FALSE, OP_SPEC_CONSTANT = 43, 48, 49, 50
OP_VARIABLE, OP_DECORATE, OP_MEMBER_DECORATE = 59, 71, 72
SPEC_ID, ARRAY_STRIDE, NON_WRITABLE, BINDING, DESCRIPTOR_SET, OFFSET = 1, 6, 24, 33, 34, 35
UNIFORM_CONSTANT, WORKGROUP, PUSH_CONSTANT, STORAGE_BUFFER = 0, 4, 9, 12
GL_COMPUTE = 5


@dataclass
class Module:
    """entry_points: (execution model, name). buffers: binding → whether the kernel may write it.
    texels: the buffers that are texel buffers.
    sets: descriptor sets used. constants: SpecId → "int", "float" or "bool". push: bytes of the push-constant block.
    shared: bytes of shared memory of fixed size. functions: how many there are.
    """

    capabilities: set[int] = field(default_factory=set)
    entry_points: list[tuple[int, str]] = field(default_factory=list)
    buffers: dict[int, bool] = field(default_factory=dict)
    texels: set[int] = field(default_factory=set)
    sets: set[int] = field(default_factory=set)
    constants: dict[int, str] = field(default_factory=dict)
    push: int = 0
    shared: int = 0
    functions: int = 0


class Instruction(NamedTuple):
    opcode: int
    words: tuple[int, ...]


def instructions(code: bytes) -> list[Instruction]:
    words = struct.unpack(f"<{len(code) // 4}I", code)
    assert words[0] == 0x07230203, "not SPIR-V"
    found, position = [], 5
    while position < len(words):
        length = words[position] >> 16
        found.append(Instruction(words[position] & 0xFFFF, words[position + 1 : position + length]))
        position += length
    return found


@cache
def reflect(name: str) -> Module:
    """The interface of a kernel of the package."""
    module = Module()
    decorations: dict[tuple[int, int], int] = {}  # (id, decoration) → value
    members: dict[tuple[int, int], dict[int, int]] = {}  # (struct, member) → {decoration: value}
    types: dict[int, Instruction] = {}
    constants: dict[int, int] = {}
    variables: list[tuple[int, int, int]] = []  # pointer type, id, storage class
    spec: list[tuple[int, int]] = []  # type, id
    for opcode, words in instructions(shaders.load(name)):
        if opcode == OP_CAPABILITY:
            module.capabilities.add(words[0])
        elif opcode == OP_FUNCTION:
            module.functions += 1
        elif opcode == OP_ENTRY_POINT:
            raw = struct.pack(f"<{len(words) - 2}I", *words[2:])
            module.entry_points.append((words[0], raw[: raw.index(b"\0")].decode()))
        elif opcode == OP_DECORATE:
            decorations[words[0], words[1]] = words[2] if len(words) > 2 else 1
        elif opcode == OP_MEMBER_DECORATE:
            members.setdefault((words[0], words[1]), {})[words[2]] = words[3] if len(words) > 3 else 1
        elif OP_TYPE_BOOL <= opcode <= OP_TYPE_POINTER:
            types[words[0]] = Instruction(opcode, words[1:])
        elif opcode == OP_CONSTANT:
            constants[words[1]] = words[2]
        elif opcode in (OP_SPEC_TRUE, OP_SPEC_FALSE, OP_SPEC_CONSTANT):
            spec.append((words[0], words[1]))
        elif opcode == OP_VARIABLE:
            variables.append((words[0], words[1], words[2]))

    def size(type: int) -> int:
        opcode, words = types[type]
        if opcode in (OP_TYPE_INT, OP_TYPE_FLOAT):
            return words[0] // 8
        if opcode in (OP_TYPE_VECTOR, OP_TYPE_MATRIX):
            return size(words[0]) * words[1]
        if opcode == OP_TYPE_ARRAY:
            # Lengths that specialization makes are not known here.
            return (decorations.get((type, ARRAY_STRIDE)) or size(words[0])) * constants.get(words[1], 0)
        assert opcode == OP_TYPE_STRUCT, f"memory of an unexpected type ({opcode})"
        if (type, 0) not in members:  # shared memory has no layout
            return sum(map(size, words))
        return max((members[type, i][OFFSET] + size(member) for i, member in enumerate(words)), default=0)

    for pointer, variable, storage_class in variables:
        pointee = types[pointer].words[1]
        if storage_class == PUSH_CONSTANT:
            module.push = size(pointee)
        elif storage_class == WORKGROUP:
            module.shared += size(pointee)
        elif storage_class == STORAGE_BUFFER:
            count = len(types[pointee].words)
            read_only = (variable, NON_WRITABLE) in decorations or all(
                NON_WRITABLE in members.get((pointee, i), {}) for i in range(count)
            )
            module.buffers[decorations[variable, BINDING]] = not read_only
            module.sets.add(decorations[variable, DESCRIPTOR_SET])
        elif storage_class == UNIFORM_CONSTANT:
            module.buffers[decorations[variable, BINDING]] = False
            module.texels.add(decorations[variable, BINDING])
            module.sets.add(decorations[variable, DESCRIPTOR_SET])
    kinds = {OP_TYPE_BOOL: "bool", OP_TYPE_INT: "int", OP_TYPE_FLOAT: "float"}
    for type, constant in spec:
        if (constant, SPEC_ID) in decorations:
            module.constants[decorations[constant, SPEC_ID]] = kinds[types[type].opcode]
    return module


# What the tiers promise (see "tier" in the design notes of torchvk.ops.operator.Capabilities), as SPIR-V
# capabilities: Shader, SampledBuffer, GroupNonUniform, the packed dot product, VulkanMemoryModel are in every
# Vulkan 1.3 device.
TIER_CAPABILITIES = {
    0: {1, 46, 61, 6018, 6019, 5345},
    # + GroupNonUniformArithmetic, Float16, 16-bit access to storage (and uniform, which Slang asks for) buffers
    1: {63, 9, 4433, 4434},
    # + CooperativeMatrixKHR, VulkanMemoryModelDeviceScope, Int16, Int8, StorageBuffer8BitAccess
    2: {6022, 5346, 22, 39, 4448},
}


def contract_errors(dispatch: Dispatch, capabilities: Capabilities) -> list[str]:
    """Where a dispatch and the SPIR-V of its kernel contradict each other, in words."""
    module, errors = reflect(dispatch.kernel), []
    promised = set().union(*(TIER_CAPABILITIES[t] for t in range(capabilities.tier + 1)))
    if capabilities.shuffle:
        promised.add(SHUFFLE)
    if extra := module.capabilities - promised:
        errors.append(f"needs SPIR-V capabilities {sorted(extra)}, tier {capabilities.tier} does not promise them")
    for binding, writes in module.buffers.items():
        if binding >= len(dispatch.buffers):
            errors.append(f"binding {binding} is not bound")
        elif dispatch.buffers[binding].write != writes:
            declared = "written" if dispatch.buffers[binding].write else "read only"
            errors.append(f"binding {binding} is declared {declared}, the shader {'writes' if writes else 'reads'} it")
        elif dispatch.buffers[binding].texels != (binding in module.texels):
            errors.append(f"binding {binding}: one of dispatch and shader takes it for a texel buffer")
    if module.shared > capabilities.shared_memory:
        errors.append(f"takes {module.shared} bytes of shared memory, there are {capabilities.shared_memory}")
    if len(dispatch.push) < module.push:
        errors.append(f"{len(dispatch.push)} bytes of push constants, the shader takes {module.push}")
    for number, kind in module.constants.items():
        if number >= len(dispatch.constants):
            errors.append(f"specialization constant {number} is not given")
        elif (kind == "float") != isinstance(dispatch.constants[number], float):
            errors.append(f"specialization constant {number} is {dispatch.constants[number]!r}, the shader's is {kind}")
    return [f"kernel {dispatch.kernel!r}: {error}" for error in errors]
