"""All tests run with the validation layers on; what the layers say fails the test in which they say it."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# A machine without the layers (a borrowed GPU, say) may say TORCHVK_VALIDATION=0.
os.environ.setdefault("TORCHVK_VALIDATION", "1")
# Tests neither read nor fill the user's pipeline cache. (The folder goes with the object.)
_cache = tempfile.TemporaryDirectory(prefix="torchvk-tests-")
os.environ.setdefault("TORCHVK_CACHE_DIR", _cache.name)
# On a GPU, too, every test runs the kernels that the rules choose; variants are tested by name.
os.environ.setdefault("TORCHVK_TUNE", "0")


HERE = Path(__file__).parent
# What has to do with files before they are written. A GPU to test on need not have it: such tests are then left out
# by the file, and the run says so at its end.
EXPORTING = re.compile(
    r"^(?:from|import) (?:executorch|torchao|transformers|examples|(?:tests\.)?(?:pte_files|edge|pt2e|digits|schemes)"
    r"|torchvk\.(?:lowering|partitioner|quantizer))\b",
    re.MULTILINE,
)
CAN_GENERATE = importlib.util.find_spec("hypothesis") is not None
if not CAN_GENERATE:
    import without_hypothesis  # noqa: F401

CAN_EXPORT = all(importlib.util.find_spec(name) for name in ("executorch", "torchao"))
collect_ignore = (
    [] if CAN_EXPORT else sorted(path.name for path in HERE.glob("test_*.py") if EXPORTING.search(path.read_text()))
)
ON_THE_DEVICE = re.compile(r"test_(?:ops|plan|runtime|quantized_linear)\w*\.py")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    from torchvk.runtime import list_devices
    from torchvk.runtime.device import choose, default_request

    infos = list_devices()
    terminalreporter.write_line(f"on {infos[choose(infos, default_request())]}")
    if not CAN_EXPORT:
        names = ", ".join(collect_ignore)
        terminalreporter.write_line(f"executorch or torchao is not installed; left out: {names} and the mark export")
    if not CAN_GENERATE:
        terminalreporter.write_line("hypothesis is not installed; left out: tests on generated examples")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what ``make test-gpu`` runs; leave out what cannot run."""
    for item in items:
        if ON_THE_DEVICE.fullmatch(item.path.name) or item.get_closest_marker("tier"):
            item.add_marker("gpu")
    missing = {
        "export": not CAN_EXPORT,
        "hypothesis": not CAN_GENERATE,
        "validation": os.environ["TORCHVK_VALIDATION"] == "0",
    }
    marks = [mark for mark, left_out in missing.items() if left_out]
    config.hook.pytest_deselected(items=[item for item in items if any(map(item.get_closest_marker, marks))])
    items[:] = [item for item in items if not any(map(item.get_closest_marker, marks))]


@pytest.fixture(autouse=True)
def _no_validation_messages() -> Iterator[None]:
    from torchvk.runtime import validation_messages

    before = len(validation_messages())
    yield
    said = validation_messages()[before:]
    assert not said, "the validation layers said:\n" + "\n".join(said)


@pytest.fixture
def own_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Device that is nobody else's, freed of everything at the end; destroying it makes the validation layers name
    what leaked."""
    from torchvk.runtime import device as device_module

    monkeypatch.setattr(device_module, "_devices", {})
    device = device_module.open_device()
    yield device
    gc.collect()
    assert device.allocator.usage() == (0, 0)
    device.close()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Fresh random numbers; the seed is printed if the test fails."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.fixture(params=["cpu", "cpu without shuffles", "gpu", "gpu of tier 0"])
def device_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Kernel choice as on other devices; all of them run on the device that is there."""
    from torchvk.ops import Capabilities
    from torchvk.runtime.device import PhysicalDevice

    kind = str(request.param)
    real = PhysicalDevice.capabilities
    changes: dict[str, dict[str, Any]] = {
        "cpu": {},
        "cpu without shuffles": {"shuffle": False},
        "gpu": {"kind": "discrete"},
        "gpu of tier 0": {"kind": "integrated", "tier": 0},
    }

    def capabilities(self: PhysicalDevice, max_tier: int | None = None) -> Capabilities:
        return dataclasses.replace(real(self, max_tier), **changes[kind])

    monkeypatch.setattr(PhysicalDevice, "capabilities", capabilities)
    return kind


@pytest.fixture
def mul_variants() -> Iterator[dict[str, bool]]:
    """``mul`` in variants: "slow" (the default) does it forty times, "fast" once, "broken" names no kernel, and
    "doubled" gives another result, so that a test sees it run; change the mapping to offer others."""
    from torchvk.ops import Kernels, operator

    known = operator.get("mul")
    names = {"slow": True, "fast": True, "broken": False, "doubled": False}

    def variants(attributes: Any, inputs: Any, outputs: Any, capabilities: Any) -> Any:
        plain = known.kernels(attributes, inputs, outputs, capabilities)
        (dispatch,) = plain.dispatches
        add = operator.get("add").kernels(operator.get("add").attributes(), inputs, outputs, capabilities)
        every = {
            "slow": Kernels((dispatch,) * 40),
            "fast": plain,
            "broken": Kernels((dataclasses.replace(dispatch, kernel="no_such_kernel"),)),
            "doubled": add,
        }
        return tuple((name, kernels) for name, kernels in every.items() if names[name])

    def kernels(*arguments: Any) -> Any:
        return variants(*arguments)[0][1]

    operator._registry["mul"] = dataclasses.replace(known, kernels=kernels, variants=variants)
    yield names
    operator._registry["mul"] = known
