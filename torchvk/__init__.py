"""torchvk: quantize PyTorch models, lower them to Vulkan and run them on any GPU."""
