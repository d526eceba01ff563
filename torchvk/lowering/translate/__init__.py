"""One torch operator → operators of torchvk. A file per operator family, under the same name as in ``ops``."""

from torchvk.lowering.translate import (  # noqa: F401  # importing a family registers it
    conv,
    elementwise,
    indexing,
    linear,
    movement,
    normalization,
    pooling,
    quantize,
    reduction,
)
from torchvk.lowering.translate.registry import TRANSLATIONS, translate

__all__ = ["TRANSLATIONS", "translate"]
