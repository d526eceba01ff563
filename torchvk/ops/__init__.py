"""What an operator is: attributes, shape rule, support rule, NumPy reference, kernels. One file a family."""

# Importing a family registers its operators.
from torchvk.ops import attention as attention
from torchvk.ops import choose_qparams as choose_qparams
from torchvk.ops import conv as conv
from torchvk.ops import creation as creation
from torchvk.ops import elementwise as elementwise
from torchvk.ops import indexing as indexing
from torchvk.ops import linear as linear
from torchvk.ops import lookup as lookup
from torchvk.ops import movement as movement
from torchvk.ops import normalization as normalization
from torchvk.ops import pooling as pooling
from torchvk.ops import quantize as quantize
from torchvk.ops import quantized_arithmetic as quantized_arithmetic
from torchvk.ops import quantized_conv as quantized_conv
from torchvk.ops import quantized_embedding as quantized_embedding
from torchvk.ops import quantized_linear as quantized_linear
from torchvk.ops import quantized_pooling as quantized_pooling
from torchvk.ops import reduction as reduction
from torchvk.ops import upsampling as upsampling
from torchvk.ops.operator import (
    Arg,
    Array,
    Capabilities,
    CooperativeMatrixShape,
    Dispatch,
    Kernels,
    Layout,
    MatmulPrecision,
    NoAttributes,
    Operator,
    OperatorError,
    Variants,
    check,
    choose_kernels,
    get,
    operators,
    register,
    shape_class,
    supports,
)

__all__ = [
    "Arg",
    "Array",
    "Capabilities",
    "CooperativeMatrixShape",
    "Dispatch",
    "Kernels",
    "Layout",
    "MatmulPrecision",
    "NoAttributes",
    "Operator",
    "OperatorError",
    "Variants",
    "check",
    "choose_kernels",
    "get",
    "operators",
    "register",
    "shape_class",
    "supports",
]
