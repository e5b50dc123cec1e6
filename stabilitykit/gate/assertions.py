"""What a test asserts of a model's numbers, for any PyTorch model; messages read like the verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from stabilitykit.diagnosis.layers import stored
from stabilitykit.diagnosis.outcome import is_harmless
from stabilitykit.diagnosis.places import place_of, where
from stabilitykit.diagnosis.verdict import is_finite, verdict
from stabilitykit.errors import MisuseError
from stabilitykit.formats import number_format
from stabilitykit.models.devices import parse_dtype
from stabilitykit.recorder import record
from stabilitykit.records import Record, Recording
from stabilitykit.records.trials import Distance
from stabilitykit.report.style import share
from stabilitykit.trials.answers import Answers, answers
from stabilitykit.trials.compare import compare
from stabilitykit.trials.reproduction import Given, called, copied, dtype_of, same_draws
from stabilitykit.words import counted, number

Inputs = Mapping[str, Any] | Sequence[Any]
"""The arguments of one call: by name in a dict, or in their order in a tuple or list."""

_NAMED = 3  # sites in a message


class Stability:
    """Each method calls the model once, or twice, with copies of `inputs`, and raises AssertionError where it fails.

    `inputs` are a dict of keyword arguments, or a tuple of positional ones; floating ones in the model's dtype are cast
    along with it. In its own dtype, which is taken where `dtype` is None, the model runs as it is; in another one a
    copy does. No gradients are made. Raise MisuseError for an unknown dtype, other inputs, and a model that cannot be
    copied; what the model itself raises is passed on.
    """

    def assert_finite(self, model: nn.Module, inputs: Inputs, *, dtype: str | torch.dtype | None = None) -> Recording:
        """Nothing leaves the range, unless it ends as the true value would have, and what is returned is finite.

        An overflow that ends on the way as another number fails too. Returns the recording.
        """
        __tracebackhide__ = True
        recording = _recorded(model, inputs, dtype)
        if _leaves_range(recording):
            raise AssertionError(verdict(recording, tries=False))
        return recording

    def assert_headroom(
        self, model: nn.Module, inputs: Inputs, *, bits: float = 1.0, dtype: str | torch.dtype | None = None
    ) -> Recording:
        """Every tensor that is stored in the dtype keeps at least `bits` below its maximum. Returns the recording."""
        __tracebackhide__ = True
        recording = self.assert_finite(model, inputs, dtype=dtype)
        low = sorted((one for one in stored(recording) if _headroom(one) < bits), key=_headroom)
        if low:
            more = f" {counted(len(low) - _NAMED, 'more tensor')} have less, too." if len(low) > _NAMED else ""
            raise AssertionError(" ".join(_low(recording, one, bits) for one in low[:_NAMED]) + more)
        return recording

    def assert_close_to_float32(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        kl: float | None = 1e-3,
        error: float | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> Distance:
        """What the model returns in `dtype` is as near to what the same weights give in float32.

        `kl` is the largest mean KL divergence from float32's distributions, in nats a row of logits; where nothing that
        is returned is known to be logits, the first tensor counts as some. `error` is the largest difference in any
        row, in parts of float32's largest magnitude, of every tensor that is returned. None leaves one out. Raises
        MisuseError where float32 itself is not finite. Returns the distance.
        """
        __tracebackhide__ = True
        args, kwargs = _arguments(inputs)
        name = _name(model, dtype, inputs)
        run = Given(given=model, call=called(model, "__call__", args, kwargs), dtype=name)
        ours, theirs = answers(run, run.model(name)), answers(run, run.model("float32"))
        for answer in (ours, theirs):
            if answer.error is not None:
                raise MisuseError(f"{type(model).__name__} could not be called with these inputs: {answer.error}")
        if any(output.lost for output in theirs.outputs):
            raise MisuseError("float32 itself does not stay finite on these inputs, so there is nothing to be near to.")
        found = compare(ours, theirs).distance()
        if found.compared < found.rows:
            raise AssertionError(verdict(_recorded(model, inputs, dtype), tries=False))
        if kl is not None and found.kl_mean is None:
            found = compare(_as_logits(ours), _as_logits(theirs)).distance()
        told = _far(found, name, kl, error)
        if told:
            raise AssertionError(" ".join(told))
        return found


def _recorded(model: nn.Module, inputs: Inputs, dtype: str | torch.dtype | None) -> Recording:
    args, kwargs = _arguments(inputs)
    name = _name(model, dtype, inputs)
    own = model if name == dtype_of(model, inputs) else copied(model, name)
    call = called(model, "__call__", args, kwargs)
    with torch.no_grad(), same_draws(), record(own, formats=()) as recording:
        call(own)
    if not len(recording):
        raise MisuseError(f"Nothing that {type(model).__name__} computes was recorded, so nothing can be asserted.")
    return recording


def _arguments(inputs: Inputs) -> tuple[Sequence[Any], Mapping[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), inputs
    if isinstance(inputs, Sequence) and not isinstance(inputs, str):
        return inputs, {}
    raise MisuseError(
        f"inputs are a dict of arguments by name, or a tuple of them in order; got {type(inputs).__name__}. Write "
        "(x,) for a single one."
    )


def _name(model: nn.Module, dtype: str | torch.dtype | None, inputs: Inputs) -> str:
    if not isinstance(model, nn.Module):
        raise MisuseError(f"A torch.nn.Module is asserted about; got {type(model).__name__}.")
    own = dtype_of(model, inputs)
    return own if dtype is None else str(parse_dtype(dtype)).removeprefix("torch.")


def _leaves_range(recording: Recording) -> bool:
    broken = recording.first_break() is not None and not is_harmless(recording)
    return broken or not is_finite(recording)


def _headroom(one: Record) -> float:
    return number_format(one.dtype).headroom(one.amax or 0.0)


def _low(recording: Recording, one: Record, bits: float) -> str:
    place = where(one) + place_of(recording, one.amax_position, one.amax_row, one.amax_token, one.step)
    form = number_format(one.dtype)
    return (
        f"{one.dtype} has {_headroom(one):.2f} bits of headroom in {place}, and {bits:g} are asked for: the largest "
        f"magnitude is {number(one.amax)}, the maximum {number(form.largest)}."
    )


def _as_logits(found: Answers) -> Answers:
    first = [replace(output, logits=True) for output in found.outputs[:1]]
    return replace(found, outputs=[*first, *found.outputs[1:]])


def _far(found: Distance, dtype: str, kl: float | None, error: float | None) -> list[str]:
    told = []
    if kl is not None and found.kl_mean is not None and found.kl_max is not None and not found.kl_mean <= kl:
        same = "" if found.top1 is None else f" The likeliest is the same in {share(found.top1)} of them."
        told.append(
            f"{dtype} is far from float32: the mean KL divergence is {found.kl_mean:.3g} nats a row over "
            f"{counted(found.compared, 'row')}, {found.kl_max:.3g} at most, and {kl:g} is the limit.{same}"
        )
    if error is not None and found.error_max is not None and not found.error_max <= error:
        told.append(
            f"{dtype} is far from float32: the largest difference is {found.error_max:.3g} of float32's largest "
            f"magnitude, and {error:g} is the limit."
        )
    return told
