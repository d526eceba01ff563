"""The command line: ``torchvk devices | inspect | run | profile | compare | tune``."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from zipfile import BadZipFile

import typer
from rich.console import Console
from rich.table import Table

from torchvk.errors import ArgumentError, TorchVkError

if TYPE_CHECKING:
    from torchvk.program import Method, MethodDescription, Parameter

app = typer.Typer(
    name="torchvk",
    help="Run quantized PyTorch models, exported to .pte files, on Vulkan devices.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

PteFile = Annotated[Path, typer.Argument(metavar="MODEL.PTE", help="The program file.")]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", "-d", help="Index or part of the name of a device, or 'reference'. Default: the best."),
]
MethodOption = Annotated[str, typer.Option("--method", "-m", help="The method to call.")]
InputOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input", "-i", help="An input: a .npy file, or a number where the method takes one. Repeat for several."
    ),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--matmul-precision", help="For float32 matrix products: 'highest' (the default) or 'high', float16 operands."
    ),
]
TuneOption = Annotated[
    bool | None,
    typer.Option(
        "--tune/--no-tune", help="Time kernels that come in variants, if that was not done. Default: on GPUs."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. A torchvk error is one line on the standard error and exit code 1."""
    try:
        try:
            app(args=None if arguments is None else list(arguments))
        finally:
            sys.stdout.flush()
    except TorchVkError as error:
        print(f"torchvk: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        # The reader (head, less) has seen enough; the flush at exit must find something to write to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _version(asked: bool) -> None:
    if asked:
        print(f"torchvk {metadata.version('torchvk')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def devices(as_json: JsonOption = False) -> None:
    """List the Vulkan devices of this machine."""
    from torchvk.runtime import list_devices

    infos = list_devices()
    if as_json:
        _print_json([{name: getattr(info, name) for name in info.__dataclass_fields__} for info in infos])
        return
    rows = [
        (
            str(info.index),
            info.name,
            info.kind,
            f"{info.driver} {info.driver_version}",
            info.api_version,
            f"{info.memory / 2**30:.1f} GiB",
            info.problem or str(info.tier),
        )
        for info in infos
    ]
    _print_table(("index", "name", "kind", "driver", "Vulkan", "memory", "tier"), rows, left=5)


@app.command()
def inspect(model: PteFile, as_json: JsonOption = False) -> None:
    """Show what a .pte file holds: methods, delegates, operators, shapes. Needs no device."""
    import msgspec

    from torchvk.program import describe

    description = describe(model)
    if as_json:
        _print_json(msgspec.to_builtins(description))
        return
    if not sys.stdout.isatty():
        print(description)
        return
    console = Console()
    console.print(f"[bold]{description.name}[/]: {description.bytes:,} bytes", highlight=False)
    for method in description.methods:
        _print_method(console, method)


@app.command()
def run(
    model: PteFile,
    inputs: InputOption = None,
    outputs: Annotated[
        list[Path] | None,
        typer.Option(
            "--output", "-o", help="Where an output goes: a .npy file each, or one .npz file for all (output_0, …)."
        ),
    ] = None,
    device: DeviceOption = None,
    method: MethodOption = "forward",
    matmul_precision: PrecisionOption = None,
    tune: TuneOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a method on .npy files and write its outputs to .npy files."""
    import numpy as np

    with _loaded("Running", model, method, device, matmul_precision, tune) as called:
        arguments = [_read_input(text, position, called.parameters) for position, text in enumerate(inputs or [])]
        start = time.perf_counter()
        result = called(*arguments)
        seconds = time.perf_counter() - start
    results = result if isinstance(result, tuple) else (result,)
    paths = _write_outputs(results, outputs or [])
    arrays = [np.asarray(item) for item in results]
    if as_json:
        described = [
            {"dtype": array.dtype.name, "shape": list(array.shape), "file": path and str(path)}
            for array, path in zip(arrays, paths, strict=True)
        ]
        _print_json({"method": method, "seconds": seconds, "outputs": described})
        return
    rows = [
        (str(index), f"{array.dtype.name}{list(array.shape)}", *_range(array), str(path or ""))
        for index, (array, path) in enumerate(zip(arrays, paths, strict=True))
    ]
    _print_table(("output", "type", "smallest", "largest", "file"), rows, left=2)
    print(f"{seconds * 1e3:.1f} ms")


@app.command()
def profile(
    model: PteFile,
    inputs: InputOption = None,
    trace: Annotated[Path | None, typer.Option(help="Write a trace for Perfetto or chrome://tracing.")] = None,
    device: DeviceOption = None,
    method: MethodOption = "forward",
    matmul_precision: PrecisionOption = None,
    tune: TuneOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a method: time, share, GB/s and GFLOP/s of every operator. Without inputs: on random numbers."""
    from torchvk.program.profile import COLUMNS, cells_of

    with _loaded("Profiling", model, method, device, matmul_precision, tune) as called:
        arguments: list[Any] = (
            [_read_input(text, position, called.parameters) for position, text in enumerate(inputs)]
            if inputs
            else _random_inputs(called.parameters)
        )
        measured = called.profile(*arguments)
    if trace is not None:
        with _writing(trace):
            measured.write_trace(trace)
    if as_json:
        _print_json(measured.plain())
        return
    _print_table(COLUMNS, map(cells_of, measured.rows), left=2)
    print(measured.summary())


@app.command()
def compare(
    reference: Annotated[Path, typer.Argument(metavar="FLOAT.PTE", help="The program in floating point.")],
    quantized: Annotated[Path, typer.Argument(metavar="QUANTIZED.PTE", help="The same model, quantized.")],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--inputs",
            "--input",
            "-i",
            help="A .npy file for each input; or .npz files, each with all inputs of a call, for several calls.",
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with a bar chart to this file.")] = None,
    device: DeviceOption = None,
    method: MethodOption = "forward",
    matmul_precision: PrecisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show where a quantized program loses accuracy: the noise of each layer, the worst first."""
    from torchvk.program.compare import COLUMNS, cells_of
    from torchvk.program.compare import compare as compare_programs

    with Console(stderr=True).status(f"Comparing {quantized} with {reference}"):
        calls = _read_calls(inputs or [])
        result = compare_programs(reference, quantized, calls, device, method=method, matmul_precision=matmul_precision)
    if html is not None:
        with _writing(html):
            result.write_html(html)
    if as_json:
        _print_json(result.plain())
        return
    _print_table(COLUMNS, map(cells_of, (*result.layers, *result.outputs)), left=2)
    print(result.summary())


@app.command()
def tune(
    model: PteFile,
    seconds: Annotated[float, typer.Option(help="How long it may take, for all kernels together.", min=0.1)] = 30.0,
    device: DeviceOption = None,
    matmul_precision: PrecisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time the kernels that a model may use on a device, and keep the choice for later loads."""
    import msgspec

    from torchvk.program import load
    from torchvk.runtime import Tuning

    tuning = Tuning(seconds, thorough=True, on_cpu=True)
    with Console(stderr=True).status(f"Tuning {model}"):
        load(model, device, matmul_precision=matmul_precision, tune=tuning).close()
    if as_json:
        _print_json(msgspec.to_builtins(tuning.results))
        return
    if not tuning.results:
        print("Nothing to choose: every operator of this model has one way to run on this device.")
        return
    rows = []
    for result in tuning.results:
        first = (result.operator, str(result.count), result.shape)
        for name, value in (result.seconds or {result.chosen: None}).items():
            time = "not measured" if not result.seconds else "cannot run" if value is None else f"{value * 1e6:.1f}"
            rows.append((*first, name, time, "chosen" if name == result.chosen else ""))
            first = ("", "", "")
    _print_table(("operator", "count", "shape class", "variant", "µs", ""), rows, left=4)
    if any(result.source == "default" for result in tuning.results):
        print("Not all could be measured in that time; give more --seconds.")


@contextmanager
def _loaded(
    doing: str, model: Path, method: str, device: str | None, matmul_precision: str | None, tune: bool | None
) -> Iterator[Method]:
    """The method of the file, on the device."""
    from torchvk.program import load

    options: Any = {"methods": [method], "matmul_precision": matmul_precision, "tune": tune}
    with Console(stderr=True).status(f"{doing} {model}"), load(model, device, **options) as program:
        yield program.method(method)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """An error of the file system names the file, in one line."""
    try:
        yield
    except OSError as error:
        raise ArgumentError(f"{path}: cannot be written: {error}") from error


def _read_input(text: str, position: int, parameters: Sequence[Parameter]) -> Any:
    """A .npy file, or the number or word that a method was specialized on."""
    is_word = position < len(parameters) and not parameters[position].is_tensor
    return _read_word(text) if is_word else _read_array(text)


def _read_word(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _read_array(text: str) -> Any:
    import numpy as np

    try:
        loaded = np.load(text, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ArgumentError(f"input {text}: cannot be read as .npy: {error}") from error
    if not isinstance(loaded, np.ndarray):
        raise ArgumentError(f"input {text}: give one .npy file for each input, not .npz")
    return loaded


def _read_calls(texts: Sequence[str]) -> list[Any]:
    """The inputs of one call from .npy files, or those of several from .npz files."""
    import numpy as np

    together = [text for text in texts if text.endswith(".npz")]
    if not together:
        return [_read_array(text) if text.endswith(".npy") else _read_word(text) for text in texts]
    if len(together) != len(texts):
        raise ArgumentError("give .npy files, one for each input, or .npz files, one for each call, not both")

    def read(text: str) -> list[Any]:
        try:
            with np.load(text, allow_pickle=False) as arrays:
                return [arrays[name] for name in arrays.files]
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            raise ArgumentError(f"inputs {text}: cannot be read as .npz: {error}") from error

    return [read(text) for text in texts]


def _random_inputs(parameters: Sequence[Parameter]) -> list[Any]:
    """Normal floats; zeros for integers, which may be indices of anything; ones for masks."""
    import numpy as np

    generator = np.random.default_rng(0)
    inputs: list[Any] = []
    for parameter in parameters:
        if not parameter.is_tensor:
            inputs.append(parameter.baked)
        elif parameter.numpy is None:
            raise ArgumentError(f"no random input can be made for {parameter}; give --input")
        elif parameter.numpy.kind == "f":
            inputs.append(generator.standard_normal(parameter.shape).astype(parameter.numpy))
        else:
            fill = np.ones if parameter.numpy.kind == "b" else np.zeros
            inputs.append(fill(parameter.shape, parameter.numpy))
    return inputs


def _write_outputs(results: Sequence[Any], paths: Sequence[Path]) -> list[Path | None]:
    """Write what the user wants written; gives the file of each output."""
    import numpy as np

    if not paths:
        return [None] * len(results)
    together = len(paths) == 1 and paths[0].suffix == ".npz"
    if not together and len(paths) != len(results):
        raise ArgumentError(
            f"the method has {len(results)} outputs, {len(paths)} files were given; "
            "give --output for each, or one .npz file"
        )
    for path in paths:
        if path.suffix != (".npz" if together else ".npy"):
            raise ArgumentError(f"output {path}: must end in .npy, or be one .npz file for all outputs")
    try:
        if together:
            arrays: dict[str, Any] = {f"output_{index}": np.asarray(result) for index, result in enumerate(results)}
            np.savez(paths[0], **arrays)
        else:
            for path, result in zip(paths, results, strict=True):
                np.save(path, np.asarray(result))
    except OSError as error:
        raise ArgumentError(f"output cannot be written: {error}") from error
    return [paths[0]] * len(results) if together else [*paths]


def _range(array: Any) -> tuple[str, str]:
    if array.size == 0 or array.dtype.kind not in "fiub":
        return "", ""
    return f"{array.min():.6g}", f"{array.max():.6g}"


def _print_method(console: Console, method: MethodDescription) -> None:
    table = Table(title=f"method {method.name}", title_justify="left", title_style="bold")
    for column in ("", "name", "type"):
        table.add_column(column)
    for label, entries in (("input", method.inputs), ("output", method.outputs)):
        for position, entry in enumerate(entries):
            table.add_row(f"{label} {position}", entry.name, entry.type)
    console.print(table)
    table = Table("where", "operator")
    table.add_column("count", justify="right")
    for position, delegate in enumerate(method.delegates):
        where = f"delegate {position}: {delegate.backend}, {delegate.bytes:,} bytes"
        for name, count in delegate.operators.items() or (("", 0),):
            table.add_row(where, name, str(count) if count else "")
            where = ""
        table.add_section()
    for name, count in method.cpu_operators.items():
        table.add_row("CPU", name, str(count))
    console.print(table)
    if method.cpu_operators:
        console.print(f"On the CPU: {method.cpu_reason}.", highlight=False)
    else:
        console.print("Nothing runs on the CPU.")


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> None:
    """A table with lines on a terminal, plain aligned text in a pipe."""
    from torchvk.program.profile import plain_table

    if not sys.stdout.isatty():
        print(plain_table(columns, rows, left))
        return
    table = Table()
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position < left else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2))


if __name__ == "__main__":
    main()
