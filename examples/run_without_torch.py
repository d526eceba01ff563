"""Run a .pte file with NumPy arrays, on a machine that has neither torch nor executorch.

    python run_without_torch.py pt2e_8bit.pte pt2e_8bit_input.npy pt2e_8bit_output.npy

Takes the file, one .npy file per input, and last the output to compare with.
"""

import sys

import numpy as np

import torchvk


def main(path: str, *arrays: str) -> None:
    *inputs, expected = (np.load(array) for array in arrays)

    with torchvk.load(path) as program:
        print(f"{path}: methods {', '.join(program.method_names)}")
        output = program(*inputs)

    assert isinstance(output, np.ndarray)
    error = np.abs(output - expected).max()
    print(f"output {output.dtype} {list(output.shape)}, largest difference: {error:.3g}")
    assert error == 0, "one file, one device, one input: one answer"
    assert "torch" not in sys.modules
    print("torch was not imported")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
