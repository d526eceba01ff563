"""The command line, in this process (its output is a pipe here)."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pte_files import Plan, affine_graph, call, delegate_file, tensor, write

import torchvk
from torchvk.cli import main

ON_REFERENCE = ("--device", "reference")


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: Any) -> Result:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(int(caught.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.pte"
    path.write_bytes(delegate_file(affine_graph()))
    return path


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", np.ones_like(x))
    return ["--input", str(tmp_path / "x.npy"), "--input", str(tmp_path / "y.npy")]


def test_version(cli: Any) -> None:
    assert cli("--version").out == f"torchvk {torchvk.__version__}\n"


def test_help_lists_the_commands(cli: Any) -> None:
    text = cli("--help").out
    assert all(command in text for command in ("devices", "inspect", "run", "profile", "compare", "tune"))


@pytest.mark.tier
def test_devices(cli: Any) -> None:
    lines = cli("devices").out.splitlines()
    assert lines[0].split() == ["index", "name", "kind", "driver", "Vulkan", "memory", "tier"]
    infos = json.loads(cli("devices", "--json").out)
    assert len(lines) == 1 + len(infos)
    assert [info.name for info in torchvk.devices()] == [info["name"] for info in infos]
    assert {"index", "name", "kind", "driver", "memory", "tier"} <= infos[0].keys()


def test_inspect(cli: Any, model: Path) -> None:
    text = cli("inspect", model).out
    assert "method forward" in text
    assert "x: float32[2, 3]" in text
    description = json.loads(cli("inspect", model, "--json").out)
    (delegate,) = description["methods"][0]["delegates"]
    assert delegate["operators"] == {"mul": 1, "add": 1, "sub": 1}
    assert description["bytes"] == model.stat().st_size


def test_run_writes_npy(cli: Any, model: Path, inputs: list[str], tmp_path: Path) -> None:
    outputs = ["--output", tmp_path / "a.npy", "--output", tmp_path / "b.npy"]
    result = cli("run", model, *inputs, *outputs, *ON_REFERENCE)
    assert (result.code, result.err) == (0, "")
    assert str(tmp_path / "b.npy") in result.out
    x = np.load(tmp_path / "x.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), 2 * x + 1)
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), x - 1)


def test_run_writes_npz_and_json(cli: Any, model: Path, inputs: list[str], tmp_path: Path) -> None:
    result = cli("run", model, *inputs, "--output", tmp_path / "all.npz", "--json", *ON_REFERENCE)
    described = json.loads(result.out)
    assert [output["shape"] for output in described["outputs"]] == [[2, 3], [2, 3]]
    assert described["seconds"] > 0
    assert set(np.load(tmp_path / "all.npz")) == {"output_0", "output_1"}


def test_run_without_output_prints_ranges(cli: Any, model: Path, inputs: list[str]) -> None:
    lines = cli("run", model, *inputs, *ON_REFERENCE).out.splitlines()
    assert lines[1].split() == ["0", "float32[2,", "3]", "1", "11"]


def test_run_takes_numbers(cli: Any, tmp_path: Path) -> None:
    path = tmp_path / "numbers.pte"
    plan = Plan([3, "word", 0], [0, 1], [2], [call(0, 0, 0, 2)], [("executorch_prim::mul", "Scalar")])
    path.write_bytes(write(plan))
    lines = cli("run", path, "--input", "3", "--input", "word").out.splitlines()
    assert lines[1].split() == ["0", "int64[]", "9", "9"]
    assert "must be 3, not 4" in cli("run", path, "--input", "4", "--input", "word").err


@pytest.mark.tier
def test_profile(cli: Any, model: Path, inputs: list[str], tmp_path: Path) -> None:
    result = cli("profile", model, *inputs, "--trace", tmp_path / "trace.json")
    lines = result.out.splitlines()
    assert lines[0].split() == ["operator", "where", "count", "time/µs", "share", "GB/s", "GFLOP/s"]
    assert {line.split()[0] for line in lines[1:-1]} >= {"mul", "add", "sub"}
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_profile_makes_inputs_up(cli: Any, model: Path, tmp_path: Path) -> None:
    profile = json.loads(cli("profile", model, "--json", *ON_REFERENCE).out)
    assert {row["operator"] for row in profile["operators"]} == {"mul", "add", "sub"}
    assert sum(row["share"] for row in profile["operators"]) == pytest.approx(1)
    every_kind = tmp_path / "kinds.pte"
    values = [tensor((2,), "int64"), tensor((2,), "bool"), tensor((), "float16"), 5, tensor((2,), dynamic=True)]
    every_kind.write_bytes(write(Plan(values, range(5), range(5))))
    assert cli("profile", every_kind).code == 0
    brain = tmp_path / "brain.pte"
    brain.write_bytes(write(Plan([tensor((2,), "bfloat16")], [0], [0])))
    assert "no random input can be made for bfloat16[2]" in cli("profile", brain).err


def test_errors_are_one_line(cli: Any, model: Path, inputs: list[str], tmp_path: Path) -> None:
    (tmp_path / "text.npy").write_text("not an array")
    np.savez(tmp_path / "some.npz", x=np.ones(3))
    other = ["--input", str(tmp_path / "text.npy")]
    for arguments, message in (
        (("inspect", tmp_path / "none.pte"), "none.pte: no such file"),
        (("inspect", tmp_path / "x.npy"), "not a .pte file"),
        (("run", model), "forward takes 2 inputs (x: float32[2, 3], y: float32[2, 3]), 0 were given"),
        (("run", model, "--method", "encode"), "no method encode; there are forward"),
        (("run", model, *other), "text.npy: cannot be read as .npy"),
        (("run", model, "--input", tmp_path / "none.npy"), "none.npy: cannot be read"),
        (("run", model, "--input", tmp_path / "some.npz"), "not .npz"),
        (("run", model, *inputs, "--output", tmp_path / "a.npy"), "2 outputs, 1 files were given"),
        (("run", model, *inputs, "--output", "a.txt", "--output", "b.npy"), "must end in .npy"),
        (("run", model, *inputs, "--output", tmp_path / "no" / "a.npz"), "cannot be written"),
        (("profile", model, *inputs, "--trace", tmp_path / "no" / "t.json"), "cannot be written"),
    ):
        result = cli(*arguments, *(() if arguments[0] == "inspect" else ON_REFERENCE))
        assert (result.code, result.out) == (1, "")
        assert message in result.err
        assert result.err.startswith("torchvk: ")
        assert result.err.count("\n") == 1
    assert "no-such-device" in cli("run", model, "--device", "no-such-device").err
    for command in ("run", "profile"):
        assert "must be 'highest' or 'high', not 'low'" in cli(command, model, "--matmul-precision", "low").err
    assert cli("no-such-command").code == 2


def test_tune(
    cli: Any,
    model: Path,
    inputs: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mul_variants: dict[str, bool],
) -> None:
    monkeypatch.setenv("TORCHVK_CACHE_DIR", str(tmp_path))
    result = cli("tune", model, "--seconds", "20")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert lines[0].split() == ["operator", "count", "shape", "class", "variant", "µs"]
    (slow,) = (line.split() for line in lines if "slow" in line)
    (fast,) = (line.split() for line in lines if "fast" in line)
    assert slow[:3] == ["mul", "1", "float32[2,3]"]
    assert fast[-1] == "chosen"
    assert float(fast[1]) < float(slow[-1])
    (row,) = json.loads(cli("tune", model, "--json").out)
    assert (row["operator"], row["chosen"], row["source"]) == ("mul", "fast", "measured")
    # What was found out is used where tuning is on, which it is not on a CPU unless it is asked for.
    dispatches = {}
    for option in ("--tune", "--no-tune"):
        rows = json.loads(cli("profile", model, *inputs, option, "--json").out)["operators"]
        (dispatches[option],) = (row["count"] for row in rows if row["operator"] == "mul")
    assert dispatches == {"--tune": 1, "--no-tune": 40}


def test_tune_a_model_without_a_choice(cli: Any, model: Path) -> None:
    for options in ((), ON_REFERENCE):
        result = cli("tune", model, *options)
        assert (result.code, result.err) == (0, "")
        assert result.out.startswith("Nothing to choose")


def test_tables_on_a_terminal(model: Path) -> None:
    """With lines and bold type where someone looks."""
    for arguments in (["inspect", str(model)], ["profile", str(model), *ON_REFERENCE]):
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "torchvk.cli", *arguments]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
        done = subprocess.run(command, stdout=theirs, stderr=theirs, env=environment, timeout=120)
        os.close(theirs)
        text = b""
        try:
            while chunk := os.read(ours, 65536):
                text += chunk
        except OSError:  # the other side of a terminal is gone when all is read
            pass
        os.close(ours)
        assert done.returncode == 0
        assert "│" in text.decode()
        assert "mul" in text.decode()


def test_a_closed_pipe_is_no_error(model: Path) -> None:
    command = f"{sys.executable} -m torchvk.cli inspect {model} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
