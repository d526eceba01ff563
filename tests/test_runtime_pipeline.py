"""Pipelines and their cache on disk."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest

from torchvk import shaders
from torchvk.errors import TorchVkError
from torchvk.runtime import pipeline
from torchvk.runtime.device import Device, open_device
from torchvk.runtime.pipeline import PipelineKey, cache_path, read_cache, write_cache


def some_key(**changes: int) -> PipelineKey:
    """A pipeline of some kernel; all constants at their defaults but the workgroup size."""
    name = shaders.names()[0]
    from spirv import reflect

    return PipelineKey(name, (changes.get("local_size", 8),), len(reflect(name).buffers))


def test_specialization_words_keep_their_types() -> None:
    key = PipelineKey("k", (1, 1.0, True, -1, 2**32 - 1, 0.5), 1)
    expected = struct.pack("<IfIiIf", 1, 1.0, 1, -1, 2**32 - 1, 0.5)
    assert key.words() == expected


def test_pipelines_are_made_once() -> None:
    device = Device(open_device().physical)
    try:
        first, again, other = device.pipelines.get([some_key(), some_key(), some_key(local_size=16)])
        assert first is again
        assert first.handle != other.handle
        assert first.layout == other.layout
        assert device.pipelines.get([some_key()]) == [first]
    finally:
        device.close()


def test_started_pipelines_are_compiled_in_the_background() -> None:
    device = Device(open_device().physical)
    try:
        device.pipelines.start([some_key(), some_key(local_size=16)])
        assert device.pipelines.ready([some_key(), some_key(local_size=16)], time.perf_counter() + 60)
        assert device.pipelines.ready([some_key()], 0.0)
        device.pipelines.cancel()
        assert len(device.pipelines.get([some_key()])) == 1
        device.pipelines.start([some_key(local_size=24), PipelineKey("no_such_kernel", (), 1)])
    finally:
        device.close()  # while they are made


def test_the_cache_is_not_written_again_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHVK_CACHE_DIR", str(tmp_path))
    written: list[int] = []
    monkeypatch.setattr(pipeline, "write_cache", lambda path, data: written.append(len(data)))
    device = Device(open_device().physical)
    for _ in range(3):
        device.pipelines.get([some_key()])
    device.close()
    assert len(written) <= 1


def test_an_unknown_kernel_is_an_error_and_the_others_are_kept() -> None:
    device = Device(open_device().physical)
    try:
        with pytest.raises(TorchVkError, match="'no_such_kernel' is missing"):
            device.pipelines.get([some_key(), PipelineKey("no_such_kernel", (), 1)])
        assert len(device.pipelines.get([some_key()])) == 1
    finally:
        device.close()  # and nothing leaks: the validation layers would say so


def test_the_cache_is_written_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    physical = open_device().physical
    monkeypatch.setenv("TORCHVK_CACHE_DIR", str(tmp_path / "new"))
    seen: list[bytes] = []
    real = pipeline.Pipelines._create_cache

    def create(self: pipeline.Pipelines, data: bytes) -> object:
        seen.append(data)
        return real(self, data)

    monkeypatch.setattr(pipeline.Pipelines, "_create_cache", create)
    for _ in range(2):
        device = Device(physical)
        device.pipelines.get([some_key()])
        device.close()
    (path,) = (tmp_path / "new").iterdir()
    assert seen[0] == b""
    assert seen[1]  # Vulkan's own header, at least
    assert read_cache(path) == seen[1]


def test_the_cache_depends_on_device_driver_and_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHVK_CACHE_DIR", str(tmp_path))
    first = cache_path("device-driver")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99")
    assert len({first, cache_path("device-driver"), cache_path("device-other")}) == 3
    assert first.parent == tmp_path


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_without_a_folder_given_the_platforms_own_is_used(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHVK_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", platform)
    path = cache_path("key")
    assert "torchvk" in path.parent.parts
    assert path.is_relative_to(Path.home())


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "short"])
def test_damaged_caches_are_ignored(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "cache.bin"
    write_cache(path, bytes(range(200)))
    assert read_cache(path) == bytes(range(200))
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[100] ^= 1
    whole = bytes(content)
    path.write_bytes({"flip": whole, "truncate": whole[:-1], "empty": b"", "short": b"abc"}[damage])
    assert read_cache(path) == b""


def test_missing_and_unwritable_caches_are_no_errors(tmp_path: Path) -> None:
    assert read_cache(tmp_path / "none.bin") == b""
    (tmp_path / "file").write_text("in the way")
    write_cache(tmp_path / "file" / "cache.bin", b"data")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_writing_leaves_no_partial_files(tmp_path: Path) -> None:
    for data in (b"first", b"second"):
        write_cache(tmp_path / "cache.bin", data)
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache.bin"]
    assert read_cache(tmp_path / "cache.bin") == b"second"
