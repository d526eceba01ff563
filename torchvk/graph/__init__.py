"""The IR: dataclasses, validation, bytes."""

from torchvk.graph.ir import ByteRange, DType, Graph, Node, Role, Tensor, TensorType, pack_int4, unpack_int4
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
    "pack_int4",
    "to_bytes",
    "unpack_int4",
]
