"""The main job on a real model: quantize MiniLM in each documented scheme, lower it, run it on the GPU, compare.

python -m examples.minilm [--device NAME] [--attention sdpa|eager] [--batch 8] [--tokens 32] [--keep FOLDER]
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import torchvk


@dataclass(frozen=True)
class Result:
    scheme: str
    file_bytes: int
    gpu_operators: int
    cpu_operators: int
    smallest_cosine: float
    error: float
    milliseconds: float
    embeddings: np.ndarray[Any, Any]
    device: str


def run_scheme(
    scheme: str, model: Any, batches: list[tuple[Any, ...]], path: Path, device: str | None, fp32: Any, step: Any
) -> Result:
    """Quantize, lower to ``path``, run all batches, and compare with the eager quantized module and with fp32."""
    import torch
    from executorch.exir import to_edge_transform_and_lower

    from examples.sentence_encoder import quantize
    from torchvk.partitioner.vulkan_partitioner import VulkanPartitioner

    step("quantize")
    quantized = quantize(model, scheme, batches[0])
    with torch.no_grad():
        eager = torch.cat([quantized(*batch) for batch in batches]).numpy()
        step("export and lower")
        exported = torch.export.export(quantized, batches[0])
        program = to_edge_transform_and_lower(exported, partitioner=[VulkanPartitioner()]).to_executorch()
    program.save(str(path))
    step("load")
    with torchvk.load(path, device=device) as vk:
        inputs = [tuple(tensor.numpy() for tensor in batch) for batch in batches]
        vk(*inputs[0])
        step("run")
        begin = time.perf_counter()
        embeddings = np.concatenate([vk(*batch) for batch in inputs])
        seconds = time.perf_counter() - begin
        facts = vk.describe().methods[0]
        device_name = vk.profile(*inputs[0]).device
    reference = embeddings if fp32 is None else fp32
    return Result(
        scheme=scheme,
        file_bytes=path.stat().st_size,
        gpu_operators=facts.gpu_operators,
        cpu_operators=sum(facts.cpu_operators.values()),
        smallest_cosine=float((embeddings * reference).sum(1).min()),
        error=float(np.abs(embeddings - eager).max()),
        milliseconds=1000 * seconds / len(embeddings),
        embeddings=embeddings,
        device=device_name,
    )


def show(results: list[Result], sentences: list[str], console: Console) -> None:
    """Print the table of schemes and the most similar pairs of sentences."""
    table = Table(title=f"MiniLM sentence encoder on {results[0].device}")
    for column in ("scheme", "file", "of fp32", "operators GPU / CPU", "smallest cosine to fp32", "error vs eager"):
        table.add_column(column, justify="left" if column == "scheme" else "right")
    table.add_column("ms a sentence", justify="right")
    for result in results:
        table.add_row(
            result.scheme,
            f"{result.file_bytes / 1e6:.1f} MB",
            f"{result.file_bytes / results[0].file_bytes:.0%}",
            f"{result.gpu_operators} / {result.cpu_operators}",
            f"{result.smallest_cosine:.4f}",
            f"{result.error:.1e}",
            f"{result.milliseconds:.1f}",
        )
    console.print(table)
    console.print("error vs eager: largest difference of an embedding's element from the eager quantized module's")
    embeddings = results[1].embeddings
    similarity = embeddings @ embeddings.T
    rows, columns = np.triu_indices(len(sentences), k=1)
    best = np.argsort(-similarity[rows, columns])[:5]
    pairs = Table(title=f"Most similar sentences ({results[1].scheme})")
    pairs.add_column("cosine", justify="right")
    pairs.add_column("sentence")
    pairs.add_column("sentence")
    for position in best:
        row, column = int(rows[position]), int(columns[position])
        pairs.add_row(f"{similarity[row, column]:.3f}", sentences[row], sentences[column])
    console.print(pairs)


def main(
    device: Annotated[str | None, typer.Option(help="Vulkan device: index or part of its name.")] = None,
    attention: Annotated[str, typer.Option(help="Attention implementation: sdpa or eager.")] = "sdpa",
    batch: Annotated[int, typer.Option(help="Sentences in a batch.", min=1)] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens a sentence is padded to.", min=8, max=512)] = 32,
    keep: Annotated[Path | None, typer.Option(help="Folder to keep the .pte files in.")] = None,
) -> None:
    """Quantize, lower and run the MiniLM sentence encoder in fp32 and in each documented scheme."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    console = Console()
    with (
        tempfile.TemporaryDirectory() as scratch,
        Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress,
    ):
        task = progress.add_task("import torch and transformers")
        from examples.sentence_encoder import SCHEMES, SENTENCES, load_encoder, tokenize

        sentences = list(SENTENCES)
        padded = sentences + [""] * (-len(sentences) % batch)
        ids, mask = tokenize(padded, tokens)
        batches = list(zip(ids.split(batch), mask.split(batch), strict=True))
        model = load_encoder(attention)
        folder = keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        results: list[Result] = []
        for scheme, meaning in SCHEMES.items():

            def step(what: str, scheme: str = scheme, meaning: str = meaning) -> None:
                progress.update(task, description=f"{scheme} ({meaning}): {what}")

            fp32 = results[0].embeddings if results else None
            path = folder / f"minilm-{scheme}.pte"
            results.append(run_scheme(scheme, model, batches, path, device, fp32, step))
        progress.update(task, description="done")
    show(results, sentences, console)


if __name__ == "__main__":
    typer.run(main)
