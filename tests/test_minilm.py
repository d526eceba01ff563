"""A whole published model on the device: the MiniLM sentence encoder in every documented scheme.

One process lowers each variant once; the tests of one variant share it. exir takes most of the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from executorch.exir import to_edge_transform_and_lower

import torchvk
from examples.sentence_encoder import SCHEMES, SENTENCES, SentenceEncoder, load_encoder, quantize, tokenize
from torchvk.partitioner.vulkan_partitioner import VulkanPartitioner

TOKENS = 12  # some sentences are longer and truncated, others shorter and padded
TEXTS = SENTENCES[:12]
LINEARS = 6  # query, key, value, attention output, intermediate, output in each layer

# How far apart two embeddings (of length 1) of one sentence may lie. The eager modules say: when the weights of the
# first layer normalization change by one float32 rounding each, embeddings move by up to 7e-7 in floating point, and
# there are about a hundred operators to round in, which add up at random to ten times that. With dynamic int8
# activations such a rounding moves a value over the middle between two steps in about every second sentence: that
# moves its embedding by up to 0.046, and two such moves may come together. The other sentences stay where they are.
TIGHT = 1e-5
TOLERANCE = {"fp32": TIGHT, "4w": TIGHT, "8w": TIGHT, "8da4w": 0.092}
# Of the eager quantized modules to the float32 model on these sentences: 0.954, 0.957 and 0.9996.
SMALLEST_COSINE = {"fp32": 0.999999, "4w": 0.95, "8w": 0.999, "8da4w": 0.94}

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Variant:
    """``by_eager`` is what the eager quantized module gives, ``by_float`` what the float32 model gives."""

    scheme: str
    path: Path
    report: Any
    encoder: SentenceEncoder
    inputs: tuple[torch.Tensor, torch.Tensor]
    by_eager: Array
    by_float: Array
    program: torchvk.Program

    def run(self, *inputs: torch.Tensor) -> Array:
        output = self.program(*(tensor.numpy() for tensor in inputs or self.inputs))
        assert isinstance(output, np.ndarray)
        assert output.shape == (len(TEXTS), 384)
        assert output.dtype == np.float32
        return output


# Scheme, kind of attention, layers. All layers look alike, and exir needs about two seconds for each: where another
# variant has the whole of the same, two do, or one. The variants of one kind of attention share a process.
VARIANTS = [
    pytest.param(variant, id="{}-{}-{}".format(*variant), marks=pytest.mark.xdist_group(f"minilm-{variant[1]}"))
    for variant in [
        *((scheme, "sdpa", 6 if scheme in ("fp32", "8da4w") else 2) for scheme in SCHEMES),
        *((scheme, "eager", 1) for scheme in ("fp32", "8da4w")),
    ]
]


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Variant]:
    scheme, attention, layers = request.param
    inputs = tokenize(TEXTS, TOKENS)
    encoder = load_encoder(attention)
    encoder.bert.encoder.layer = encoder.bert.encoder.layer[:layers]
    partitioner = VulkanPartitioner()
    with torch.no_grad():
        module = quantize(encoder, scheme, inputs)
        by_eager, by_float = module(*inputs).numpy(), encoder(*inputs).numpy()
        edge = to_edge_transform_and_lower(torch.export.export(module, inputs), partitioner=[partitioner])
    path = tmp_path_factory.mktemp("minilm") / "model.pte"
    edge.to_executorch().save(str(path))
    with torchvk.load(path) as program:
        yield Variant(scheme, path, partitioner.report, encoder, inputs, by_eager, by_float, program)


def cosines(a: Array, b: Array) -> Array:
    return (a.astype(np.float64) * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def distances(a: Array, b: Array) -> Array:
    return np.linalg.norm(a.astype(np.float64) - b, axis=1)


def assert_same_embeddings(scheme: str, a: Array, b: Array) -> None:
    assert distances(a, b).max() <= TOLERANCE[scheme], distances(a, b)
    assert distances(a, b).min() <= TIGHT, distances(a, b)


def test_one_delegate_nothing_on_the_cpu(variant: Variant) -> None:
    assert not variant.report
    (method,) = variant.program.describe().methods
    (delegate,) = method.delegates
    assert delegate.backend == "TorchVkBackend"
    assert not method.cpu_operators
    is_quantized, linears = variant.scheme != "fp32", LINEARS * len(variant.encoder.bert.encoder.layer)
    assert delegate.operators.get("quantized_linear", 0) == (linears if is_quantized else 0)
    assert delegate.operators.get("linear", 0) == (0 if is_quantized else linears)


def test_weights_stay_packed(variant: Variant) -> None:
    """Half a byte or a byte a quantized weight, four bytes a scale, four bytes anything else."""
    bert = variant.encoder.bert
    linears = [module for module in bert.modules() if isinstance(module, torch.nn.Linear)]
    linears.remove(bert.pooler.dense)  # its output is not used
    weights = sum(linear.weight.numel() for linear in linears)
    rows = sum(linear.out_features for linear in linears)
    folded = ("pooler", "position_embeddings", "token_type_embeddings")  # their sum at these positions is a constant
    others = sum(p.numel() for name, p in bert.named_parameters() if not any(part in name for part in folded)) - weights
    expected = (
        4 * others
        + {
            "fp32": 4 * weights,
            "8w": weights + 4 * rows,
            "4w": weights // 2 + 4 * weights // 32,
            "8da4w": weights // 2 + 4 * weights // 32,
        }[variant.scheme]
    )
    (method,) = variant.program.describe().methods
    constant_bytes = method.delegates[0].constant_bytes
    assert expected <= constant_bytes
    # besides: position and token type embeddings of each token, a few scalars, the alignment of some 200 constants
    assert constant_bytes <= expected + 2 * 4 * 384 * len(TEXTS) * TOKENS + 200 * 64
    assert method.constant_bytes == 0


def test_same_answer_as_eager(variant: Variant) -> None:
    assert_same_embeddings(variant.scheme, variant.run(), variant.by_eager)


def test_cosines_to_float(variant: Variant) -> None:
    device, eager = cosines(variant.run(), variant.by_float), cosines(variant.by_eager, variant.by_float)
    # |cos(a, c) - cos(b, c)| <= |a - b| for vectors of length 1
    np.testing.assert_allclose(device, eager, rtol=0, atol=TOLERANCE[variant.scheme])
    assert device.min() >= SMALLEST_COSINE[variant.scheme]


def test_padding_and_order_do_not_matter(variant: Variant) -> None:
    """What stands in padded positions, and where in the batch a sentence stands, changes not one bit."""
    ids, mask = variant.inputs
    assert mask.min() == 0
    first = variant.run(ids, mask)
    other_padding = torch.where(mask == 1, ids, torch.full_like(ids, 2023))
    np.testing.assert_array_equal(variant.run(other_padding, mask), first)
    np.testing.assert_array_equal(variant.run(ids.flip(0), mask.flip(0)), first[::-1])


def test_reference_device(variant: Variant) -> None:
    with torchvk.load(variant.path, device="reference") as program:
        output = program(*(tensor.numpy() for tensor in variant.inputs))
    assert_same_embeddings(variant.scheme, output, variant.by_eager)


def test_tier_0(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here and not by the marker of such tests: to lower everything again would take a minute or more."""
    monkeypatch.setenv("TORCHVK_MAX_TIER", "0")
    with torchvk.load(variant.path) as program:
        output = program(*(tensor.numpy() for tensor in variant.inputs))
    assert_same_embeddings(variant.scheme, output, variant.by_eager)
