"""8w through PT2E: weights quantized to int8 per output channel, activations in floating point.

Quantizes an exported model with VulkanQuantizer, lowers it to Vulkan, writes ``pt2e_8bit.pte`` to the current
directory with its input and output (``pt2e_8bit_input.npy``, ``pt2e_8bit_output.npy``: run_without_torch.py takes
them), runs that file and compares with the eager quantized model.
"""

import numpy as np
import torch
from executorch.exir import to_edge_transform_and_lower
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import torchvk
from torchvk.partitioner.vulkan_partitioner import VulkanPartitioner
from torchvk.quantizer.vulkan_quantizer import VulkanQuantizer, get_symmetric_quantization_config


def error_bound(model: torch.nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """How far two float32 implementations may lie apart, from rounding alone.

    Each layer adds up K products in any order, which costs (K + 4) eps of the sum of magnitudes. These are taken
    from the float model and doubled, which is more than quantization to 8 bits can change them by.
    """
    error = torch.zeros_like(x)
    for layer in model:
        weight = 2 * layer.weight.abs()
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

    quantizer = VulkanQuantizer().set_global(get_symmetric_quantization_config(is_dynamic=False, weight_bits=8))
    with torch.no_grad():
        prepared = prepare_pt2e(torch.export.export(model, inputs).module(), quantizer)
        for _ in range(3):
            prepared(torch.randn(32, 128))  # calibrate with data like the real one
        quantized = convert_pt2e(prepared)
        eager, bound = quantized(*inputs), error_bound(model, *inputs)
        edge = to_edge_transform_and_lower(torch.export.export(quantized, inputs), partitioner=[VulkanPartitioner()])
    edge.to_executorch().save("pt2e_8bit.pte")

    with torchvk.load("pt2e_8bit.pte") as program:
        output = program(*inputs)
    np.save("pt2e_8bit_input.npy", inputs[0].numpy())
    np.save("pt2e_8bit_output.npy", output.numpy())

    error = (output - eager).abs()
    print(f"largest error against eager: {error.max():.3g}; allowed there: {bound.flatten()[error.argmax()]:.3g}")
    assert (error <= bound).all()


if __name__ == "__main__":
    main()
