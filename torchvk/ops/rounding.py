"""The pass that rounds float32 results in scratch memory to float16.

Kernels whose threads own rows cannot store halves of rows of odd length: neighbouring rows share a word.
"""

from __future__ import annotations

import struct

from torchvk.ops.operator import Capabilities, Dispatch, grid, scratch_read, write


def round_to_half(count: int, scratch: int, capabilities: Capabilities) -> Dispatch:
    """The dispatch that rounds ``count`` float32 values of a scratch buffer into the node's first output."""
    return Dispatch(
        kernel="round_to_half",
        buffers=(scratch_read(scratch), write(0)),
        groups=grid(-(-count // 2), capabilities),
        constants=(capabilities.local_size,),
        push=struct.pack("<I", count),
        bytes=6 * count,
    )
