"""PT2E quantization for torchvk: which tensors of an exported model get which quantization.

==============================================  =========================  ==============================
configuration                                   weights                    activations
==============================================  =========================  ==============================
``get_symmetric_quantization_config()``         int8, symmetric, a scale   floating point
                                                per output channel
``(weight_bits=4)``                             int4 (-8…7), symmetric, a  floating point
                                                scale per output channel
``(is_dynamic=True)``                           int8, symmetric, a scale   int8, asymmetric, per tensor,
                                                per output channel         chosen at run time
``(is_dynamic=True, weight_bits=4)``            int4 (-8…7), symmetric, a  int8, asymmetric, per tensor,
                                                scale per output channel   chosen at run time
==============================================  =========================  ==============================

Use with ``torchao.quantization.pt2e.quantize_pt2e.prepare_pt2e`` and ``convert_pt2e``. Group-wise weights and
per-token activations come from ``torchao.quantization.quantize_`` and need no quantizer.
"""

from torchvk.quantizer.vulkan_quantizer import VulkanQuantizer, get_symmetric_quantization_config

__all__ = ["VulkanQuantizer", "get_symmetric_quantization_config"]
