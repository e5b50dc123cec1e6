"""Logits processors for `generate()`: one that needs no guard, and those that a guard puts around a call's own."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from stabilitykit.errors import MisuseError
from stabilitykit.guards.breaks import NumericalBreak, RowBreak
from stabilitykit.guards.log import tell
from stabilitykit.recorder.pending import transfer
from stabilitykit.recorder.tensors import aside


def ended(scores: Tensor, rows: Sequence[int], token: int) -> Tensor:
    """`scores` [B, V] with `token` as the only choice in `rows`: it ends them, and stands for no score of the model."""
    with aside():
        made = scores.clone()
        made[list(rows)] = -torch.inf
        made[list(rows), token] = 0.0
    return made


def lost(scores: Tensor) -> Tensor:
    """For each row of `scores` [B, V] 0 where a token can be chosen, 1 where every score is -inf, 2 for NaN or +inf."""
    with aside():
        largest = scores.amax(-1)
        return (largest == -torch.inf).float() + 2 * (largest.isnan() | (largest == torch.inf)).float()


def of_scores(kinds: Sequence[float], ids: Tensor, step: int, site: str | None = None) -> list[RowBreak]:
    """A break for each row whose kind is not 0, as `lost` gives them."""
    return [
        RowBreak(
            row=row,
            phase="decode" if step else "prefill",
            step=step,
            position=ids.shape[1] - 1 if ids.shape[1] else None,
            token=int(ids[row, -1]) if ids.shape[1] else None,
            seen="scores",
            kind="no-token" if kind == 1 else "not-finite",
            site=site,
            unexamined="a logits processor sees scores alone; guard(model) names what made them",
        )
        for row, kind in enumerate(kinds)
        if kind
    ]


class StabilityGuard:
    """A logits processor that looks at every row's scores before a token is chosen, and needs nothing else.

        model.generate(**inputs, logits_processor=[StabilityGuard(eos=tokenizer.eos_token_id)])

    A row with NaN or +inf in its scores, or with no token left, is listed in `breaks`. "stop" ends it alone: `eos` is
    its only choice from there on, which stands for no score of the model. "raise" raises NumericalBreak, before
    `torch.multinomial` can end a CUDA context. "warn" logs it and leaves the scores as they are. A callable is given
    the breaks of a step, and returns one of the three or None for "warn". Scores of sound rows keep their bits. It
    waits for the device once a step. `position` counts the ids that `generate` has, which do not hold a prompt of
    embeddings. One belongs to one call of `generate` at a time, without beams, which change the places of rows.

    Raises MisuseError for an unknown `on_break`, "retry", which needs the model, and "stop" without `eos`.
    """

    def __init__(
        self,
        eos: int | None = None,
        on_break: Literal["stop", "raise", "warn"] | Callable[[Sequence[RowBreak]], str | None] | None = None,
    ) -> None:
        how: object = on_break or ("raise" if eos is None else "stop")
        if how == "retry":
            raise MisuseError("A logits processor has no model to repeat a step with; use guard(model, 'retry').")
        if not callable(how) and how not in ("stop", "raise", "warn"):
            raise MisuseError(f"unknown on_break {how!r}; choose one of: stop, raise, warn, or a callable")
        if how == "stop" and eos is None:
            raise MisuseError(
                "To stop a row StabilityGuard has to know the token that ends it: StabilityGuard(eos=...)."
            )
        self.breaks: list[RowBreak] = []
        self._how, self._eos = how, eos
        self._ended: dict[int, None] = {}
        self._known: set[int] = set()
        self._last: tuple[int, int] | None = None
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        goes_on = self._last == (input_ids.shape[0], input_ids.shape[1] - 1)
        self._last = input_ids.shape[0], input_ids.shape[1]
        if not goes_on:
            self._ended, self._known, self._step = {}, set(), 0
        kinds = [float(kind) for kind in transfer(lost(scores)).wait()]
        found = [one for one in of_scores(kinds, input_ids, self._step) if one.row not in self._known]
        self._step += 1
        if found:
            self._known |= {one.row for one in found}
            how = (self._how(found) or "warn") if callable(self._how) else self._how
            found = tell(found, how)
            self.breaks += found
            if how == "raise":
                raise NumericalBreak(found, sound=len(scores) - len(self._known))
            if how == "stop" and self._eos is not None:
                self._ended |= dict.fromkeys(one.row for one in found)
        return ended(scores, list(self._ended), self._eos) if self._ended and self._eos is not None else scores
