"""Failures on demand: float16's, and those that look like it. Each runs for real and raises torch's own error."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stabilitykit.checkpoints.checkpoint import Checkpoint
from stabilitykit.diagnosis.cause import CauseName
from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma import Gemma
from stabilitykit.models.gemma.tokenizer import Tokenizer
from stabilitykit.models.subject import Sampling, Subject
from stabilitykit.run.batch import Asked
from stabilitykit.run.case import Progress, Run, run_case, stage
from stabilitykit.run.inputs import Tensors, row_of
from stabilitykit.run.source import open_source
from stabilitykit.scaling.stressed import stressed

PROMPT = "The capital of France is"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a scenario starts from: a checkpoint, or the name of a model that transformers runs, as `hf:FOLDER`.
    `rescale` multiplies the scenario's own. `keep_operands` and `redact` are what `record` makes of them.
    """

    checkpoint: Checkpoint | str
    prompt: str | Asked | Tensors = PROMPT
    device: str = "cpu"
    rescale: float = 1.0
    keep_operands: bool = False
    redact: bool = False
    progress: Progress | None = None

    def run(self, model: Gemma | Subject, tokens: Sequence[int] | None = None, **how: Any) -> Run:
        """A case of `run_case`, with the prompt's own tokens unless given."""
        return run_case(
            model,
            self.tokens() if tokens is None else tokens,
            progress=self.progress,
            keep_operands=self.keep_operands,
            redact=self.redact,
            **how,
        )

    @property
    def own(self) -> Checkpoint:
        """Raises MisuseError where it is transformers that is to run the model."""
        if isinstance(self.checkpoint, str):
            raise MisuseError(
                f"This scenario changes how the kit's own Gemma loads, masks or samples, and transformers runs "
                f"{self.checkpoint}. Of hf: models float16-overflow is the one scenario; for the others take a Gemma 1 "
                "to 3 without hf:, such as gemma3-270m."
            )
        return self.checkpoint

    def tokens(self) -> list[int]:
        if isinstance(self.prompt, Tensors):
            row = row_of(self.prompt.given)
            if row is None:
                raise MisuseError(f"{self.prompt.name}: the kit's own model reads one row of input_ids [1, T].")
            return row
        asked = Asked(text=self.prompt) if isinstance(self.prompt, str) else self.prompt
        tokenizer = Tokenizer(self.own.vocabulary)
        if not asked.chat:
            return tokenizer.encode(asked.text)
        generation = self.own.config.generation
        return tokenizer.chat(asked.text, generation=generation, system=asked.system, earlier=asked.earlier)

    def model(self, dtype: str, rescale: float = 1.0) -> Gemma:
        announce = stage(f"{dtype}: preparing weights", self.progress)
        return stressed(self.own, rescale * self.rescale, dtype=dtype, device=self.device, progress=announce)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """`expected` is the cause that the diagnosis must find for the failure to count as reproduced."""

    name: str
    summary: str
    expected: CauseName
    run: Callable[[Setup], Run]


def _float16_overflow(setup: Setup) -> Run:
    if isinstance(setup.checkpoint, str):
        source = open_source(setup.checkpoint, setup.prompt, device=setup.device, rescale=setup.rescale)
        subject = source.subject_in("float16", stage("float16: preparing weights", setup.progress))
        return setup.run(subject, source.tokens, given=source.given)
    return setup.run(setup.model("float16"))


def _int8_without_scalers(setup: Setup) -> Run:
    """Quantises as gemma_pytorch does, one scaler per output row, and loads that as if it were float."""
    state: dict[str, Tensor] = {}
    for name, tensor in setup.own.tensors.items():
        if tensor.ndim == 2:
            scaler = tensor.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
            state[name] = (tensor / scaler[:, None]).round().to(torch.int8)
            state[f"{name}_scaler"] = scaler
        else:
            state[name] = tensor
    return _loaded_loosely(setup, state)


def _other_parameter_names(setup: Setup) -> Run:
    """gemma_pytorch's names for the layers, which this model does not have."""
    return _loaded_loosely(setup, {f"transformer.{name}": t for name, t in setup.own.tensors.items()})


def _loaded_loosely(setup: Setup, state: dict[str, Tensor]) -> Run:
    """`load_state_dict(strict=False)` into memory nobody has written to.

    What such memory holds is chance; torch's own switch fills it with NaN, so that the failure is the same each
    time and no run passes by luck.
    """
    switches = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        switches.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )
    with torch.device("meta"):
        model = Gemma(setup.own.config)
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        switches.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        model = model.to(torch.float16).to_empty(device=setup.device).eval().requires_grad_(False)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switches.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]
    model.lm_head.weight = model.embed_tokens.weight
    keys = model.load_state_dict(state, strict=False)
    model.source, model.sha256 = setup.own.source, setup.own.sha256
    model.vocabulary = setup.own.vocabulary
    missing = [name for name in keys.missing_keys if name != "lm_head.weight"]
    loading = {"missing": missing, "unexpected": list(keys.unexpected_keys)}
    return setup.run(model, facts={"loading": loading})


def _top_k_zero(setup: Setup) -> Run:
    return setup.run(setup.model("float32"), sampling=Sampling(top_k=0))


def _top_p_negative(setup: Setup) -> Run:
    return setup.run(setup.model("float32"), sampling=Sampling(top_p=-0.1))


def _tiny_temperature(setup: Setup) -> Run:
    """With the residual stream scaled down, so that float16 holds everything before the sampler."""
    return setup.run(setup.model("float16", rescale=0.25), sampling=Sampling(temperature=1e-4))


def _masked_row(setup: Setup) -> Run:
    """Left padding, hidden by -inf from everyone: the padded rows then see nothing at all."""
    padding, tokens = 2, setup.tokens()
    model = setup.model("float32")
    length = padding + len(tokens)
    query, key = torch.arange(length)[:, None], torch.arange(length)
    seen = (key <= query) & (key >= padding)
    mask = torch.zeros(1, 1, length, length).masked_fill(~seen, -torch.inf).to(model.device)
    return setup.run(model, tokens, left_padding=padding, mask=mask)


SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario(
            name="float16-overflow",
            summary="the residual stream leaves float16's range",
            expected="range",
            run=_float16_overflow,
        ),
        Scenario(
            name="int8-without-scalers",
            summary="an int8 checkpoint in a model without quantised layers",
            expected="int8-scalers-dropped",
            run=_int8_without_scalers,
        ),
        Scenario(
            name="parameter-names",
            summary="a checkpoint with other parameter names, strict=False",
            expected="parameter-names",
            run=_other_parameter_names,
        ),
        Scenario(name="top-k-zero", summary="sampling with top_k = 0", expected="top-k", run=_top_k_zero),
        Scenario(name="top-p-negative", summary="sampling with top_p < 0", expected="top-p", run=_top_p_negative),
        Scenario(
            name="tiny-temperature",
            summary="temperature 1e-4 in float16, logits finite",
            expected="temperature",
            run=_tiny_temperature,
        ),
        Scenario(
            name="masked-row",
            summary="an attention row in which -inf hides every key",
            expected="masked-row",
            run=_masked_row,
        ),
    )
}


def scenario(name: str) -> Scenario:
    """Raises MisuseError, listing the names, for an unknown one."""
    try:
        return SCENARIOS[name]
    except KeyError:
        raise MisuseError(f"Unknown scenario {name!r}; choose one of: {', '.join(SCENARIOS)}.") from None
