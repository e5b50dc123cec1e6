"""The real Gemma 3 270M in float16, a batch of four: the three rows that begin with `<bos>` break."""

from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

import stabilitykit as sk
from reference import reference_model
from stabilitykit.checkpoints import Checkpoint
from stabilitykit.guards.metrics import PrometheusMetrics
from stabilitykit.models.gemma import build

ROWS = torch.tensor(
    [
        [2, 818, 5279, 529, 7001, 563],  # The capital of France is
        [2, 818, 5279, 529, 9405, 563],
        [818, 5279, 529, 7001, 563, 9079],  # and no <bos>
        [2, 818, 3768, 563, 2364, 532],
    ]
)
NEW = 3


@pytest.fixture(scope="module")
def narrow(checkpoint_270m: Checkpoint) -> Any:
    ours = build(checkpoint_270m, dtype="float16")
    model: Any = reference_model(ours)
    assert ours.tokenizer is not None
    model.tokenizer = ours.tokenizer
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    return model


def run(model: Any, rows: Tensor, *, sample: bool = False, new: int = NEW) -> Tensor:
    found: Tensor = model.generate(
        rows, attention_mask=torch.ones_like(rows), do_sample=sample, max_new_tokens=new, min_new_tokens=new
    )
    return found


def test_a_serving_loop(narrow: Any) -> None:
    with pytest.raises(RuntimeError, match="probability tensor contains either"):
        run(narrow, ROWS, sample=True, new=1)

    alone = run(narrow, ROWS[2:3])
    with sk.guard(narrow) as guard:
        stopped = run(narrow, ROWS)
        assert [broke.row for broke in guard.breaks] == [0, 1, 3]
    assert torch.equal(stopped[2], alone[0])
    assert stopped[[0, 1, 3], 6:].tolist() == [[1, 0, 0]] * 3
    for broke in guard.breaks:
        assert (broke.layer, broke.label, broke.kind) == (7, "residual after MLP", "overflow")
        assert (broke.phase, broke.step, broke.position, broke.token_text) == ("prefill", 0, 0, "<bos>")

    with sk.guard(narrow, "raise"), pytest.raises(sk.NumericalBreak) as raised:
        run(narrow, ROWS, sample=True)
    assert raised.value.rows == (0, 1, 3)
    assert "layer 7, residual after MLP" in str(raised.value)


def test_retried_rows_say_what_float32_says(narrow: Any, checkpoint_270m: Checkpoint) -> None:
    wide = reference_model(build(checkpoint_270m, dtype="float32"))
    registry = CollectorRegistry()
    with sk.guard(narrow, "retry", wide=wide, metrics=[PrometheusMetrics(registry)]) as guard:
        found = run(narrow, ROWS)
    wide.generation_config = narrow.generation_config
    assert torch.equal(found[[0, 1, 3]], run(wide, ROWS[[0, 1, 3]]))
    assert [(broke.row, broke.did) for broke in guard.breaks] == [(0, "retried"), (1, "retried"), (3, "retried")]
    assert registry.get_sample_value("stabilitykit_guard_retries_total") == 3
