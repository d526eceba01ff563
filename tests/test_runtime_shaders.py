"""Every SPIR-V module of the package keeps the kernel contract; dispatches are held against it in harness.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
from spirv import GL_COMPUTE, SHUFFLE, TIER_CAPABILITIES, contract_errors, reflect

from torchvk import shaders
from torchvk.errors import TorchVkError
from torchvk.ops import Arg, Dispatch
from torchvk.runtime.device import open_device
from torchvk.runtime.plan import MAX_PUSH

# Storage buffers of a stage: Vulkan promises 4, every driver of 1.3 known to us has 16 and more.
MAX_BINDINGS = 16


@pytest.mark.parametrize("name", shaders.names())
def test_modules_keep_the_contract(name: str) -> None:
    module = reflect(name)
    # NVIDIA's compiler (580.159) ends the process on modules whose functions call others: Slang inlines, unless told.
    assert module.functions == 1
    assert module.entry_points == [(GL_COMPUTE, "main")]
    # The compiler leaves out bindings that a variant does not touch; a dispatch binds them all the same.
    assert min(module.buffers) == 0
    assert max(module.buffers) < MAX_BINDINGS
    assert module.sets == {0}
    assert any(module.buffers.values()), "it writes nothing"
    assert module.push <= MAX_PUSH
    assert module.capabilities <= set().union({SHUFFLE}, *TIER_CAPABILITIES.values())


def test_unknown_kernels_say_what_to_do() -> None:
    with pytest.raises(TorchVkError, match="'no_such_kernel' is missing"):
        shaders.load("no_such_kernel")


def test_dispatches_that_break_the_contract_are_found() -> None:
    """The checker that the operator tests rely on, on wrong variations of a right dispatch."""
    name = next(name for name in shaders.names() if reflect(name).push and 0 in reflect(name).constants)
    module = reflect(name)
    buffers = tuple(Arg("input", i, write=module.buffers[i]) for i in sorted(module.buffers))
    constants = tuple(1.0 if module.constants.get(i) == "float" else 1 for i in range(max(module.constants) + 1))
    capabilities = replace(open_device().physical.capabilities(), tier=2, shuffle=True)
    good = Dispatch(name, buffers, (1, 1, 1), constants, bytes(module.push))
    assert contract_errors(good, capabilities) == []
    flipped = tuple(Arg("input", arg.index, write=not arg.write) for arg in buffers)
    for wrong in (
        Dispatch(name, buffers[:-1], (1, 1, 1), constants, good.push),
        Dispatch(name, flipped, (1, 1, 1), constants, good.push),
        Dispatch(name, buffers, (1, 1, 1), constants[:-1], good.push),
        Dispatch(name, buffers, (1, 1, 1), (0.5, *constants[1:]), good.push),
        Dispatch(name, buffers, (1, 1, 1), constants, good.push[:-4]),
    ):
        assert contract_errors(wrong, capabilities)
