"""PyTorch's MiniLM: the architecture with random weights, as ``transformers`` runs it with ``attention="sdpa"``.

Written out, so that it can be timed where ``transformers`` is not installed; the kernels that it launches are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks.network import Peer, beside

LAYERS, WIDTH, HEADS, INNER, WORDS = 6, 384, 12, 1536, 30522


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.dense = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = torch.nn.Linear(WIDTH, INNER), torch.nn.Linear(INNER, WIDTH)
        self.first, self.second = (torch.nn.LayerNorm(WIDTH, eps=1e-12) for _ in range(2))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        heads = [
            layer(x).view(batch, tokens, HEADS, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        ]
        y = functional.scaled_dot_product_attention(*heads, attn_mask=mask)
        x = self.first(self.dense(y.transpose(1, 2).reshape(batch, tokens, WIDTH)) + x)
        return self.second(self.down(functional.gelu(self.up(x))) + x)


class Encoder(torch.nn.Module):
    """int64 [batch, tokens] ids and mask → [batch, 384], rows of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = torch.nn.Embedding(WORDS, WIDTH), torch.nn.Embedding(512, WIDTH)
        self.types, self.norm = torch.nn.Embedding(2, WIDTH), torch.nn.LayerNorm(WIDTH, eps=1e-12)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, tokens = ids.shape
        places = torch.arange(tokens, device=ids.device)
        x = self.norm(self.words(ids) + self.types(torch.zeros_like(ids)) + self.positions(places))
        attended = mask[:, None, None, :].bool().expand(batch, 1, tokens, tokens)
        for layer in self.layers:
            x = layer(x, attended)
        weight = mask[..., None].to(x.dtype)
        return functional.normalize((x * weight).sum(1) / weight.sum(1).clamp(min=1e-9), dim=1)


def peer(batch: int, tokens: int, mask: np.ndarray[Any, Any]) -> Peer:
    """float16 in a CUDA graph, else float32 on the CPU."""
    model = Encoder().eval()
    inputs = torch.randint(0, 1000, (batch, tokens)), torch.from_numpy(mask)

    def half() -> Callable[[], Any]:
        on_device = [x.cuda() for x in inputs]
        halved = model.half().cuda()
        return lambda: halved(*on_device)

    return beside(half, lambda: model(*inputs))
