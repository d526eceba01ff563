"""The IR: dataclasses, validation, bytes."""

from torchvk.graph.ir import ByteRange, DType, Graph, Node, Role, Tensor, TensorType, pack_bits, unpack_bits
from torchvk.graph.serialize import attributes_to_plain, from_bytes, to_bytes

__all__ = [
    "ByteRange",
    "DType",
    "Graph",
    "Node",
    "Role",
    "Tensor",
    "TensorType",
    "attributes_to_plain",
    "from_bytes",
    "pack_bits",
    "to_bytes",
    "unpack_bits",
]
