"""Choices of variants on disk: a JSON file for each device, driver and package version."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import msgspec

from torchvk.runtime.pipeline import cache_path, replace_file

log = logging.getLogger("torchvk.vulkan")

LARGEST_FILE = 8 << 20


class Choice(msgspec.Struct, frozen=True):
    """The variant that was chosen for a shape class, and seconds of all that were timed (None: it cannot run)."""

    variant: str
    seconds: dict[str, float | None]


def choices_path(key: str) -> Path:
    """The file for a device and driver."""
    return cache_path(key, "tuning").with_suffix(".json")


def read_choices(path: Path) -> dict[str, Choice]:
    """What is known, by tier, precision and shape class; nothing if the file is missing, damaged or absurdly large.

    A name is only looked up among the variants that an operator offers: the worst that a hostile file can do is to
    choose a slow one.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError("too large")
        known: dict[str, Choice] = msgspec.json.decode(path.read_bytes(), type=dict[str, Choice])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.info("ignoring tuning file %s: %s", path, error)
        return {}
    return known


def write_choices(path: Path, measured: Mapping[str, Choice]) -> None:
    """Add to the file, which another process may have changed meanwhile; a folder that cannot be written is no
    error."""
    if measured:
        merged = {**read_choices(path), **measured}
        replace_file(path, msgspec.json.format(msgspec.json.encode(merged), indent=1))
