"""`repair` on models in which something other than the residual stream overflows."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from scaled.cases import TOKEN
from scaled.entry import same
from scaled.runs import PAD, ids
from scaled.table import ENTRIES
from torch import Tensor

from stabilitykit.remedies.repair import repair
from stabilitykit.remedies.samples import Samples


def batch() -> dict[str, Tensor]:
    """Two prompts, the first padded on the left, the second with the token that one of the models breaks at."""
    prompt, mask = ids(9, 6), torch.ones(2, 9, dtype=torch.long)
    prompt[0, :4], mask[0, :4] = PAD, 0
    prompt[1, 4] = TOKEN
    return {"input_ids": prompt, "attention_mask": mask}


@pytest.mark.table
@pytest.mark.parametrize("name", ["pad token", "expert before its weight", "scores before a setting"])
def test_repair_cures_it(name: str, tmp_path: Path) -> None:
    entry = ENTRIES[name]
    model: Any = entry.model()
    model.save_pretrained(tmp_path / "broken")
    given = batch()
    samples = Samples(choosing=(given,), held_out=(given,))
    out = tmp_path / "repaired"
    found = repair(f"hf:{tmp_path / 'broken'}", samples, margin=2.0, ranking=False, out=out, dtype="float32")
    assert found.finite

    def read(folder: Path, dtype: torch.dtype) -> Tensor:
        again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
        with torch.no_grad():
            logits: Tensor = again.eval()(**given).logits
        return logits[given["attention_mask"] == 1]  # padding attends to nothing, evenly in float32 alone

    expected = read(tmp_path / "broken", torch.float32)
    assert not read(tmp_path / "broken", torch.float16).isfinite().all()
    assert same([read(out, torch.float32)], [expected])
    half, coarse = (
        float((read(folder, dtype).float() - expected).abs().max())
        for folder, dtype in ((out, torch.float16), (tmp_path / "broken", torch.bfloat16))
    )
    assert half < coarse
