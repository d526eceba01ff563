"""What the tests of quantized_linear share."""

from __future__ import annotations

from typing import Any

import numpy as np

from torchvk import ops
from torchvk.ops import Capabilities
from torchvk.ops.quantized_linear import QuantizedLinearAttributes

Array = np.ndarray[Any, Any]
OPERATOR = ops.get("quantized_linear")
DTYPES = (np.float32, np.float16)


def attributes(group_size: int, activation: str = "none", dtype: Any = np.float32, **more: Any) -> Any:
    """With torchao's default eps, as the lowering gives it."""
    return QuantizedLinearAttributes(
        **{"group_size": group_size, "activation": activation, "eps": float(np.finfo(dtype).tiny), **more}
    )


def capabilities(**changes: Any) -> Capabilities:
    usual: dict[str, Any] = {
        "tier": 1,
        "kind": "cpu",
        "subgroup_size": 8,
        "max_workgroup_invocations": 1024,
        "max_workgroup_size": (1024, 1024, 64),
        "max_workgroup_count": (65535, 65535, 65535),
        "shared_memory": 32768,
        "max_storage_range": 1 << 27,
        "shuffle": True,
        "max_texels": 1 << 27,
    }
    return Capabilities(**{**usual, **changes})
