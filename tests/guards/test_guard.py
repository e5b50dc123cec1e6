"""A guard ends, names or retries the row that breaks, and changes nothing else."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from guarded import LARGE, hooks
from torch import Tensor, nn

import stabilitykit as sk
from stabilitykit.errors import MisuseError
from stabilitykit.guards.breaks import RowBreak
from stabilitykit.models.gemma import KVCache
from stabilitykit.models.subject import Sampling

Make = Callable[..., Any]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3}


def run(model: Any, ids: Tensor, **how: Any) -> Tensor:
    found: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY | how)
    return found


def test_stop_ends_the_broken_row_alone_and_names_it(theirs: Make, ids: Tensor) -> None:
    model = theirs()
    alone = run(model, ids[[0, 2]])
    with sk.guard(model) as guard:
        found = run(model, ids)
    assert torch.equal(found[[0, 2]], alone)
    assert found[1, 4:].tolist() == [1, 0, 0]  # <eos>, then <pad>
    (broke,) = guard.breaks
    assert (broke.row, broke.phase, broke.step, broke.position, broke.token) == (1, "prefill", 0, 2, LARGE)
    assert (broke.kind, broke.label, broke.seen, broke.did) == ("overflow", "embedding, scaled", "logits", "stopped")
    assert [link.event for link in broke.chain][:2] == ["break", "first NaN"]
    assert "exceeds the float16 maximum" in (broke.verdict or "")


def test_sampling_goes_on_where_it_raised_for_all(theirs: Make, ids: Tensor) -> None:
    model = theirs()
    with pytest.raises(RuntimeError, match="probability tensor contains either"):
        run(model, ids, do_sample=True)
    with sk.guard(model) as guard:
        found = run(model, ids, do_sample=True)
    assert found[1, 4:].tolist() == [1, 0, 0]
    assert [broke.row for broke in guard.breaks if broke.step == 0] == [1]  # of the others one may draw that token


def test_a_row_that_breaks_while_it_is_decoded_is_named_by_its_step(theirs: Make, ids: Tensor) -> None:
    """Of every row the token is forced that breaks, at another step each."""
    model = theirs()
    at = {0: 6, 2: 9}  # by row, the length at which it is chosen

    def force(input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        for row in range(len(scores)):
            forced[row, LARGE if at.get(row) == input_ids.shape[1] else 70] = 0.0
        return forced

    with sk.guard(model) as guard:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9, logits_processor=[force]
        )
    found = [(one.row, one.phase, one.step, one.position, one.token, one.kind) for one in guard.breaks]
    assert found == [
        (1, "prefill", 0, 2, LARGE, "overflow"),
        (0, "decode", 3, 6, LARGE, "overflow"),
        (2, "decode", 6, 9, LARGE, "overflow"),
    ]


def test_raise_names_all_rows_at_once_and_leaves_the_cache_and_the_others_alone(theirs: Make, ids: Tensor) -> None:
    from transformers import DynamicCache

    model = theirs()
    both = torch.cat((ids, ids[1:2]))
    cache = DynamicCache(config=model.config)
    bare = model(both, past_key_values=(kept := DynamicCache(config=model.config)))
    with sk.guard(model, "raise"), pytest.raises(sk.NumericalBreak, match="Rows 1 and 3") as raised:
        model(both, past_key_values=cache)
    assert raised.value.rows == (1, 3)
    assert {one.label for one in raised.value.breaks} == {"embedding, scaled"}
    for ours, other in zip(cache.layers, kept.layers, strict=True):
        assert torch.equal(ours.keys.nan_to_num(nan=7.0), other.keys.nan_to_num(nan=7.0))
    assert torch.equal(raised.value.output.logits[[0, 2]], bare.logits[[0, 2]])
    cache.batch_select_indices(torch.tensor([0, 2]))  # and the caller goes on with them
    assert model(ids[[0, 2], :1], past_key_values=cache).logits.isfinite().all()


def test_warn_changes_nothing(theirs: Make, ids: Tensor) -> None:
    model = theirs()
    bare = run(model, ids)
    with sk.guard(model, "warn") as guard:
        assert torch.equal(run(model, ids), bare)
    assert [(one.row, one.did) for one in guard.breaks] == [(1, "warned")]


@pytest.mark.parametrize("given", [False, True])
def test_a_retried_row_goes_on_as_float32_would_have(theirs: Make, ids: Tensor, given: bool) -> None:
    model = theirs()
    wide = theirs("float32")
    wide.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    expected, alone = run(wide, ids[1:2], max_new_tokens=9), run(model, ids[[0, 2]], max_new_tokens=9)
    with sk.guard(model, "retry", wide=wide if given else None) as guard:
        found = run(model, ids, max_new_tokens=9)
        assert hooks(guard._wide.of(model)) == 0
    assert guard._wide._model is (wide if given else None)  # what was made is freed with the guard
    assert torch.equal(found[1:2], expected)
    assert torch.equal(found[[0, 2]], alone) or len(guard.breaks) > 1
    assert (guard.breaks[0].row, guard.breaks[0].did, guard.breaks[0].why) == (1, "retried", None)


def test_a_row_retried_in_the_middle_goes_on_from_its_own_cache(theirs: Make) -> None:
    """Every logit of its later steps is near that of a float32 run of the same tokens, and none is NaN."""
    from transformers import DynamicCache

    model, wide = theirs(), theirs("float32")
    wide.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    tokens = torch.tensor([[2, 70, 71, 72, 73, LARGE, 75, 76, 78, 79], [2, 60, 61, 62, 63, 64, 65, 66, 67, 68]])
    cache = DynamicCache(config=model.config)
    with sk.guard(model, "retry") as guard:
        steps = [model(tokens[:, :4], past_key_values=cache).logits[:, -1:]]
        steps += [model(tokens[:, at : at + 1], past_key_values=cache).logits for at in range(4, 10)]
    whole, narrow = wide(tokens).logits, torch.cat(steps, 1)
    assert [(one.row, one.step, one.did) for one in guard.breaks] == [(0, 2, "retried")]
    assert narrow.dtype == torch.float32
    assert (narrow[0] - whole[0, 3:]).abs().max() < 0.02 * whole[0, 3:].abs().max()
    bare = [one.float() for one in uncached(model, tokens[1:])]
    assert torch.equal(narrow[1], torch.cat(bare, 1)[0])


def uncached(model: Any, tokens: Tensor) -> list[Tensor]:
    """The same steps, unguarded."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    found = [model(tokens[:, :4], past_key_values=cache).logits[:, -1:]]
    return [*found, *(model(tokens[:, at : at + 1], past_key_values=cache).logits for at in range(4, 10))]


@pytest.mark.parametrize("how", ["stop", "retry"])
def test_the_kits_own_model_ends_and_retries_rows(own: Make, ids: Tensor, how: Any) -> None:
    model, wide = own(), own("float32")
    wide.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    sampling = Sampling(temperature=1.0, seed=3)
    alone = sk.generate(model, ids[[0, 2]], max_new_tokens=1, sampling=sampling)
    with pytest.raises(RuntimeError, match="probability tensor"):
        sk.generate(model, ids, max_new_tokens=4, sampling=sampling)
    with sk.guard(model, how) as guard:
        found = sk.generate(model, ids, max_new_tokens=4, sampling=sampling)
        greedy = sk.generate(model, ids, max_new_tokens=4, sampling=Sampling(temperature=None))
    assert len(alone) == 2
    assert {one.row for one in guard.breaks if one.step == 0} == {1}
    assert found[1] == [] if how == "stop" else len(found[1]) == 4
    if how == "retry":
        expected = sk.generate(wide, ids[1:2], max_new_tokens=4, sampling=Sampling(temperature=None))
        assert greedy[1] == expected[0]
    assert hooks(model) == 0


def test_logits_keep_their_bits_and_no_hook_is_left(theirs: Make, own: Make) -> None:
    tokens = torch.tensor([[2, 70, 71, 72, 73], [0, 0, 2, 80, 81]])
    mask = (tokens != 0).long()
    watched: list[Any] = ["logits", "residual"]
    for watch in watched:
        model = theirs(planted=False)
        bare = model(tokens, attention_mask=mask).logits
        with sk.guard(model, watch=watch, headroom=15.9) as guard:
            assert torch.equal(model(tokens, attention_mask=mask).logits, bare)
        assert torch.equal(model(tokens, attention_mask=mask).logits, bare)
        assert (hooks(model), guard.breaks, "_get_logits_processor" in vars(model)) == (0, [], False)
    ours = own(planted=False)
    cache = KVCache(ours.config, batch=2, length=8, dtype=ours.dtype)
    bare = ours(tokens, padding=tokens != 0)
    with sk.guard(ours, watch="residual"):
        assert torch.equal(ours(tokens, padding=tokens != 0, cache=cache), bare)


def test_a_model_has_one_guard(theirs: Make) -> None:
    model = theirs()
    first = sk.guard(model).install()
    for other in (model, model.model, nn.Sequential(model)):
        with pytest.raises(MisuseError, match="has a guard already"):
            sk.guard(other).install()
    first.remove()
    first.remove()  # again does nothing
    with sk.guard(model.model):
        pass
    assert hooks(model) == 0


def test_what_cannot_be_is_refused(theirs: Make) -> None:
    model = theirs()
    wrong: list[dict[str, Any]] = [{"on_break": "ignore"}, {"watch": "all"}, {"retry_in": "float16"}, {"every": 0}]
    for how in wrong:
        with pytest.raises(MisuseError):
            sk.guard(model, **how)
    with pytest.raises(MisuseError, match=r"torch\.nn\.Module"):
        sk.guard("model")  # type: ignore[arg-type]


def test_a_callable_decides_and_what_it_raises_is_the_users_own(theirs: Make, ids: Tensor) -> None:
    model = theirs()
    given: list[tuple[RowBreak, ...]] = []

    def decide(breaks: Sequence[RowBreak]) -> str | None:
        given.append(tuple(breaks))
        return "stop"

    with sk.guard(model, decide) as guard:
        assert run(model, ids)[1, 4:].tolist() == [1, 0, 0]
    assert [one.row for one in given[0]] == [1]
    assert guard.breaks[0].did == "stopped"

    def fail(breaks: Sequence[RowBreak]) -> str | None:
        raise LookupError("mine")

    with sk.guard(model, fail), pytest.raises(LookupError, match="mine"):
        run(model, ids)
    assert hooks(model) == 0


def test_a_guard_that_fails_ends_no_pass(
    theirs: Make, ids: Tensor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from stabilitykit.guards import judge, step, watch

    model = theirs()
    bare = run(model, ids)

    def fail(*_: object, **__: object) -> None:
        raise ArithmeticError("broken guard")

    for owner, name in ((watch.Watched, "look"), (watch.Watched, "read"), (step.Step, "again"), (judge, "examine")):
        with monkeypatch.context() as patch, sk.guard(model, "warn"):
            patch.setattr(owner, name, fail)
            assert torch.equal(run(model, ids), bare), name
    assert "broken guard" in caplog.text
    with monkeypatch.context() as patch, sk.guard(model, "warn"):
        patch.setattr(step.Step, "of", fail)
        assert torch.equal(run(model, ids), bare)


def test_a_break_does_not_disturb_torchs_random_numbers_or_warnings(theirs: Make, ids: Tensor) -> None:
    model = theirs()
    with warnings.catch_warnings(), sk.guard(model, "warn") as guard:
        warnings.simplefilter("error")
        torch.manual_seed(5)
        model(ids)
        drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert len(guard.breaks) == 1


def test_every_nth_step_is_looked_at_and_every_prompt(theirs: Make, ids: Tensor) -> None:
    model = theirs(planted=False)
    seen: list[int] = []

    class Counting:
        def stepped(self, headroom: float | None) -> None:
            seen.append(1)

        def broke(self, site: str, kind: str) -> None: ...
        def retried(self) -> None: ...

    with sk.guard(model, every=3, metrics=[Counting()]):
        run(model, ids[[0, 2]], max_new_tokens=7, min_new_tokens=7)
    assert len(seen) == 3  # of steps 0 to 6


def test_padding_that_is_lost_is_no_break(theirs: Make) -> None:
    """The token that breaks stands in the padding, where the mask hides it; sdpa never lets it through."""
    model = theirs()
    model.set_attn_implementation("sdpa")
    tokens = torch.tensor([[LARGE, 2, 71, 72], [2, 70, 71, 72]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    with sk.guard(model, "warn") as guard:
        lost = model(tokens, attention_mask=mask).logits
    is_lost = not bool(lost[0, 1:].isfinite().all())  # where NaN of a hidden value reaches the tokens all the same
    assert {one.row for one in guard.breaks} == ({0} if is_lost else set())
    assert not lost[0, 0].isfinite().all()


def test_redacted_breaks_hold_no_token(theirs: Make, ids: Tensor) -> None:
    model = theirs()
    with sk.guard(model, redact=True, token_text=lambda token: f"secret{token}") as guard:
        run(model, ids)
    (broke,) = guard.take()
    assert broke.token is None
    assert "secret" not in f"{broke.document()}"
    assert str(LARGE) not in f"{broke.verdict}".split("exceeds")[0].split("(")[-1]
    assert guard.breaks == []


def test_loops_of_ones_own_ask_which_rows_to_end(theirs: Make, ids: Tensor) -> None:
    model = theirs()
    with sk.guard(model) as guard:
        logits = model(ids).logits[:, -1]
        assert guard.stopped == (1,)
        scores = guard.end(logits, eos=1)
    assert scores.argmax(-1)[1] == 1
    assert torch.equal(scores[[0, 2]], logits[[0, 2]])
    assert not logits[1].isfinite().any()  # nothing was written over


def test_headroom_under_the_limit_warns_once_a_site(
    theirs: Make, ids: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = theirs(planted=False)
    with sk.guard(model, watch="residual", headroom=30.0):
        run(model, ids)
    warned = [one for one in caplog.records if getattr(one, "guard_event", "") == "headroom"]
    sites = [one.__dict__["guard_site"] for one in warned]
    assert sorted(sites) == ["layers.0", "layers.1", "layers.2", "logits", "norm"]
    expected = model.model(ids, output_hidden_states=True).hidden_states[1].abs().amax().item()
    bits = next(one.__dict__["guard_headroom"] for one in warned if one.__dict__["guard_site"] == "layers.0")
    assert bits == pytest.approx(sk.FORMATS["float16"].headroom(expected))
