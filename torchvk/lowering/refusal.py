"""Why a part of an exported program is not lowered."""

from __future__ import annotations


class Refused(Exception):
    """Raised while a node is translated: torchvk cannot run it. The message is the reason that users read."""
