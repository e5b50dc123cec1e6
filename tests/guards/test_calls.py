"""However a model is wrapped, called, copied or interrupted: rows are named, and the guard is in nobody's way."""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from guarded import LARGE, hooks
from torch import Tensor, nn
from truth import models

import stabilitykit as sk
from stabilitykit.errors import MisuseError
from stabilitykit.guards import wide as wides
from stabilitykit.guards.step import Step

Make = Callable[..., Any]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}


def run(model: Any, ids: Tensor, **how: Any) -> Tensor:
    found: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY | how)
    return found


class Tiny(nn.Module):
    """A decoder that dynamo traces in a moment; token 7 overflows in the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8, bias=False)) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 16, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embed(input_ids)
        for layer in self.layers:
            h = h + layer(h)
        found: Tensor = self.head(self.norm(h))
        return found


@pytest.mark.parametrize("inside", [False, True])
def test_a_compiled_model_is_watched_from_outside(inside: bool) -> None:
    """In one graph, which a hook of the guard's inside of it would break."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Tiny().half().requires_grad_(False)
    model.embed.weight[7] = 3e4
    model.get_submodule("layers.0.0").get_parameter("weight")[0] = 1.0
    ids = torch.tensor([[1, 2], [1, 7], [3, 4]])
    bare = model(ids)
    if inside:
        model.compile(backend="eager", fullgraph=True)
    called: Any = model if inside else torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(MisuseError, match="is compiled"):
        sk.guard(called, watch="residual").install()
    with sk.guard(called, "raise"), pytest.raises(sk.NumericalBreak) as raised:
        called(ids)
    (broke,) = raised.value.breaks
    assert (broke.row, broke.position, broke.kind, broke.layer) == (1, 1, "overflow", 0)
    assert torch.equal(raised.value.output[[0, 2]], bare[[0, 2]])
    with sk.guard(called, "retry"):
        assert called(ids).isfinite().all()
    assert torch.equal(called(ids)[[0, 2]], bare[[0, 2]])
    assert hooks(called) == 0
    assert (vars(model).get("_compiled_call_impl") is not None) is inside


def test_what_generate_compiles_for_itself_is_watched(theirs: Make, ids: Tensor) -> None:
    torch._dynamo.reset()
    model = theirs()
    config = transformers.CompileConfig(backend="eager", fullgraph=True)
    vars(config)["_compile_all_devices"] = True  # as on a GPU
    forced = 70, 71, LARGE, 72

    def force(input_ids: Tensor, scores: Tensor) -> Tensor:
        made = torch.full_like(scores, -torch.inf)
        made[:, 70] = 0.0
        made[0] = -torch.inf
        made[0, forced[input_ids.shape[1] - 4]] = 0.0
        return made

    with sk.guard(model, "warn") as guard:
        run(model, ids[[0, 2]], cache_implementation="static", compile_config=config, logits_processor=[force])
    assert [(one.row, one.phase, one.step) for one in guard.breaks] == [(0, "decode", 3)]
    assert not {"generate", "get_compiled_call", "_get_logits_processor"} & vars(model).keys()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")  # peft's use of transformers
def test_adapters_are_followed(theirs: Make, ids: Tensor) -> None:
    """A retry computes with the adapter that is on, not with the one that was on at the first retry."""
    from peft import LoraConfig, get_peft_model

    def lora() -> LoraConfig:
        return LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM", init_lora_weights=False)

    torch.manual_seed(0)
    model: Any = get_peft_model(theirs(), lora())
    model.add_adapter("other", lora())
    model.eval()
    wide = copy.deepcopy(model).float()
    with torch.no_grad(), sk.guard(model, "retry") as guard:
        for name in ("default", "other"):
            model.set_adapter(name)
            wide.set_adapter(name)
            assert torch.equal(model(input_ids=ids).logits[1], wide(input_ids=ids[1:2]).logits[0])
    assert {one.did for one in guard.breaks} == {"retried"}
    with sk.guard(model) as guard:
        assert run(model, ids)[1, 4].item() == 1
        each = run(model, ids, adapter_names=["default", "other", "other"])
    assert each[1, 4].item() == 1
    assert [one.row for one in guard.breaks if one.step == 0] == [1, 1]


def test_the_mask_of_an_encoder_hides_no_token_of_the_decoder() -> None:
    """Though it has the same length: what is no padding is told by the decoder's own mask, or not at all."""
    model: Any = models.new(models.t5)
    ids, mask = torch.tensor([[5, 6, 7], [5, 6, 7]]), torch.tensor([[1, 0, 0], [1, 1, 1]])
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    assert torch.equal(real_of(model, **given), mask == 1)
    for decoded in ({"decoder_input_ids": ids + 1}, {"labels": ids}):
        assert real_of(model, **given, **decoded) is None
    own = {"decoder_input_ids": ids, "decoder_attention_mask": mask.flip(0)}
    assert torch.equal(real_of(model, **given, **own), mask.flip(0) == 1)


def real_of(model: nn.Module, **given: Any) -> Any:
    return Step.of("", model, (), given).real


def test_a_prompt_of_embeddings(theirs: Make, ids: Tensor) -> None:
    """Of which generate has no ids, so that positions are not theirs."""
    model = theirs(planted=False)
    given = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": torch.ones_like(ids)}

    def ban(input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(0, torch.tensor([1]), -torch.inf)

    ways: list[Any] = ["stop", "raise"]
    for how in ways:
        with sk.guard(model, how) as guard:
            if how == "raise":
                with pytest.raises(sk.NumericalBreak):
                    model.generate(**given, **GREEDY, logits_processor=[ban])
            else:
                assert model.generate(**given, **GREEDY, logits_processor=[ban])[1].tolist() == [1, 0, 0, 0]
        (broke,) = guard.breaks
        assert (broke.row, broke.step, broke.position, broke.token, broke.site) == (1, 0, 3, None, "function")
    alone = sk.StabilityGuard(eos=1)
    assert model.generate(**given, **GREEDY, logits_processor=[ban, alone])[1].tolist() == [1, 0, 0, 0]
    assert [(one.row, one.position, one.token) for one in alone.breaks] == [(1, None, None)]


def test_processors_are_called_once_a_step_and_named_where_they_write_in_place(theirs: Make, ids: Tensor) -> None:
    model = theirs(planted=False)

    class Passes:
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores

    class Bans:
        calls = 0

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self.calls += 1
            scores[1] = -torch.inf
            return scores

    bans = Bans()
    with sk.guard(model, redact=True) as guard:
        run(model, ids, logits_processor=[Passes(), bans, Passes()])
    (broke,) = guard.breaks
    assert (broke.row, broke.kind, broke.site, broke.token) == (1, "no-token", "Bans", None)
    assert broke.unexamined == "the model's own scores were finite"
    assert bans.calls == 4


def test_threads_share_a_model_while_rows_of_each_break(theirs: Make, ids: Tensor) -> None:
    """Nothing is hung on the live model while another thread runs it, and each break is looked at."""
    model = theirs()
    expected = run(model, ids[[0, 2]])
    failed: list[BaseException] = []

    def serve() -> None:
        try:
            for _ in range(2):
                assert torch.equal(run(model, ids)[[0, 2]][:, :6], expected[:, :6])
        except BaseException as error:
            failed.append(error)

    with sk.guard(model) as guard:
        threads = [threading.Thread(target=serve) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failed == []
    assert len([one for one in guard.breaks if one.step == 0]) == 6
    assert {one.unexamined for one in guard.breaks} == {None}


def test_an_interrupted_step_is_not_taken_for_the_next(theirs: Make, ids: Tensor) -> None:
    model = theirs()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with sk.guard(model, "warn") as guard:
        handle = model.model.layers[1].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids[[0, 2]])
        handle.remove()
        model(ids[[0, 2, 2, 1]])
    assert [one.row for one in guard.breaks] == [3]


def test_a_copy_of_a_guarded_model_is_a_model_of_its_own(theirs: Make, ids: Tensor) -> None:
    model = theirs()
    with sk.guard(model) as guard:
        model(ids)
        copied = copy.deepcopy(model)
        copied.lm_head.weight = nn.Parameter(torch.zeros_like(copied.lm_head.weight))
        assert not run(copied, ids[[0, 2, 0]])[:, 4:].any()  # of equal logits the first
        with pytest.raises(MisuseError, match="cannot be pickled"):
            pickle.dumps(model)
    assert len(guard.breaks) == 1


def test_the_exception_is_pickled_and_says_only_what_is_true(theirs: Make, ids: Tensor) -> None:
    model = theirs()
    for given, ending in (
        (ids, "The other rows are sound: go on with them."),
        (ids[:2], "The other row is sound: go on."),
        (ids[1:2], "embedding, scaled (overflow)."),
    ):
        with sk.guard(model, "raise"), pytest.raises(sk.NumericalBreak) as raised:
            model(given)
        for made in (pickle.loads(pickle.dumps(raised.value)), copy.copy(raised.value)):
            assert (str(made), made.rows, made.breaks) == (str(raised.value), raised.value.rows, raised.value.breaks)
            assert made.output is None
        assert str(raised.value).partition(" guard(model, 'retry')")[0].endswith(ending)


def test_a_loss_before_the_logits_and_a_classifiers_logits(theirs: Make, ids: Tensor) -> None:
    model = theirs()
    with torch.no_grad(), sk.guard(model, "retry"):
        logits = model(ids, labels=ids, return_dict=False)[1]
    assert logits.isfinite().all()
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    classifier = transformers.LlamaForSequenceClassification(config).half().eval()
    classifier.score.weight.data[0] = 6e4
    classifier.model.norm.weight.data.fill_(100.0)
    with torch.no_grad(), sk.guard(classifier, "warn") as guard:
        found = classifier(torch.tensor([[1, 2, 3]])).logits
    assert not found.isfinite().all()
    assert [(one.row, one.seen) for one in guard.breaks] == [(0, "logits")]


def test_where_nothing_can_be_watched_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(MisuseError, match="has no list of layers"):
        sk.guard(model, watch="residual").install()
    with sk.guard(model):
        model(torch.ones(2, 4))
        model(torch.ones(2, 4))
    assert [one.getMessage().split(":")[1] for one in caplog.records] == [" nothing of it is watched"]


def test_wide_weights_that_cannot_be_used_are_refused(theirs: Make) -> None:
    model = theirs()
    wrong: list[tuple[Any, str]] = [
        (model, "is the guarded model"),
        (theirs(), "no wider than any other"),
        ("model", r"expects a torch\.nn\.Module"),
        (theirs("float32").model, "has to be the same model"),
    ]
    for wide, match in wrong:
        with pytest.raises(MisuseError, match=match):
            sk.guard(model, "retry", wide=wide).install()
        assert hooks(model) == 0


def test_where_memory_runs_out_a_retry_is_given_up(theirs: Make, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the weights, or with a later step: the row is ended and listed, and the others go on."""
    model = theirs()

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    with monkeypatch.context() as patch, sk.guard(model, "retry") as guard:
        patch.setattr(wides, "copied", full)
        assert run(model, ids)[1, 4:].tolist() == [1, 0, 0, 0]
    why = "no copy of the weights in float32 could be made (OutOfMemoryError: CUDA out of memory.)"
    assert (guard.breaks[0].did, guard.breaks[0].why) == ("gave up", why)

    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad(), sk.guard(model, "retry") as guard:
        model(ids, past_key_values=cache)
        guard._wide.of(model).forward = full
        logits = model(ids[:, :1], past_key_values=cache).logits
        assert guard.stopped == (1,)
    assert logits[[0, 2]].isfinite().all()
    assert [one.did for one in guard.breaks] == ["retried", "gave up"]
    assert "its step in float32 failed (OutOfMemoryError" in (guard.breaks[1].why or "")
