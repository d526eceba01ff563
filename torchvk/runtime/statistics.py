"""What a driver's compiler says of a pipeline: registers, shared memory, spills, code size.

Through VK_KHR_pipeline_executable_properties, where the driver has it; the device must be opened with
TORCHVK_STATISTICS=1, since such pipelines may be slower to make. The names are the driver's.
"""

from __future__ import annotations

import os

from torchvk.errors import UnsupportedError
from torchvk.runtime import vulkan as vk
from torchvk.runtime.device import Device
from torchvk.runtime.pipeline import Pipeline, PipelineKey

FIELDS = {
    vk.VK_PIPELINE_EXECUTABLE_STATISTIC_FORMAT_BOOL32_KHR: "b32",
    vk.VK_PIPELINE_EXECUTABLE_STATISTIC_FORMAT_INT64_KHR: "i64",
    vk.VK_PIPELINE_EXECUTABLE_STATISTIC_FORMAT_UINT64_KHR: "u64",
    vk.VK_PIPELINE_EXECUTABLE_STATISTIC_FORMAT_FLOAT64_KHR: "f64",
}


def pipeline_statistics(device: Device, pipeline: Pipeline) -> dict[str, float]:
    """The driver's figures by their names; raises UnsupportedError unless the device was opened to keep them."""
    if not device.statistics:
        asked = os.environ.get("TORCHVK_STATISTICS") == "1"
        reason = "its driver keeps none" if asked else "set TORCHVK_STATISTICS=1 before the device is opened"
        raise UnsupportedError(f"no statistics of pipelines on {device.info.name!r}: {reason}")
    functions, handle = device.functions, device.handle
    query = vk.make("VkPipelineInfoKHR", pipeline=pipeline.handle)
    executables = vk.enumerate_all(
        functions.vkGetPipelineExecutablePropertiesKHR, "VkPipelineExecutablePropertiesKHR", handle, query
    )
    found: dict[str, float] = {}
    for index in range(len(executables)):
        info = vk.make("VkPipelineExecutableInfoKHR", pipeline=pipeline.handle, executableIndex=index)
        for entry in vk.enumerate_all(
            functions.vkGetPipelineExecutableStatisticsKHR, "VkPipelineExecutableStatisticKHR", handle, info
        ):
            found[vk.ffi.string(entry.name).decode(errors="replace")] = getattr(entry.value, FIELDS[entry.format])
    return found


def kernel_statistics(device: Device, key: PipelineKey) -> dict[str, float]:
    """The same for a kernel with its specialization constants; the pipeline is made if it is not there yet."""
    with device.lock:
        return pipeline_statistics(device, device.pipelines.get([key])[0])
