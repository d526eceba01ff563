"""4w: weights quantized to int4 in groups of 32, activations in floating point.

Quantizes a model with torchao, lowers it to Vulkan, writes ``int4_weight_only.pte`` to the current directory, runs
that file and compares with the eager quantized model.
"""

import torch
from executorch.exir import to_edge_transform_and_lower
from torchao.quantization.granularity import PerGroup
from torchao.quantization.quant_api import IntxWeightOnlyConfig, quantize_
from torchao.utils import unwrap_tensor_subclass

import torchvk
from torchvk.partitioner.vulkan_partitioner import VulkanPartitioner


def error_bound(model: torch.nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """How far two float32 implementations may lie apart, from rounding alone.

    Each layer adds up K products in any order, which costs (K + 4) eps of the sum of magnitudes.
    """
    error = torch.zeros_like(x)
    for layer in model:
        weight = layer.weight.dequantize().abs()
        rounding = (weight.shape[1] + 4) * torch.finfo(torch.float32).eps * (x.abs() @ weight.T)
        error = error @ weight.T + rounding
        x = layer(x)
    return error


def main() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(128, 64, bias=False), torch.nn.Linear(64, 32, bias=False), torch.nn.Linear(32, 16, bias=False)
    ).eval()
    inputs = (torch.randn(32, 128),)

    with torch.no_grad():
        quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
        eager, bound = model(*inputs), error_bound(model, *inputs)
        unwrap_tensor_subclass(model)
        edge = to_edge_transform_and_lower(torch.export.export(model, inputs), partitioner=[VulkanPartitioner()])
    edge.to_executorch().save("int4_weight_only.pte")

    with torchvk.load("int4_weight_only.pte") as program:
        output = program(*inputs)

    error = (output - eager).abs()
    print(f"largest error against eager: {error.max():.3g}; allowed there: {bound.flatten()[error.argmax()]:.3g}")
    assert (error <= bound).all()


if __name__ == "__main__":
    main()
