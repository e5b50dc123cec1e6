"""No tensor exceeds its bound, every stored tensor has one, and a bound that is half as large is found out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bounds.weights import (
    SHAPES,
    bounds_and_states,
    exceeding,
    largest_of_prompts,
    largest_of_states,
    plain,
    planted,
    quiet,
    random_states,
    values,
)
from remedied import rescale
from torch import Tensor

from stabilitykit.bounds import attention, inequalities
from stabilitykit.bounds.arithmetic import Arithmetic, Ball
from stabilitykit.bounds.gated_sum import GatedSum, largest_first
from stabilitykit.bounds.hidden_states import confirm
from stabilitykit.checkpoints import Checkpoint
from stabilitykit.errors import MisuseError
from stabilitykit.formats import FLOAT16
from stabilitykit.models.gemma import build
from stabilitykit.recorder import record

GENERATIONS = (1, 2, 3)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_tensor_stored_in_16_bits_has_a_bound(generation: int) -> None:
    bounds, _ = bounds_and_states(plain(generation), "float16")
    model = build(plain(generation), dtype="float16")
    with torch.inference_mode(), record(model) as recording:
        model(torch.tensor([[2, 70, 71, 72, 73, 74, 75]]))
    stored = [one.site for one in recording if one.dtype == "float16"]
    assert len(stored) > 70
    assert [site for site in stored if site not in bounds] == []
    labelled = {one.site: one.label for one in recording}
    assert all(one.label == labelled[site] for site, one in bounds.items() if site in labelled)


@pytest.mark.table
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("change", [lambda c: c, planted, lambda c: rescale(planted(c), 2.0**-5)])
def test_no_prompt_and_no_hidden_state_exceeds_a_bound(
    dtype: str, generation: int, shape: str, change: Callable[[Checkpoint], Checkpoint]
) -> None:
    checkpoint = change(plain(generation, shape))
    bounds, states = bounds_and_states(checkpoint, dtype)
    model = build(checkpoint, dtype=dtype)
    made = largest_of_prompts(model, "float32-accumulate")
    if any(value == float("inf") for value in made.values()):  # what follows an infinity is not bounded
        broken = next(site for site, value in made.items() if value == float("inf"))
        assert bounds[broken].bound > FLOAT16.largest
    else:
        assert exceeding(bounds, made) == {}
    assert exceeding(bounds, values(confirm(model, states))) == {}
    assert exceeding(bounds, values(confirm(model, random_states(checkpoint)))) == {}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_state_that_is_told_makes_what_was_found(generation: int) -> None:
    checkpoint = planted(plain(generation, SHAPES[1]), 2.0**14)
    states = bounds_and_states(checkpoint, "float32")[1]
    model = build(checkpoint)
    found = confirm(model, states)
    for site, norm, module in (
        (
            "layers.1.mlp.down_proj",
            "pre_feedforward_layernorm" if generation > 1 else "post_attention_layernorm",
            "mlp",
        ),
        ("layers.0.self_attn.v_proj", "input_layernorm", "self_attn.v_proj"),
    ):
        one, layer = found[site], model.layers[int(site.split(".")[1])]
        assert one.state is not None
        with torch.inference_mode():
            made = layer.get_submodule(module)(layer.get_submodule(norm)(torch.tensor(one.state)))
        assert float(made.abs().max()) == pytest.approx(one.value, rel=1e-4)


FUNCTIONS = {  # each with a checkpoint in which it decides
    "channels": plain(3, SHAPES[1]),
    "linear": plain(3, SHAPES[1]),
    "length_of_pair": plain(1, SHAPES[1]),
    "mixture": plain(3, SHAPES[1]),
    "mixed_heads": plain(3, SHAPES[1]),
    "normed_scores": plain(3, SHAPES[1]),
    "bare_scores": plain(1, SHAPES[1]),
    "gated": plain(3, SHAPES[1]),
    "soft_capped": plain(2, SHAPES[1]),
    "added": quiet(plain(1, SHAPES[1])),
}


def violations(checkpoint: Checkpoint) -> dict[str, tuple[float, float]]:
    bounds, states = bounds_and_states(checkpoint, "float16")
    found = largest_of_states(checkpoint, states)
    return exceeding(bounds, largest_of_prompts(build(checkpoint))) | exceeding(bounds, found)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_half_of_an_inequality_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = FUNCTIONS[name]
    assert violations(checkpoint) == {}
    whole: Any = getattr(inequalities, name)
    monkeypatch.setattr(inequalities, name, lambda *given: whole(*given) / 2)
    assert violations(checkpoint) != {}


def test_half_of_the_largest_eigenvalue_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = GatedSum._with_error
    monkeypatch.setattr(GatedSum, "_with_error", lambda *given: whole(*given) / 2)
    assert any(site.endswith("down_proj") for site in violations(plain(3, SHAPES[1])))


def test_a_box_is_reached_in_a_corner() -> None:
    rows, largest = torch.randn(5, 7, dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    corners = rows.sign() * largest
    assert torch.allclose((rows * corners).sum(1), inequalities.boxed(rows, largest))


def test_biases_become_a_channel_and_vectors_stay_in_the_ball() -> None:
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, bias, ball = drawn(6, 9), 30 * drawn(6), Ball(drawn(9).abs(), 3.0)
    widened, (joined,) = inequalities.with_biases(ball, (rows, bias))
    y = ball.gain * torch.nn.functional.normalize(drawn(40, 9)) * ball.radius
    kappa = (bias / joined[:, -1])[0]
    more = torch.cat((y, kappa.expand(40, 1)), 1)
    assert torch.allclose(more @ joined.T, y @ rows.T + bias)
    assert ((more / widened.gain).norm(dim=1) <= widened.radius * (1 + 1e-12)).all()
    bound = inequalities.linear(joined, widened)
    assert (bound >= inequalities.linear(rows, ball) + bias.abs()).all()
    assert (bound <= 1.5 * (inequalities.linear(rows, ball) + bias.abs())).all()
    none = inequalities.with_biases(ball, (rows, torch.zeros(6, dtype=torch.float64)))[0]
    assert none.radius == pytest.approx(ball.radius)


def test_activations_are_close_to_a_ramp() -> None:
    x = torch.linspace(-12, 12, 400_001)
    for name, made in (
        ("gelu", torch.nn.functional.gelu(x)),
        ("gelu", torch.nn.functional.gelu(x, approximate="tanh")),
        ("silu", torch.nn.functional.silu(x)),
    ):
        assert 0.99 * inequalities.DIPS[name] < (made - x.clamp(min=0)).abs().max() < inequalities.DIPS[name]
        assert (made <= x.clamp(min=0)).all()


def test_every_inequality_is_among_those_that_were_halved() -> None:
    own = {
        name
        for name, value in vars(inequalities).items()
        if getattr(value, "__module__", "") == inequalities.__name__ and not name.startswith("_")
    }
    assert own == set(FUNCTIONS) | {"boxed", "with_biases"}  # which have tests of their own


def test_the_cheap_bound_is_above_the_exact_one_for_every_row() -> None:
    generator = torch.Generator().manual_seed(1)
    gate, up = (torch.randn(90, 70, generator=generator, dtype=torch.float64) for _ in range(2))
    down = torch.randn(12, 90, generator=generator, dtype=torch.float64)
    down[4] *= 1e3
    down[5] = 0
    gate[7] = 0
    rows = GatedSum(gate, up, down, 0.0)
    cheap = rows.cheap()
    exact = torch.tensor([rows.refine(index) for index in range(24)])
    assert (cheap >= exact).all()
    assert exact[5] < 1e-9 * exact.max()
    improved = torch.tensor([[rows.refine(index) for _ in range(3)] for index in range(24)])
    better = torch.minimum(exact, improved.amin(1))  # every s is valid, whichever is best
    assert better.max() < 0.97 * exact.max()
    n = torch.nn.functional.normalize(torch.randn(20_000, 70, generator=generator, dtype=torch.float64), dim=1)
    made = ((n @ gate.T).clamp(min=0) * (n @ up.T)) @ down.T
    assert (made.amax(0) <= better[:12]).all()
    assert (-made.amin(0) <= better[12:]).all()


def test_the_largest_bounds_are_refined_first() -> None:
    truth = torch.tensor([1.0, 5.0, 3.0, 2.0])
    seen: list[int] = []

    def refine(index: int) -> float:
        seen.append(index)
        return float(truth[index])

    found = largest_first(truth + torch.tensor([0.5, 4.0, 5.0, 0.5]), refine, lambda index: index in seen, 10)
    assert seen == [1, 2]
    assert found.tolist() == [1.5, 5.0, 3.0, 2.5]


def test_rounded_probabilities_sum_to_little_more_than_one() -> None:
    arithmetic = Arithmetic.of(FLOAT16)
    allowed = attention.attention_weights(arithmetic, 4096)
    for scores in (torch.zeros(4096), torch.randn(4096), torch.linspace(-9, 0, 4096)):
        assert float(torch.softmax(scores, 0).half().double().sum()) <= allowed
    assert 1 < allowed < 1.002


def test_a_stored_norm_lies_in_its_ball_where_gains_make_it_subnormal() -> None:
    arithmetic = Arithmetic.of(FLOAT16)
    gain = torch.logspace(-9, 2, 48, dtype=torch.float64)
    ball = arithmetic.norm_ball(gain)
    x = torch.randn(4000, 48, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 3, 48)
    normed = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain.float()).half().double()
    lengths = (normed / ball.gain).norm(dim=1)
    assert 0.99 * ball.radius < lengths.max() <= ball.radius
    assert isinstance(ball, Ball)


def test_weights_that_overflow_have_no_bound() -> None:
    checkpoint = planted(plain(1, SHAPES[1]), 1e8)
    with pytest.raises(MisuseError, match=r"Cannot bound .*v_proj.* in float16: some of its weights"):
        bounds_and_states(checkpoint, "float16")
    bounds_and_states(checkpoint, "bfloat16")
