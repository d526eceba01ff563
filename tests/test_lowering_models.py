"""Small transformers with random weights, as ``transformers`` exports them: each is one delegate.

MiniLM with its published weights is in test_minilm.py, on the device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
)

from tests.edge import assert_same

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}


class Encoder(torch.nn.Module):
    def __init__(self, model: Any, **arguments: Any) -> None:
        super().__init__()
        self.model, self.arguments = model.eval(), arguments

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.model(input_ids=ids, attention_mask=mask, **self.arguments).last_hidden_state
        return hidden


def bert(attention: str) -> Encoder:
    return Encoder(BertModel(BertConfig(**SIZES, attn_implementation=attention)))


def llama() -> Encoder:
    config = LlamaConfig(**SIZES, num_key_value_heads=2, attn_implementation="sdpa")
    return Encoder(LlamaModel(config), use_cache=False)


def gpt2() -> Encoder:
    config = GPT2Config(
        vocab_size=100,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    return Encoder(GPT2Model(config), use_cache=False)


def t5() -> Encoder:
    return Encoder(T5EncoderModel(T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)))


# linears and attentions that must come out; float16 results are compared to a few roundings of 11 bits
MODELS = {
    "bert, eager": (lambda: bert("eager"), 12, 2, 1e-5, {}),
    "bert, sdpa": (lambda: bert("sdpa"), 12, 2, 1e-5, {}),
    "bert, float16": (lambda: bert("sdpa").half(), 12, 2, 2**-7, {}),
    "bert, force_fp16": (lambda: bert("eager"), 12, 2, 2**-7, {"compile_options": {"force_fp16": True}}),
    "roberta": (lambda: Encoder(RobertaModel(RobertaConfig(**SIZES))), 12, 2, 1e-5, {}),
    "gpt2": (gpt2, 8, 2, 1e-5, {}),
    "llama": (llama, 14, 2, 1e-5, {}),
    "t5": (t5, 12, 2, 1e-5, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_whole_model_is_one_delegate(name: str) -> None:
    make, linears, attentions, tolerance, options = MODELS[name]
    torch.manual_seed(0)
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[1, 6:] = 0
    lowered = assert_same(make(), (torch.randint(0, 90, (2, 10)), mask), tolerance, **options)
    operators = lowered.operators()
    # Every weight is read as it is stored, with its bias in the same operator.
    assert (operators["linear"], operators["attention"], operators["matmul"]) == (linears, attentions, 0)
