"""Finite, and other tokens all the same: how far the same run in other ways is, against the same by hand."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from truth.decoders import IDS
from truth.models import decoder

import stabilitykit as sk
from stabilitykit.records.trials import Rounding

HALF = torch.float16
LEFT = torch.tensor([[0, 0, 0, 11, 12, 13], [21, 22, 23, 24, 25, 26]])


class Sums(nn.Module):
    """Adds in another order where there is more than one row, as kernels of matrix products do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(64, 16), requires_grad=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        terms = x[..., None] * self.weight
        order = range(64) if len(x) == 1 else range(63, -1, -1)
        total = torch.zeros_like(terms[..., 0, :])
        for place in order:
            total = total + terms[..., place, :]
        return {"logits": total}


def rounded(found: Any) -> dict[str, Rounding]:
    return {one.name: one for one in found.rounding}


def far(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max())


def test_a_batch_of_another_size_is_measured() -> None:
    model = Sums().half()
    torch.manual_seed(1)
    x = torch.randn(1, 300, 64).half()
    found = sk.diagnose(model, x)
    alone = model(x)["logits"]
    company = model(x.repeat(2, 1, 1))["logits"][:1]
    assert not torch.equal(alone, company)
    expected = copy.deepcopy(model).float()(x.float())["logits"]
    for name in ("a batch of 2", "a batch of 8"):
        one = rounded(found)[name]
        assert one.distance.error_max == pytest.approx(far(company, alone), rel=1e-3)
        assert one.wide.error_max == pytest.approx(far(company, expected), rel=1e-3)
        parted = company.argmax(-1) != alone.argmax(-1)
        assert one.same_tokens == pytest.approx(1 - float(parted.float().mean()))
        two = alone[parted].float().topk(2, -1).values
        assert one.margin == (float((two[:, 0] - two[:, 1]).min()) if len(two) else None)
    assert "rounds differently" in found.advice


def test_rows_of_a_batch_are_run_alone() -> None:
    model = Sums().half()
    torch.manual_seed(1)
    x = torch.randn(3, 20, 64).half()
    found = sk.diagnose(model, x)
    together = model(x)["logits"]
    alone = torch.cat([model(row[None])["logits"] for row in x])
    assert rounded(found)["single rows"].distance.error_max == pytest.approx(far(alone, together), rel=1e-3)
    assert rounded(found)["a batch of 6"].distance.error_max == 0


def test_another_attention_is_measured_and_the_model_left_as_it_was() -> None:
    model: Any = copy.deepcopy(decoder("llama")).half()
    found = sk.diagnose(model, input_ids=IDS)
    assert model.config._attn_implementation == "eager"
    with torch.inference_mode():
        plain = model(IDS).logits
        other = copy.deepcopy(model)
        other.set_attn_implementation("sdpa")
        sdpa = other(IDS).logits
    assert rounded(found)["sdpa attention"].distance.error_max == pytest.approx(far(sdpa, plain), rel=1e-3)


def test_padding_is_moved_to_the_other_side_and_does_not_count() -> None:
    """Each token keeps its position, so that the function is the same; the rows of padding are left out."""
    model: Any = copy.deepcopy(decoder("llama")).half()
    mask = (LEFT != 0).long()
    found = sk.diagnose(model, input_ids=LEFT, attention_mask=mask)
    right = torch.stack([LEFT[0].roll(3), LEFT[1]])
    positions = torch.tensor([[3, 4, 5, 0, 1, 2], [0, 1, 2, 3, 4, 5]])
    with torch.inference_mode():
        plain = model(LEFT, attention_mask=mask).logits
        moved = model(right, attention_mask=(right != 0).long(), position_ids=positions).logits
    one = rounded(found)["padding on the other side"]
    assert one.distance.rows == int(mask.sum())
    back = torch.cat([moved[0, :3], moved[1]])
    whole = float(plain.float().abs().max())
    expected = (back.float() - torch.cat([plain[0, 3:], plain[1]]).float()).abs().max() / whole
    assert one.distance.error_max == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_tokens_that_generate_makes_are_compared_and_none_is_drawn() -> None:
    model: Any = copy.deepcopy(decoder("llama")).half()
    found = sk.diagnose(model.generate, LEFT, attention_mask=(LEFT != 0).long(), max_new_tokens=3, do_sample=True)
    for name in ("single rows", "a batch of 4", "a batch of 16", "sdpa attention"):
        assert rounded(found)[name].distance.rows == 6  # two rows, three tokens
        assert rounded(found)[name].same_tokens == 1.0


class Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return x * self.weight * torch.rand(x.shape, generator=generator).to(x.dtype)


def test_what_is_no_rounding_is_said_not_to_be() -> None:
    x = torch.ones(2, 3, 4, dtype=HALF)
    found = sk.diagnose(Draws().half(), x)
    assert not {"single rows"} & set(rounded(found))
    assert any("single rows" in note and "more than rounding" in note for note in found.notes)


def test_nothing_is_compared_where_something_is_lost_or_far() -> None:
    model: Any = copy.deepcopy(decoder("llama")).half()
    model.lm_head.weight.data[3, 3] = torch.nan
    assert sk.diagnose(model, input_ids=IDS).rounding == ()


class Between(nn.Module):
    """Numbers that float16 rounds away between two operators, and that fused operators keep."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return (x + 2.0**-12) * self.weight - x + x


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_code_rounds_less() -> None:
    """Inductor keeps float32 between the operators that it fuses."""
    x = torch.linspace(1, 2, 64, dtype=HALF).reshape(1, 16, 4)
    model = Between().half()
    found = sk.diagnose(model, x, compiled=True)
    one = rounded(found)["torch.compile"]
    exact = x.float() + 2.0**-12
    eager = model(x)
    assert far(eager, exact) == pytest.approx(found.plain.error_max if found.plain else 0, rel=1e-3)
    assert (one.wide.error_max or 0) <= far(eager, exact)
    assert "forward" not in vars(model)
