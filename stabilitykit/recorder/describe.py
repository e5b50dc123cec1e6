"""`describe(array, where)`: the record of a tensor from an engine other than torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabilitykit.errors import MisuseError
from stabilitykit.recorder.custom import CustomStatistics, Statistic
from stabilitykit.recorder.entry import Entry
from stabilitykit.recorder.kernels.axes import axes_of
from stabilitykit.recorder.masks import Call
from stabilitykit.recorder.observation import Observation, form_of
from stabilitykit.recorder.observe import DEFAULT_FORMATS
from stabilitykit.recorder.origins import Origin
from stabilitykit.recorder.pending import Pending
from stabilitykit.recorder.places.streams import Step, Stream
from stabilitykit.recorder.tensors import NAMES, aside, measurable
from stabilitykit.records import Record

_DTYPES = {name: dtype for dtype, name in NAMES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Where in a forward pass a tensor was computed.

    `site` is its name in records, such as "layers.3.mlp/mul.0". `module` is the module that computed it (default: the
    site up to the slash), `operator` the operator, None for a module's output. `layer` is the decoder layer, from 0
    (default: read from the module's path). `step` counts forward passes, `order` tensors over all passes; both from 0.

    `dtype` is the dtype in which the engine stores the tensor, if `array` is a wider copy (default: the array's own).

    `rows` is the batch size, `positions` the number of new tokens per row in this pass, `start` the position of the
    first of them. They tell which dimension counts what; without them the record has no positions. `scores`: the last
    two dimensions are queries and keys.
    """

    site: str
    label: str | None = None
    module: str | None = None
    operator: str | None = None
    layer: int | None = None
    step: int = 0
    order: int = 0
    dtype: str | None = None
    rows: int | None = None
    positions: int | None = None
    start: int = 0
    scores: bool = False


def describe(
    array: Any,
    where: Where,
    *,
    masked: Any = None,
    formats: Sequence[str] = DEFAULT_FORMATS,
    statistics: Sequence[Statistic] = (),
    position_peaks: bool = False,
) -> Record:
    """The record of `array`: a torch tensor, a numpy array or anything `torch.as_tensor` accepts, of any shape.

        describe(numpy_array, Where(site="layers.0.mlp.down_proj", rows=1, positions=7))

    Statistics, counts and the exponent histogram equal those that `record` finds in the same tensor. Elements where
    `masked` (boolean, of the array's shape) is True count as masked and enter no other statistic. Non-finite elements
    are counted, but `broke` is None: a break is judged from the operands, which are not known here. `formats`,
    `statistics` and `position_peaks` are as in `record`; a statistic that raises is None.

    Raises MisuseError if `array` does not hold floating-point numbers, if `dtype` cannot hold them exactly, and for a
    mask of another shape or dtype.
    """
    tensor = _tensor(array, where)
    with aside():
        values = measurable(tensor)
    hidden = None if masked is None else _as_tensor(masked).to(values.device)
    if hidden is not None and (hidden.dtype != torch.bool or hidden.shape != values.shape):
        raise MisuseError(
            f"A mask is boolean and of the array's shape, {list(values.shape)}; got {hidden.dtype}, "
            f"{list(hidden.shape)}."
        )
    shape = tuple(values.shape)
    step = Step(where.step, where.start)
    step.streams.append(Stream("", where.start, where.rows or 1, where.positions or 0))
    axes = axes_of(shape, where.rows, where.positions, where.scores)
    form = form_of(tensor, values, shape, axes, tuple(formats))
    module = where.site.partition("/")[0] if where.module is None else where.module
    entry = Entry(step, module, where.site, where.operator, (0, 0, 0), form)
    seen = Observation(entry, Call("describe", []), values, hidden, form.axes, None, Origin("computed", where.site))
    row = seen.count(by_position=position_peaks)
    pending = Pending()
    CustomStatistics(statistics, pending).take(entry, values, hidden, None)
    pending.settle()
    seen.take(row.numpy(force=True) if isinstance(row, Tensor) else row)
    found = entry.record(where.order)
    return replace(found, label=where.label, layer=found.layer if where.layer is None else where.layer)


def _tensor(array: Any, where: Where) -> Tensor:
    """As a tensor of the dtype that it is stored in."""
    tensor = _as_tensor(array)
    if tensor.dtype not in NAMES:
        raise MisuseError(f"describe() expects floating-point numbers, got {tensor.dtype} at {where.site}.")
    if where.dtype is None:
        return tensor
    if where.dtype not in _DTYPES:
        raise MisuseError(f"unknown dtype {where.dtype!r}; choose one of: {', '.join(_DTYPES)}")
    with aside():
        stored = tensor.to(_DTYPES[where.dtype])
        back = stored.to(tensor.dtype)
        if not bool(((back == tensor) | (back.isnan() & tensor.isnan())).all()):
            raise MisuseError(f"The array at {where.site} holds numbers that {where.dtype} cannot hold exactly.")
    return stored


def _as_tensor(array: Any) -> Tensor:
    if isinstance(array, np.ndarray) and (not array.flags.writeable or any(step < 0 for step in array.strides)):
        array = array.copy()  # torch takes neither
    try:
        return torch.as_tensor(array).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise MisuseError(f"describe() expects an array that torch.as_tensor takes, got: {error}") from None
