"""The any-model program: powers of two on weights and settings that leave what float32 computes as it is."""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from stabilitykit.commands import repair
from stabilitykit.errors import MisuseError
from stabilitykit.records.scaling import UNCHANGED
from stabilitykit.remedies.remedy import LeftOut
from stabilitykit.scaling.look import look
from stabilitykit.scaling.program import UnsolvableError
from stabilitykit.scaling.subjects import blueprint_of
from stabilitykit.trials.answers import outputs_of
from stabilitykit.trials.candidate import Candidate
from stabilitykit.trials.recast import Recast
from stabilitykit.trials.reproduction import copied, dtype_of
from stabilitykit.trials.situation import Situation
from stabilitykit.words import counted

NAME = "rescale"
_NONE = "No exact scaling brings every tensor under the maximum."
_MARGIN = 1.0  # bits of headroom to ask for


def rescale(situation: Situation) -> Iterator[Candidate | LeftOut]:
    """Where something overflows float16 that scaling can bring into its range."""
    if situation.reproduction.dtype != "float16" or not situation.overflowing:
        return
    reproduction = situation.reproduction

    def run(model: nn.Module) -> list[Tensor]:
        """The outputs of every call of the model: what must stay as it is."""
        kept: list[Tensor] = []

        def hook(module: nn.Module, args: object, output: object) -> None:
            kept.extend(tensor for tensor, _ in outputs_of(module, output))

        handle = model.register_forward_hook(hook)
        in_its_own = Recast(getattr(torch, dtype_of(model))) if situation.asks else nullcontext()
        try:
            with in_its_own:
                result = reproduction.run(model)
        finally:
            handle.remove()
        return kept or [tensor for tensor, _ in outputs_of(model, result)]

    wide = situation.models.model("float32")
    if not any(one.is_floating_point() for one in wide.parameters()):
        yield LeftOut(NAME, "The model has no weights to scale.")
        return
    try:
        with torch.inference_mode():
            low = copied(wide, "bfloat16") if situation.casts else situation.models.model("bfloat16")
            traced = look(wide, low, [run], blueprint_of(wide))
            solution = traced.solve(margin=_MARGIN)
    except UnsolvableError:
        yield LeftOut(NAME, _NONE)
        return
    except (MisuseError, RuntimeError, TypeError, ValueError) as error:
        yield LeftOut(NAME, str(error).splitlines()[0] if str(error) else f"{type(error).__name__} while tracing.")
        return
    over = max((one.bits for one in solution.short), default=0.0)
    if solution.scaling == UNCHANGED or over > _MARGIN:
        yield LeftOut(NAME, _NONE)
        return
    scaling = solution.scaling
    changed = len(scaling.settings)
    settings = f" and {counted(changed, 'setting')}" if changed else ""
    named = reproduction.source
    yield Candidate(
        name=NAME,
        summary=f"Multiplies {counted(len(scaling.parameters), 'tensor')} of the weights{settings} by powers of two: "
        "the same function, to the last bit in float32.",
        command=_how(named),
        scaling=scaling,
        carried=True,
    )


def _how(named: str | None) -> str:
    """What does it to the model of that name, or to one without."""
    if named is None:
        return "stabilitykit.repair('hf:FOLDER', out='FOLDER-float16')  # of the folder that the model came from"
    return repair(named) or "# what `stabilitykit repair` does to a model on disk; that one is not stressed"
