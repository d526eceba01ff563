"""Dynamic quantization through PT2E: int8 activations per tensor at run time, 8- or 4-bit weights per channel.

    python pt2e_dynamic.py        # 8-bit weights
    python pt2e_dynamic.py 4      # 4-bit weights

Quantizes an exported model with VulkanQuantizer, all layers but the last (a filter function leaves it in floating
point), lowers it to Vulkan, writes ``pt2e_dynamic.pte`` to the current directory, runs that file and compares with
the eager quantized model.
"""

import sys

import torch
from executorch.exir import to_edge_transform_and_lower
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import torchvk
from torchvk.partitioner.vulkan_partitioner import VulkanPartitioner
from torchvk.quantizer.vulkan_quantizer import VulkanQuantizer, get_symmetric_quantization_config


def error_bound(model: torch.nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """How far two exact implementations may lie apart, from float32 rounding alone.

    Each layer adds up K products in any order, which costs (K + 4) eps of the sum of magnitudes. An activation
    close to the middle between two int8 steps may round to either: one such activation a token is allowed for.
    Magnitudes are taken from the float model and doubled, which is more than quantization can change them by.
    """
    error = torch.zeros_like(x)
    for layer in model:
        weight = 2 * layer.weight.abs()
        step = (x.max().clamp(min=0) - x.min().clamp(max=0)) / 255
        rounding = (weight.shape[1] + 4) * torch.finfo(torch.float32).eps * (x.abs() @ weight.T)
        error = error @ weight.T + step * weight.max() + rounding
        x = layer(x)
    return error


def is_not_last(node: torch.fx.Node) -> bool:
    weight = node.args[1]
    return weight.target != "2.weight"


def main(weight_bits: int) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(64, 32), torch.nn.Linear(32, 16)).eval()
    inputs = (torch.randn(32, 128),)

    quantizer = VulkanQuantizer().set_filter_function(is_not_last)
    quantizer.set_global(get_symmetric_quantization_config(is_dynamic=True, weight_bits=weight_bits))
    with torch.no_grad():
        prepared = prepare_pt2e(torch.export.export(model, inputs).module(), quantizer)
        prepared(*inputs)
        quantized = convert_pt2e(prepared)
        eager, bound = quantized(*inputs), error_bound(model, *inputs)
        edge = to_edge_transform_and_lower(torch.export.export(quantized, inputs), partitioner=[VulkanPartitioner()])
    edge.to_executorch().save("pt2e_dynamic.pte")

    with torchvk.load("pt2e_dynamic.pte") as program:
        output = program(*inputs)

    error = (output - eager).abs()
    print(f"largest error against eager: {error.max():.3g}; allowed there: {bound.flatten()[error.argmax()]:.3g}")
    assert (error <= bound).all()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8)
