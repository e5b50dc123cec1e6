"""transformers' own models, recorded through the same call: the same sites, the same numbers, the same break."""

from collections.abc import Callable

import pytest
import torch

from reference import reference_model
from stabilitykit.checkpoints import Checkpoint
from stabilitykit.diagnosis import cause
from stabilitykit.models.gemma import Gemma, build
from stabilitykit.recorder import record
from stabilitykit.records import Recording

Small = Callable[..., Gemma]


def run(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[Recording, torch.Tensor]:
    with torch.inference_mode(), record(model) as recording:
        output = model(tokens)
    return recording, getattr(output, "logits", output)


def of_layers(recording: Recording) -> list[tuple[object, ...]]:
    """Everything from the embedding to the head; before it the two build masks and angles each in its own way.

    transformers' gelu is a module, ours an operator.
    """
    return [
        (
            r.site.replace(".act_fn", "/gelu.0"),
            r.label,
            r.operator,
            r.dtype,
            r.amax,
            r.mean,
            r.masked,
            r.zero,
            r.amax_position,
        )
        for r in recording
        if r.module.startswith(("layers", "norm", "lm_head")) or r.site == "embed_tokens"
    ]


@pytest.mark.table
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("generation", [1, 2, 3])
def test_both_implementations_make_the_same_records(
    small: Small, tokens: torch.Tensor, generation: int, dtype: str
) -> None:
    ours = small(generation, dtype)
    theirs = reference_model(ours)
    with torch.inference_mode():
        bare = theirs(tokens).logits
    seen, logits = run(theirs, tokens)
    assert torch.equal(logits, bare)
    assert of_layers(seen) == of_layers(run(ours, tokens)[0])
    assert seen.first_break() is None


def test_the_270m_breaks_in_transformers_as_it_does_here(checkpoint_270m: Checkpoint) -> None:
    model = build(checkpoint_270m, dtype="float16")
    tokens = torch.tensor([[2, 818, 5279, 529, 7001, 563]])
    ours, theirs = run(model, tokens)[0].first_break(), run(reference_model(model), tokens)[0].first_break()
    assert theirs is not None
    assert theirs.site == "layers.7"
    assert ours is not None
    assert theirs.broke == ours.broke


def test_sampling_in_transformers_raises_and_the_break_is_named(small: Small, tokens: torch.Tensor) -> None:
    model = reference_model(small(3, "float16", 2.0**17))
    with pytest.raises(RuntimeError, match="probability tensor contains"), record(model) as recording:
        model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=True, max_new_tokens=4)
    assert recording.header.error == "probability tensor contains either `inf`, `nan` or element < 0"
    found = cause(recording)
    assert found is not None
    assert found.name == "range"


def test_a_healthy_generation_in_transformers_reports_no_break(small: Small) -> None:
    model = reference_model(small(3, "float16"))
    padded = torch.tensor([[0, 0, 2, 70, 71], [2, 72, 73, 74, 75]])
    with record(model) as recording:
        model.generate(
            padded,
            attention_mask=(padded != 0).long(),
            do_sample=True,
            top_k=5,
            top_p=0.9,
            max_new_tokens=4,
            min_new_tokens=4,
        )
    assert recording.first_break() is None
    assert {record.step for record in recording} == {0, 1, 2, 3}
