"""Settings of sampling: what no dtype cures, because it is asked for."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from stabilitykit.diagnosis.outside import processor_of
from stabilitykit.models.gemma.sampler import Sampler
from stabilitykit.trials.altered import Altered
from stabilitykit.trials.answers import answers
from stabilitykit.trials.attributes import attribute
from stabilitykit.trials.candidate import Candidate
from stabilitykit.trials.sampling import processors, settings
from stabilitykit.trials.situation import Situation

WIDE = "temperature in float32"
_TEMPERATURE, _TOP_K, _TOP_P = "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper"
_SETTINGS = {
    _TEMPERATURE: "temperature=1.0",
    "SuppressTokensLogitsProcessor": "suppress_tokens=None",
    "SuppressTokensAtBeginLogitsProcessor": "begin_suppress_tokens=None",
    "NoBadWordsLogitsProcessor": "bad_words_ids=None",
    "SequenceBiasLogitsProcessor": "sequence_bias=None",
    "RepetitionPenaltyLogitsProcessor": "repetition_penalty=1.0",
    "NoRepeatNGramLogitsProcessor": "no_repeat_ngram_size=0",
    "PrefixConstrainedLogitsProcessor": "prefix_allowed_tokens_fn=None",
    "MinLengthLogitsProcessor": "min_length=0",
    "MinNewTokensLengthLogitsProcessor": "min_new_tokens=0",
    "ForcedBOSTokenLogitsProcessor": "forced_bos_token_id=None",
    "ForcedEOSTokenLogitsProcessor": "forced_eos_token_id=None",
    "ExponentialDecayLengthPenalty": "exponential_decay_length_penalty=None",
    "MinPLogitsWarper": "min_p=None",
    "TypicalLogitsWarper": "typical_p=1.0",
    "EpsilonLogitsWarper": "epsilon_cutoff=0.0",
    "EtaLogitsWarper": "eta_cutoff=0.0",
}
"""What `generate` is to be told, so that it makes no such processor."""


def sampled(situation: Situation) -> Iterator[Candidate]:
    """Where the logits are finite, and what is made of them to choose a token is not."""
    broke = situation.broke
    if broke is None or broke.broke is None:
        return
    is_kits = broke.site.startswith("sampler/")
    if not is_kits and not situation.is_outside:
        return
    names, draws = _found(situation)
    by = broke.broke.outside
    if not is_kits and not (names and (processor_of(broke) or by in names or _raised(situation))):
        return
    if draws or not names:
        yield _candidate(
            situation,
            "greedy",
            "Takes the most likely token in place of drawing one.",
            "do_sample=False",
            partial(settings, greedy=True),
        )
    if _TOP_K in names or not names:
        yield _candidate(situation, "top-k off", "Leaves out top-k.", "top_k=0", partial(settings, top_k=False))
    if _TOP_P in names or not names:
        yield _candidate(situation, "top-p off", "Leaves out top-p.", "top_p=1.0", partial(settings, top_p=False))
    if broke.operator == "div" and broke.dtype in ("float16", "bfloat16"):
        yield _candidate(
            situation,
            WIDE,
            "Divides the logits by the temperature in float32, and leaves them there.",
            "",
            _wide_temperature,
        )
    for name in dict.fromkeys(one for one in names if one not in (_TOP_K, _TOP_P)):
        yield _candidate(
            situation, f"without {name}", _left_out(name), _SETTINGS.get(name, ""), partial(_without, name)
        )


def _candidate(situation: Situation, name: str, summary: str, setting: str, around: Any) -> Candidate:
    broke = situation.broke
    command = f"model.generate(..., {setting})" if setting else f"# leave {name[8:]} out of logits_processor"
    if broke is not None and broke.site.startswith("sampler/"):
        command = _OF_THE_KIT[name]
    elif name == WIDE:
        command = "# scores.float() / temperature, in a logits processor of your own, with temperature=1.0"
    return Candidate(name=name, summary=summary, command=command, instead=Altered(situation.reproduction, around))


_OF_THE_KIT = {
    "greedy": "model.sampler(logits, temperature=None)",
    "top-k off": "model.sampler(logits, top_k=logits.shape[-1])",
    "top-p off": "model.sampler(logits, top_p=1.0)",
    WIDE: "model.sampler(logits.float(), temperature=temperature)",
}


def _left_out(name: str) -> str:
    how = f", as {_SETTINGS[name]} does" if name in _SETTINGS else ""
    return f"Leaves out {name}{how}."


def _raised(situation: Situation) -> bool:
    return "probability tensor" in (situation.low.header.error or "")


def _found(situation: Situation) -> tuple[list[str], bool]:
    """The processors that the failing run has, in their order, and whether it draws tokens."""
    names: list[str] = []
    draws: list[bool] = []

    def look(found: list[Any], config: Any) -> list[Any]:
        names.extend(type(one).__name__ for one in found)
        draws.append(bool(getattr(config, "do_sample", False)))
        return found

    answers(situation.reproduction, situation.model, around=processors(situation.model, look))
    own = ("Choices",)  # what looks at the scores in a trial
    return [name for name in names if name not in own], any(draws)


def _without(name: str, model: nn.Module) -> AbstractContextManager[None]:
    return processors(model, lambda found, config: [one for one in found if type(one).__name__ != name])


@contextmanager
def _wide_temperature(model: nn.Module) -> Iterator[None]:
    def change(found: list[Any], config: Any) -> list[Any]:
        return [_Wide(one.temperature) if type(one).__name__ == _TEMPERATURE else one for one in found]

    with ExitStack() as stack:
        stack.enter_context(processors(model, change))
        for module in model.modules():
            if isinstance(module, Sampler):
                stack.enter_context(attribute(module, "forward", _widened(module.forward)))
        yield


def _widened(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda logits, **how: forward(logits.float(), **how)


class _Wide:
    """Divides scores in float32."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.float() / self.temperature
