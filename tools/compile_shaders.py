"""Compile torchvk/shaders/*.slang to SPIR-V with the Slang compiler in PyPI's ``slangpy``. Build time only.

A source lists its kernels in lines like::

    //@kernel binary_f32 entry=binary -DDOMAIN=0

name (unique over all files), entry point, then any further slangc options. The result is
``torchvk/shaders/spirv/<name>.spv``, with the entry point called ``main``. Kernels whose inputs (sources, options,
compiler version, this file) did not change are kept.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SHADERS = Path(__file__).resolve().parent.parent / "torchvk" / "shaders"
DIRECTIVE = "//@kernel "
OPTIONS = ["-target", "spirv", "-profile", "spirv_1_6", "-stage", "compute", "-O2", "-matrix-layout-row-major"]
OP_SOURCE = 3


@dataclass(frozen=True)
class Kernel:
    name: str
    source: Path
    entry: str
    options: tuple[str, ...]


class Slang:
    """The flat C API of the Slang compiler; it takes slangc's command line."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("slangpy")
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit("the Slang compiler is needed to build torchvk: pip install slangpy")
        folder = Path(spec.submodule_search_locations[0])
        patterns = ("libslang-compiler.so*", "libslang-compiler*.dylib", "slang-compiler.dll", "slang.dll")
        found = [path for pattern in patterns for path in sorted(folder.rglob(pattern))]
        if not found:
            raise SystemExit(f"no Slang compiler library in {folder}")
        self.api = ctypes.CDLL(str(found[0]))
        self.api.spCreateSession.restype = ctypes.c_void_p
        self.api.spCreateCompileRequest.restype = ctypes.c_void_p
        self.api.spGetDiagnosticOutput.restype = ctypes.c_char_p
        self.api.spGetEntryPointCode.restype = ctypes.c_void_p

    def compile(self, kernel: Kernel) -> bytes:
        """SPIR-V of one kernel; raises SystemExit with the compiler's diagnostics."""
        session = ctypes.c_void_p(self.api.spCreateSession(None))
        request = ctypes.c_void_p(self.api.spCreateCompileRequest(session))
        try:
            arguments = [
                *OPTIONS,
                *kernel.options,
                "-I",
                str(SHADERS),
                "-entry",
                kernel.entry,
                str(kernel.source),
                "-o",
                "unused.spv",
            ]
            encoded = [argument.encode() for argument in arguments]
            array = (ctypes.c_char_p * len(encoded))(*encoded)
            # -o only selects in-memory output: the code is fetched below and written by us.
            status = self.api.spProcessCommandLineArguments(request, array, len(encoded))
            if status >= 0:
                self.api.spSetCompileFlags(request, 0)
                status = self.api.spCompile(request)
            text = (self.api.spGetDiagnosticOutput(request) or b"").decode(errors="replace")
            if status < 0:
                raise SystemExit(f"{kernel.source.name}: kernel {kernel.name} does not compile:\n{text}")
            if "warning" in text:
                print(text, file=sys.stderr)
            size = ctypes.c_size_t()
            code = self.api.spGetEntryPointCode(request, 0, ctypes.byref(size))
            return drop_op_source(ctypes.string_at(code, size.value))
        finally:
            self.api.spDestroyCompileRequest(request)
            self.api.spDestroySession(session)


def drop_op_source(code: bytes) -> bytes:
    """Without the OpSource instructions: older validators do not know Slang as a source language."""
    words = struct.unpack(f"<{len(code) // 4}I", code)
    kept = list(words[:5])
    position = 5
    while position < len(words):
        length = words[position] >> 16
        if words[position] & 0xFFFF != OP_SOURCE:
            kept.extend(words[position : position + length])
        position += length
    return struct.pack(f"<{len(kept)}I", *kept)


def kernels() -> list[Kernel]:
    """Every kernel that the sources list."""
    result: dict[str, Kernel] = {}
    for source in sorted(SHADERS.glob("*.slang")):
        for line in source.read_text().splitlines():
            if line.startswith(DIRECTIVE):
                name, entry, *options = line[len(DIRECTIVE) :].split()
                if name in result or not entry.startswith("entry="):
                    raise SystemExit(f"{source.name}: bad or repeated kernel line: {line}")
                result[name] = Kernel(name, source, entry.removeprefix("entry="), tuple(options))
    return list(result.values())


def closure(source: Path) -> list[Path]:
    """The source and all that it imports or includes, in a fixed order."""
    seen: dict[str, Path] = {}
    todo = [source]
    while todo:
        path = todo.pop()
        if path.name in seen:
            continue
        seen[path.name] = path
        for line in path.read_text().splitlines():
            if line.startswith(("import ", "__include ", "#include ")):
                name = line.split()[1].strip('";').removesuffix(".slang") + ".slang"
                if (SHADERS / name).exists():
                    todo.append(SHADERS / name)
    return [seen[name] for name in sorted(seen)]


def build(output: Path | None = None, only: str | None = None) -> Path:
    """Bring the folder of SPIR-V modules up to date and return it."""
    output = output or SHADERS / "spirv"
    output.mkdir(parents=True, exist_ok=True)
    try:
        version = importlib.metadata.version("slangpy")
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit("the Slang compiler is needed to build torchvk: pip install slangpy") from None
    todo: list[tuple[Kernel, str]] = []
    listed = kernels()
    base = hashlib.sha256(version.encode() + Path(__file__).read_bytes())
    sources: dict[Path, bytes] = {}
    for kernel in listed:
        if kernel.source not in sources:
            sources[kernel.source] = b"".join(path.read_bytes() for path in closure(kernel.source))
        digest = base.copy()
        digest.update(repr((kernel.entry, kernel.options)).encode() + sources[kernel.source])
        stamp = output / f"{kernel.name}.key"
        key = digest.hexdigest()
        fresh = (output / f"{kernel.name}.spv").exists() and stamp.exists() and stamp.read_text() == key
        if not fresh and (only is None or only in kernel.name):
            todo.append((kernel, key))
    for stale in output.glob("*.spv"):
        if stale.stem not in {kernel.name for kernel in listed}:
            stale.unlink()
            stale.with_suffix(".key").unlink(missing_ok=True)
    if todo:
        slang = Slang()

        def make(item: tuple[Kernel, str]) -> None:
            kernel, key = item
            code = slang.compile(kernel)
            partial = output / f"{kernel.name}.spv.tmp"
            partial.write_bytes(code)
            partial.replace(output / f"{kernel.name}.spv")
            (output / f"{kernel.name}.key").write_text(key)

        with ThreadPoolExecutor() as pool:
            list(pool.map(make, todo))
    print(f"shaders: {len(listed)} kernels, {len(todo)} compiled")
    return output


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for the .spv files")
    parser.add_argument("--only", help="compile only kernels whose name contains this")
    options = parser.parse_args()
    build(options.output, options.only)
