"""Which nodes go to the GPU, and in words why the others do not."""

from torchvk.partitioner.report import Refusal
from torchvk.partitioner.vulkan_partitioner import VulkanPartitioner

__all__ = ["Refusal", "VulkanPartitioner"]
