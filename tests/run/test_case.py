"""What a case says of its logits is what plain float64 arithmetic says of them, and its records are a recording's."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from stabilitykit.checkpoints import Checkpoint, open_checkpoint
from stabilitykit.models.gemma import Gemma, build, generate
from stabilitykit.models.matmul import matmul
from stabilitykit.models.subject import Sampling
from stabilitykit.records import LogitsError
from stabilitykit.run.case import run_case, run_reference
from stabilitykit.run.divergence import logits_error
from stabilitykit.scaling.stressed import stressed

Floats = npt.NDArray[np.float64]

SPEC = (
    "random:gemma3-270m?layers=3&hidden_size=32&feed_forward=64&heads=4&kv_heads=2&head_dim=16&query_scalar=16"
    "&vocabulary=512&window=4&global_every=2"
)
TOKENS = [2, 270, 271, 272, 273, 300, 301, 302, 303]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(SPEC)


def by_hand(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[list[float], list[bool]]:
    """KL from the reference and top-1 agreement of each position that is finite in both: p log(p/q), term by term."""
    divergences, same = [], []
    for x, y in zip(ours.double().numpy(), theirs.double().numpy(), strict=True):
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            continue
        e_x, e_y = np.exp(x - x.max()), np.exp(y - y.max())
        p = e_y / e_y.sum()
        log_ratio = (y - y.max() - math.log(math.fsum(e_y))) - (x - x.max() - math.log(math.fsum(e_x)))
        divergences.append(math.fsum(p * log_ratio))
        same.append(min(np.flatnonzero(x == x.max())) == min(np.flatnonzero(y == y.max())))
    return divergences, same


def expected(ours: torch.Tensor, theirs: torch.Tensor) -> LogitsError:
    divergences, same = by_hand(ours, theirs)
    if not divergences:
        return LogitsError(kl_mean=None, kl_max=None, top1=None, compared=0, positions=len(ours))
    return LogitsError(
        kl_mean=pytest.approx(math.fsum(divergences) / len(divergences), rel=1e-9, abs=1e-15),  # type: ignore[arg-type]
        kl_max=pytest.approx(max(divergences), rel=1e-9, abs=1e-15),  # type: ignore[arg-type]
        top1=sum(same) / len(same),
        compared=len(same),
        positions=len(ours),
    )


def drawn(length: int, vocabulary: int, scale: float, seed: int) -> torch.Tensor:
    return scale * torch.randn(length, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 65, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kl_and_top_1_at_every_length_of_a_chunk(length: int, dtype: torch.dtype) -> None:
    theirs = drawn(length, 100, 5.0, seed=0)
    ours = (theirs + drawn(length, 100, 0.5, seed=1)).to(dtype)
    found = logits_error(ours, theirs)
    assert found == expected(ours, theirs)
    assert found.kl_max is not None
    assert found.kl_max > 1e-3
    for chunk in (1, 7, length, length + 1):
        again = logits_error(ours, theirs, chunk=chunk)
        assert again == expected(ours, theirs)


def test_kl_is_from_the_reference_to_the_run_and_not_the_other_way() -> None:
    """p = (1/2, 1/2) and q = (1/4, 3/4): Σ p log(p/q) = log(2 / sqrt(3)); the other way it would be another number."""
    ours, theirs = torch.tensor([[1.0, 3.0]]).log(), torch.zeros(1, 2)
    assert logits_error(ours, theirs).kl_mean == pytest.approx(math.log(2 / math.sqrt(3)), rel=1e-6)
    other_way = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert logits_error(theirs, ours).kl_mean == pytest.approx(other_way, rel=1e-6)


def test_logits_that_are_the_same_have_no_error() -> None:
    logits = drawn(40, 300, 30.0, seed=0)
    assert logits_error(logits, logits) == LogitsError(kl_mean=0.0, kl_max=0.0, top1=1.0, compared=40, positions=40)


def test_a_shift_of_all_logits_is_no_error_and_large_ones_do_not_overflow() -> None:
    """Probabilities of 0 and exponents far past any format's range; a divergence as large as the logits."""
    theirs = torch.zeros(2, 3)
    theirs[:, 0] = 60_000.0
    shifted = theirs.double() - 1e6
    assert logits_error(shifted, theirs).kl_max == 0.0
    assert logits_error(theirs.flip(1), theirs) == LogitsError(
        kl_mean=60_000.0, kl_max=60_000.0, top1=0.0, compared=2, positions=2
    )


def test_a_tie_counts_for_the_lower_id() -> None:
    theirs = torch.tensor([[0.0, 5.0, 1.0], [0.0, 5.0, 1.0], [7.0, 1.0, 7.0]])
    ours = torch.tensor([[0.0, 5.0, 5.0], [5.0, 5.0, 0.0], [7.0, 1.0, 3.0]])
    assert logits_error(ours, theirs).top1 == pytest.approx(2 / 3)


@pytest.mark.parametrize("chunk", [1, 3, 32])
def test_positions_that_are_not_finite_are_left_out_on_either_side(chunk: int) -> None:
    theirs = drawn(10, 50, 5.0, seed=0)
    ours = theirs + drawn(10, 50, 0.5, seed=1)
    ours[0, 3], ours[4], ours[5, 0] = math.nan, math.nan, -math.inf
    theirs[5, 1], theirs[9, 2] = math.inf, math.nan
    ours[7, 1] = -math.inf
    found = logits_error(ours, theirs, chunk=chunk)
    assert (found.compared, found.positions) == (5, 10)
    assert found == expected(ours, theirs)


def test_no_position_gives_no_number() -> None:
    nothing = LogitsError(kl_mean=None, kl_max=None, top1=None, compared=0, positions=3)
    assert logits_error(torch.full((3, 5), math.nan), torch.zeros(3, 5)) == nothing


@pytest.mark.parametrize("kind", ["native", "float32-accumulate"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_run_is_compared_with_its_reference(checkpoint: Checkpoint, dtype: str, kind: str) -> None:
    reference_model, model = build(checkpoint), build(checkpoint, dtype=dtype)
    ids = torch.tensor([TOKENS])
    with torch.inference_mode():
        theirs = reference_model(ids)[0]
        with matmul(kind):
            ours = model(ids)[0]
    reference = run_reference(reference_model, TOKENS)
    assert reference.logits is not None
    assert torch.equal(reference.logits, theirs)
    run = run_case(model, TOKENS, matmul=kind, reference=reference)
    header = run.recording.header
    assert header.logits_error == expected(ours, theirs)
    assert header.logits_error.positions == len(TOKENS)
    assert header.case["next_text"] == model.tokenizer.piece(int(ours[-1].argmax()))
    deviations = {r.site: r.deviation for r in run.recording if r.deviation is not None}
    assert deviations.keys() <= reference.tensors.keys()
    assert {"embed_tokens", "layers.0/add.0", "layers.2", "lm_head"} <= deviations.keys()
    found, error = deviations["lm_head"], ours.double() - theirs.double()
    assert found.sqnr == pytest.approx(
        10 * math.log10(float(theirs.double().square().sum() / error.square().sum())), rel=1e-9
    )
    assert found.largest == float(error.abs().max())


def test_a_run_that_breaks_says_so_and_what_is_left_of_its_logits(checkpoint: Checkpoint) -> None:
    """With <bos> made huge, everything that looks at it is lost: all positions, and so nothing is compared."""
    reference_model, model = (stressed(checkpoint, 2.0**15, dtype=dtype) for dtype in ("float32", "float16"))
    run = run_case(model, TOKENS, reference=run_reference(reference_model, TOKENS))
    assert run.recording.first_break() is not None
    assert run.error is not None  # of the sampler
    found = run.recording.header.logits_error
    assert found == LogitsError(kl_mean=None, kl_max=None, top1=None, compared=0, positions=len(TOKENS))


@pytest.mark.parametrize(
    ("logits", "token", "logit"),
    [
        ([-math.inf, -math.inf, -math.inf], 0, "-inf"),
        ([math.nan, math.nan, math.nan], 0, "nan"),
        ([1.0, -math.inf, math.nan], 2, "nan"),
        ([1.0, math.inf, -math.inf], 1, "inf"),
        ([-math.inf, 1.0, 2.0], 2, None),  # chosen by the model, whatever became of the others
        ([0.0, 1.0, 2.0], 2, None),
    ],
)
def test_a_token_that_greedy_decoding_takes_without_a_choice_is_told_as_such(
    checkpoint: Checkpoint, logits: list[float], token: int, logit: str | None
) -> None:
    model = build(checkpoint)
    fill = torch.tensor(logits)

    def replaced(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return torch.cat((fill, fill.new_full((output.shape[-1] - 3,), -math.inf))).expand(output.shape)

    handle = model.register_forward_hook(replaced)
    greedy = Sampling(temperature=None)
    run = run_case(model, TOKENS, sampling=greedy, level="modules")
    drawn = generate(model, TOKENS, max_new_tokens=1, sampling=greedy)
    handle.remove()
    case = run.recording.header.case
    assert run.error is None
    assert drawn == ([] if token == model.eos else [token])
    assert case["next_text"] == model.tokenizer.piece(token)
    assert case.get("greedy_text") == (None if logit is None else model.tokenizer.piece(token))
    assert case.get("greedy_logit") == logit


@pytest.mark.parametrize("padding", [0, 3])
def test_padding_and_recording_change_no_logits(checkpoint: Checkpoint, padding: int) -> None:
    model = build(checkpoint)
    seen: list[torch.Tensor] = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(output))
    run = run_case(model, TOKENS, left_padding=padding, sampling=Sampling(temperature=None), level="modules")
    handle.remove()
    with torch.inference_mode():
        bare = model(torch.tensor([TOKENS]))[:, -1:]
    assert torch.allclose(seen[0], bare, rtol=0, atol=1e-5)
    assert seen[0].shape == (1, 1, model.config.vocabulary)
    assert run.recording.header.tokens == ((*[model.vocabulary.pad] * padding, *TOKENS),)
    assert run.recording.header.case["left_padding"] == padding
    assert run.error is None


def test_a_padded_run_is_compared_with_a_padded_reference(checkpoint: Checkpoint) -> None:
    """In float32 with itself: no difference, of the same tensors, at the pad tokens too."""
    model = build(checkpoint)
    reference = run_reference(model, TOKENS, left_padding=3)
    run = run_case(model, TOKENS, left_padding=3, reference=reference)
    header = run.recording.header
    assert header.logits_error == LogitsError(
        kl_mean=0.0, kl_max=0.0, top1=1.0, compared=3 + len(TOKENS), positions=3 + len(TOKENS)
    )
    assert {r.deviation.largest for r in run.recording if r.deviation is not None and r.layer is not None} == {0.0}


def test_nothing_is_left_in_the_model(checkpoint: Checkpoint) -> None:
    model: Gemma = build(checkpoint)
    reference = run_reference(model, TOKENS)
    announced: list[tuple[str, int, int]] = []
    run_case(model, TOKENS, reference=reference, progress=lambda *said: announced.append(said))
    assert announced == [("running layers", done, 3) for done in (1, 2, 3)]
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
