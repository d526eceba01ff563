"""What makes a draft smaller and faster and leaves its results as they are. Every pass gives a new draft."""

from torchvk.lowering.draft import Draft
from torchvk.lowering.passes.activations import fuse_activations
from torchvk.lowering.passes.attention import fuse_attention
from torchvk.lowering.passes.clean import remove_dead, share
from torchvk.lowering.passes.conv import fuse_conv
from torchvk.lowering.passes.epilogue import fuse_epilogue
from torchvk.lowering.passes.fold import fold_constants, fold_parameters
from torchvk.lowering.passes.layout import move_permutes
from torchvk.lowering.passes.linear import fuse_linear
from torchvk.lowering.passes.qdq import drop_pairs, requantize
from torchvk.lowering.passes.quantized_conv import look_behind_permutes, move_weights, quantize_conv
from torchvk.lowering.passes.quantized_elementwise import fuse_quantized_elementwise
from torchvk.lowering.passes.quantized_linear import fuse_quantized_linear
from torchvk.lowering.passes.quantized_movement import move_integers
from torchvk.lowering.passes.quantized_sum import fuse_quantized_sums
from torchvk.lowering.passes.sums import fuse_sums
from torchvk.lowering.passes.views import simplify_views

# Views first: what they hide (a transposed weight, a broadcast bias) is what the others look for.
# Quantized operators before constants are folded, which would make floats of quantized weights.
PASSES = (
    *(simplify_views, fold_parameters, fuse_activations, look_behind_permutes, move_permutes, simplify_views),
    *(move_integers, drop_pairs, move_weights, fuse_conv),
    *(quantize_conv, fuse_quantized_linear, requantize, fuse_quantized_elementwise, fuse_quantized_sums),
    *(fuse_attention, fuse_linear, fuse_epilogue, fuse_sums),
    *(fold_constants, share, remove_dead),
)
MAX_ROUNDS = 8


def optimize(draft: Draft) -> Draft:
    """All passes, until the draft stays as it is."""
    for _ in range(MAX_ROUNDS):
        before = _shape(draft)
        for change in PASSES:
            draft = change(draft)
        if _shape(draft) == before:
            break
    return draft


def _shape(draft: Draft) -> list[tuple[object, ...]]:
    """What is compared to see whether a round changed something."""
    names: dict[object, int] = {}

    def name(value: object) -> int:
        return names.setdefault(value, len(names))

    return [(call.op, str(call.attributes), *map(name, call.inputs), *map(name, call.outputs)) for call in draft.calls]


__all__ = ["optimize"]
