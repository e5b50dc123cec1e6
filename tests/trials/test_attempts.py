"""Candidates that are run: what cannot be run says why, what ran already is not run again, batches are put together."""

from collections import namedtuple
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from stabilitykit.records.scaling import Scaling
from stabilitykit.trials.answers import answers
from stabilitykit.trials.attempts import Attempts
from stabilitykit.trials.batches import joined
from stabilitykit.trials.candidate import Candidate
from stabilitykit.trials.reproduction import Given, Kept
from stabilitykit.trials.situation import recorded


class Square(nn.Module):
    """Overflows float16, and counts how often it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([300.0, 2.0]), requires_grad=False)
        self.runs: list[str] = []

    def forward(self, given: Tensor) -> Tensor:
        self.runs.append(str(self.weight.dtype))
        return given.to(self.weight) * self.weight * self.weight


def square() -> Kept:
    return Kept(Given(Square().half(), lambda model: model(torch.ones(1, 2)), "float16"))


def test_a_change_that_cannot_be_made_says_why_and_not_what_breaks_without_it() -> None:
    models = square()
    reference = answers(models.of, models.model("float32"))
    unknown = Candidate(name="eps", summary="", command="", scaling=Scaling(parameters={}, settings={"eps": 1}))
    found = Attempts(models, "float32", reference).attempt(unknown)
    assert not found.finite
    assert found.then == "This model has no config, so its settings cannot be changed."
    plain = Attempts(models, "float32", reference).attempt(Candidate(name="plain", summary="", command=""))
    assert not plain.finite
    assert "90,000" in plain.then


def test_the_run_that_all_are_compared_with_is_not_run_again() -> None:
    models = square()
    wide: Any = models.model("float32")
    ran = recorded(models.of, wide)
    attempts = Attempts(models, "float32", ran.answers)
    runs = len(wide.runs)
    one = Candidate(name="float32", summary="", command="", dtype="float32")
    found = attempts.of_wide(one, ran)
    assert attempts.attempt(one) is found
    assert len(wide.runs) == runs == 1
    again = Attempts(models, "float32", ran.answers).bare(one)
    assert (again.finite, again.compared, again.then) == (found.finite, found.compared, found.then)
    assert len(wide.runs) == 2


Pair = namedtuple("Pair", ["hidden", "loss"])


def test_outputs_of_parts_of_a_batch_become_one_without_their_caches() -> None:
    parts = [torch.full((2, 3), 1.0), torch.full((1, 3), 2.0)]
    whole = torch.cat(parts)
    made = joined([Pair([part], part.mean()) for part in parts])
    assert isinstance(made, Pair)
    assert torch.equal(made.hidden[0], whole)
    assert float(made.loss) == 1.0  # a number of the first
    outputs = [
        transformers.modeling_outputs.CausalLMOutputWithPast(
            logits=part,
            past_key_values=transformers.DynamicCache(),
        )
        for part in parts
    ]
    output: Any = joined(outputs)
    assert type(output).__name__ == "CausalLMOutputWithPast"
    assert torch.equal(output.logits, whole)
    assert output.past_key_values is None
    assert torch.equal(joined(parts, together=lambda ones: ones[-1]), parts[-1])
