"""The tally of a tensor in torch's own operators: on any device, several passes over the elements, no wait for any.

Of devices without float64 (MPS) the caller brings the tensor to the CPU.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from stabilitykit.recorder.kernels.layout import FIELDS, SHRINK, Edges, Field, infinity_code

_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
_EXPONENT_BITS = {torch.float32: 8, torch.float64: 11}


def tally(tensor: Tensor, edges: Edges, hidden: Tensor | None = None, limit: float = math.inf) -> Tensor:
    """A row as in `layout`, float64 on the tensor's device, of a floating tensor with any strides.

    An element is masked where `hidden`, boolean and of the tensor's shape, is True and it is not above `limit`.
    """
    values = tensor.detach().to(edges.wide)
    codes = values.view(_INTEGERS[edges.wide]) & torch.iinfo(_INTEGERS[edges.wide]).max
    infinity = infinity_code(edges.wide)
    masked = torch.zeros_like(codes, dtype=torch.bool) if hidden is None else hidden & (values <= limit)
    kept = (codes < infinity) & ~masked
    lost = (codes >= infinity) & ~masked
    row = torch.zeros(edges.width, dtype=torch.float64, device=tensor.device)
    row[Field.MASKED] = masked.sum()
    row[Field.NAN] = ((codes > infinity) & lost).sum()
    row[Field.PLUS] = ((values == math.inf) & lost).sum()
    row[Field.MINUS] = ((values == -math.inf) & lost).sum()
    row[Field.AMAX] = -1.0
    row[Field.SMALLEST], row[Field.MINIMUM], row[Field.MAXIMUM] = math.inf, math.inf, -math.inf
    if tensor.numel() == 0:
        return row

    codes = torch.where(kept, codes, -1).reshape(-1)
    magnitudes = values.abs().double().reshape(-1)
    row[Field.INDEX] = codes.argmax()
    row[Field.AMAX] = torch.where(kept.reshape(-1), magnitudes, -1.0).max()
    row[Field.SMALLEST] = torch.where(codes > 0, magnitudes, math.inf).min()
    row[Field.MINIMUM] = values.where(kept, math.inf).min()
    row[Field.MAXIMUM] = values.where(kept, -math.inf).max()
    finite = values.where(kept, 0.0).double()
    scale = row[Field.AMAX].clone() if edges.wide == torch.float64 else torch.ones_like(row[0])  # no square overflows
    scale = torch.where(scale > 0, scale, 1.0)
    row[Field.SUM], row[Field.SQUARES], row[Field.SCALE] = finite.sum(), (finite / scale).square().sum(), scale
    if edges.wide == torch.float64:
        row[Field.SHRUNK] = (finite / SHRINK).sum()
    at_least = (codes.shape[0] - torch.searchsorted(codes.sort().values, _bounds(edges, codes.device))).double()
    row[FIELDS : FIELDS + edges.count] = at_least[: edges.count]
    row[FIELDS + edges.count :] = at_least[edges.count : -1] - at_least[edges.count + 1 :]
    return row


@lru_cache(maxsize=64)
def _bounds(edges: Edges, device: torch.device) -> Tensor:
    """The codes of `edges`, of all powers of two that it has bins for, and of infinity.

    Made where they are needed: a copy from the CPU would wait for all that the device has yet to do.
    """
    integer = _INTEGERS[edges.wide]
    with torch.inference_mode(False):  # or it could not be used again outside of that mode
        mantissa = infinity_code(edges.wide).bit_length() - _EXPONENT_BITS[edges.wide]
        place = torch.arange(edges.bins + 1, dtype=integer, device=device)  # the last power is infinity
        one = torch.ones_like(place)
        powers = torch.where(place < mantissa, one << place.clamp(max=mantissa), (place - mantissa + 1) << mantissa)
        codes = [torch.full((1,), code, dtype=integer, device=device) for code in edges.codes.tolist()]
        return torch.cat((*codes, powers))
