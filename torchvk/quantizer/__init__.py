"""PT2E quantization for torchvk: which tensors of an exported model get which quantization.

:func:`get_symmetric_quantization_config` says how weights and activations are quantized, and has a table of what it
gives; :class:`VulkanQuantizer` says where, for the whole model or by module and operator. Use with ``prepare_pt2e`` or
``prepare_qat_pt2e`` and ``convert_pt2e`` of ``torchao.quantization.pt2e.quantize_pt2e``.

A file for each operator family finds its operators and annotates them (``linear``, ``conv``, ``embedding``,
``arithmetic``, ``elementwise``, ``pooling``, ``movement``, ``normalization``); ``vulkan_quantizer`` calls them in
order.
"""

from torchvk.quantizer.vulkan_quantizer import VulkanQuantizer, get_symmetric_quantization_config

__all__ = ["VulkanQuantizer", "get_symmetric_quantization_config"]
