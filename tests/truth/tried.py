"""What a diagnosis tried against a planted fault, held to what cures it by hand."""

import copy
import random
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from stabilitykit.formats import FORMATS
from stabilitykit.records.trials import Diagnosis, Trial
from stabilitykit.trials.diagnose import diagnose_run
from truth.by_hand.dtypes import low
from truth.cures import ByHand, by_hand
from truth.row import Planted, Row

# One operator in float32 is called by what it makes.
_SAME = {"float32 operator": ("float32 operator", "float32 scores", "float32 logits", "mask in float32")}
# What the verdict of the records proposes, and what it is called where it is tried.
_PROPOSED = {
    r"(?<!not )scale the residual stream down": ("rescale",),
    r"wider range \([^)]*bfloat16": ("bfloat16",),
    r"wider range \([^)]*float32": ("float32",),
    r"fold the scale into": ("scale on queries",),
    r'attn_implementation="sdpa"': ("sdpa attention",),
    r"routing weight before down_proj": ("routing weights in experts",),
    r"compute this norm in float32": ("float32 norms",),
    r"compute the logits in float32": ("float32 logits",),
    r"half of the dtype's minimum": ("mask at half the minimum",),
    r"the attention's scale by 2\^k": ("query and key factors",),
    r"the output projection by 2\^k": ("value and output factors",),
    r"(?:up_proj|wi_1) by 2\^-k": ("up and down factors",),
}
_FAILED = re.compile(r"^(Tried without success|It is not the format|Nothing that was tried)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """`cured` are the remedies that cure it by hand; of these `untried` were not tried, and `unshown` were, but not
    shown to cure. `false` were shown to cure and do not, `advised` failed and are advised. `touched` says what else is
    not as it was.
    """

    key: str
    family: str
    wrong: bool
    cured: tuple[str, ...]
    untried: tuple[str, ...] = ()
    unshown: tuple[str, ...] = ()
    false: tuple[str, ...] = ()
    advised: tuple[str, ...] = ()
    touched: tuple[str, ...] = ()
    raised: str | None = None
    said: str = ""
    trials: dict[str, str] = field(default_factory=dict)

    @property
    def faults(self) -> tuple[str, ...]:
        parts = {
            "not tried": self.untried, "tried and not shown to cure": self.unshown, "shown to cure and does not":
            self.false, "failed and advised": self.advised, "changed": self.touched,
        }  # fmt: skip
        found = [f"{what}: {', '.join(names)}" for what, names in parts.items() if names]
        return (*found, *([self.raised] if self.raised else []))


def tried(row: Row, hand: ByHand | None = None) -> Tried:
    """Diagnoses the row, and compares with what was found by hand."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hand = hand or by_hand(row)
        torch.manual_seed(0)
        planted = row.make()
        before = _state(planted.model)
        try:
            diagnosis = diagnose_run(planted.model, planted.run, dtype=dtype_of(row, planted), grad=planted.grad)
        except Exception as error:
            return Tried(
                key=row.key, family=row.family, wrong=hand.wrong, cured=hand.cures,
                raised=f"{type(error).__name__}: {str(error)[:300]}",
            )  # fmt: skip
        after = _state(planted.model)
    trials = {trial.name: trial for trial in diagnosis.trials}
    untried = tuple(name for name in hand.cures if not any(one in trials for one in _SAME.get(name, (name,))))
    unshown = tuple(name for name in hand.cures if name not in untried and not _cured(trials, name))
    false = [name for name, one in trials.items() if one.cured and _fails(hand, name)]
    if planted.expected is None and not _is_calm(diagnosis):
        false.append("an alarm")
    return Tried(
        key=row.key,
        family=row.family,
        wrong=hand.wrong,
        cured=hand.cures,
        untried=untried,
        unshown=unshown,
        false=tuple(false),
        advised=tuple(sorted(set(advised(diagnosis)))),
        touched=tuple(name for name, value in before.items() if after[name] != value),
        said=diagnosis.advice,
        trials={name: f"{_said(one)}" for name, one in trials.items()} | dict(diagnosis.left_out),
    )


def _is_calm(diagnosis: Diagnosis) -> bool:
    """Whether nothing is said to be wrong: the run is finite, and only other dtypes were run to see it."""
    is_harmful = diagnosis.harm is not None and diagnosis.harm.harmful
    return diagnosis.finite and not is_harmful and {one.name for one in diagnosis.trials} <= set(FORMATS)


def dtype_of(row: Row, planted: Planted) -> str | None:
    """The dtype that fails: that of the weights; float16 where it is autocasting that computes in it."""
    if row.name == "autocast" or low(planted) is not None:
        return None if low(planted) is None or list(planted.model.parameters()) else "float16"
    dtypes = [one.dtype for one in (*planted.model.parameters(), *planted.model.buffers()) if one.is_floating_point()]
    return str(dtypes[0]).removeprefix("torch.")


def _cured(trials: dict[str, Trial], name: str) -> bool:
    return any(trials[one].cured for one in _SAME.get(name, (name,)) if one in trials)


def _fails(hand: ByHand, name: str) -> bool:
    """Whether it certainly fails by hand. What raises there could not be done by hand; and a scaling of all weights may
    be another one than that of the residual stream.
    """
    one = hand.tried.get(name)
    return hand.wrong and one is not None and one.cured is False and one.error is None and name != "rescale"


def advised(diagnosis: Diagnosis) -> list[str]:
    """What was tried, failed, and is advised all the same."""
    failed = [trial.name for trial in diagnosis.trials if not trial.cured]
    good = " ".join(one for one in re.split(r"(?<=\.) (?=[A-Z])", diagnosis.advice) if not _FAILED.match(one))
    found = [name for name in failed if re.search(rf"(?<![\w-]){re.escape(name)} (?:cures|\()", good)]
    for words, names in _PROPOSED.items():
        if re.search(words, diagnosis.verdict, re.IGNORECASE):
            found += [name for name in names if name in failed]
    return found


def _said(one: Trial) -> str:
    far = None if one.distance is None else one.distance.error_max
    return f"{'cures' if one.cured else 'finite' if one.finite else 'not finite'}, {far}, {one.then}"


def _state(model: nn.Module) -> dict[str, Any]:
    """Everything that a diagnosis must leave as it is."""
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_state_dict_hooks",
        "_load_state_dict_pre_hooks",
    )
    state: dict[str, Any] = {
        "weights": {name: (one.dtype, _bytes(one)) for name, one in model.state_dict().items()},
        "buffers": {name: _bytes(one) for name, one in model.named_buffers()},
        "gradients": {name: None if one.grad is None else _bytes(one.grad) for name, one in model.named_parameters()},
        "hooks": {name: [len(getattr(one, kind)) for kind in hooks] for name, one in model.named_modules()},
        "training": [one.training for one in model.modules()],
        "attributes": [copy.copy(_plain(one)) for one in model.modules()],
        "torch's random numbers": torch.get_rng_state().tolist(),
        "Python's random numbers": random.getstate(),
    }
    return state


def _plain(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, float | int | str)}


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() and tensor.ndim else b""
