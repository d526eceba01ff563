"""torch's dtypes and tensors as the IR's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensor

from torchvk.graph import DType, TensorType
from torchvk.graph.validate import MAX_RANK
from torchvk.lowering.refusal import Refused

DTYPES = {
    torch.float32: DType.FLOAT32,
    torch.float16: DType.FLOAT16,
    torch.int64: DType.INT64,
    torch.int32: DType.INT32,
    torch.int16: DType.INT16,
    torch.int8: DType.INT8,
    torch.uint8: DType.UINT8,
    torch.bool: DType.BOOL,
}
TORCH_DTYPES = {ours: theirs for theirs, ours in DTYPES.items()}


def dtype_of(dtype: torch.dtype) -> DType:
    """The IR's dtype; raises :class:`Refused` for one that it does not have (float64, bfloat16, complex, …)."""
    try:
        return DTYPES[dtype]
    except KeyError:
        raise Refused(f"{str(dtype).removeprefix('torch.')} tensors are not supported") from None


def type_of(value: Any) -> TensorType:
    """dtype and shape of a tensor, real or fake; raises :class:`Refused` for what the IR cannot hold.

    Refused are values that are no tensors, symbolic sizes, unknown dtypes, ranks above 8 and strides that leave gaps
    or overlap. Every value of a delegate is row-major; what the program keeps in another order of dimensions
    (channels last) is put into its order, and back, where it enters and leaves.
    """
    if not isinstance(value, torch.Tensor):
        raise Refused(f"values of type {type(value).__name__} are not supported, only tensors are")
    if any(not isinstance(size, int) for size in value.shape):
        sizes = ", ".join(map(str, value.shape))
        raise Refused(f"its shape [{sizes}] is symbolic: only fixed shapes are supported")
    dtype = dtype_of(value.dtype)
    if value.layout != torch.strided:
        raise Refused(f"{value.layout} tensors are not supported")
    if value.dim() > MAX_RANK:
        raise Refused(f"tensors of rank {value.dim()} are not supported: at most {MAX_RANK}")
    if not value.permute(sorted(range(value.dim()), key=lambda dim: (-value.stride(dim), dim))).is_contiguous():
        raise Refused(f"strides {list(value.stride())} are not supported: only dense tensors are")
    return TensorType(dtype, tuple(value.shape))


def is_fake(tensor: torch.Tensor) -> bool:
    """True for a tensor without data."""
    return isinstance(tensor, FakeTensor) or tensor.device.type == "meta"


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The data of a real tensor; bfloat16 and float64, which the IR lacks, as float32."""
    tensor = tensor.detach()
    if tensor.dtype in (torch.bfloat16, torch.float64):
        tensor = tensor.to(torch.float32)
    array: np.ndarray[Any, Any] = tensor.cpu().contiguous().numpy()
    return array


def promote(*operands: TensorType | bool | int | float) -> DType:
    """The dtype in which torch computes with these operands; numbers are Python scalars.

    Rules: https://pytorch.org/docs/stable/tensor_attributes.html#type-promotion-doc (dtype categories; tensors with
    dimensions before 0-D tensors before scalars), asked of torch itself.
    """

    def example(operand: TensorType | bool | int | float) -> Any:
        if isinstance(operand, TensorType):
            return torch.empty((1,) if operand.shape else (), dtype=TORCH_DTYPES[operand.dtype], device="meta")
        return operand

    result = example(operands[0])
    for other in map(example, operands[1:]):
        dtype = torch.result_type(result, other)
        rank = max(e.dim() if isinstance(e, torch.Tensor) else 0 for e in (result, other))
        result = torch.empty((1,) * rank, dtype=dtype, device="meta")
    return dtype_of(result.dtype)
