"""The smallest input that fails alike, on faults planted so that the answer is known, and checked by hand."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import stabilitykit as sk
from stabilitykit.checkpoints import Checkpoint, GemmaConfig
from stabilitykit.errors import MisuseError
from stabilitykit.models.gemma import Gemma
from stabilitykit.models.gemma.subject import GemmaSubject
from stabilitykit.models.matmul import matmul
from stabilitykit.models.subject import Subject
from stabilitykit.recorder import record
from stabilitykit.records.trials import Diagnosis, Smallest
from stabilitykit.report.blocks import Prose
from stabilitykit.report.parts import trials
from stabilitykit.run.batch import Asked
from stabilitykit.run.prompts import parse_prompt
from stabilitykit.run.source import Source
from stabilitykit.trials.columns import Columns, given_call
from stabilitykit.trials.minimise import has_tokens, minimise
from stabilitykit.trials.prompts import Prompted, prompted

HIDDEN, HEAD = 16, 8
FILL, SELF, KEY, QUERY = 5, 9, 20, 21  # tokens; the first breaks nothing


def llama() -> Any:
    """Attention scores overflow in layer 0 where the token QUERY comes 6, 13, 19, 25 or 31 after the token KEY, and in
    layer 1 at the token SELF.

    One pair of channels turns by a radian a token, so that QUERY · KEY is 30,000 + 40,000 cos(their distance).
    """
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1,
        head_dim=HEAD, vocab_size=32,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
    )  # fmt: skip
    config._attn_implementation = "eager"
    model: Any = transformers.LlamaForCausalLM(config)
    model.eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "norm" not in name:
            weight.data.mul_(0.01)
    for channel, token in enumerate((SELF, KEY, QUERY)):
        model.model.embed_tokens.weight[token, channel] = 1.0
    norm = math.sqrt(HIDDEN)  # of what a norm returns
    query, key = (getattr(model.model.layers[0].self_attn, name).weight for name in ("q_proj", "k_proj"))
    for turning, score in ((0, 40_000.0), (HEAD // 2 - 1, 30_000.0)):  # the last pair turns by 1e-9
        query[turning, 2] = key[turning, 1] = math.sqrt(score) / norm
    for name in ("q_proj", "k_proj"):
        getattr(model.model.layers[1].self_attn, name).weight[HEAD // 2 - 1, 0] = math.sqrt(90_000.0) / norm
    return model.half()


def breaks_by_hand(model: Any, rows: Sequence[Sequence[int]], **given: Any) -> bool:
    """Whether attention makes NaN of finite queries and keys in one of the layers: as plain hooks see it."""
    seen: list[bool] = []

    def attention(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given_in = kwargs["hidden_states"]
        seen.append(bool(given_in.isfinite().all()) and not bool(output[0].isfinite().all()))

    handles = [one.self_attn.register_forward_hook(attention, with_kwargs=True) for one in model.model.layers]
    try:
        with torch.inference_mode():
            model(torch.tensor(rows), **given)
    finally:
        for handle in handles:
            handle.remove()
    return any(seen)


def smallest_of(model: Any, ids: Sequence[Sequence[int]], **given: Any) -> Smallest:
    reproduction = given_call(model, "__call__", (torch.tensor(ids),), given, dtype="float16")
    assert has_tokens(reproduction)
    found = minimise(reproduction)
    assert found is not None
    return found.smallest


def without_each(row: Sequence[int]) -> list[list[int]]:
    return [[*row[:at], *row[at + 1 :]] for at in range(len(row))]


def test_the_fault_is_where_it_was_planted() -> None:
    model = llama()
    at = [d for d in range(1, 35) if breaks_by_hand(model, [[KEY, *[FILL] * (d - 1), QUERY]])]
    assert at == [d for d in range(1, 35) if 30_000 + 40_000 * math.cos(d) > 65_519]
    assert at == [6, 13, 19, 25, 31]


def test_one_token_is_found_among_many() -> None:
    tokens = [FILL, 3, 4, FILL, SELF, 2, FILL, 6]
    found = smallest_of(llama(), [tokens])
    assert found.tokens == ((SELF,),)
    assert (found.kind, found.label, found.site) == ("overflow", "attention scores", "layers.1.self_attn/matmul.0")
    assert (found.before, found.minimal) == (8, True)


@pytest.mark.parametrize(("before", "distance", "after"), [(0, 6, 0), (3, 6, 5), (9, 19, 4), (30, 25, 2), (1, 31, 40)])
def test_two_tokens_that_break_together_are_found_with_what_has_to_stand_between(
    before: int, distance: int, after: int
) -> None:
    """At most distances the break is gone, so that fewer tokens may break where more do not."""
    model = llama()
    fill = [FILL, 2, 3, 4, 6, 7]
    text = [*(fill * 9)[:before], KEY, *(fill * 9)[: distance - 1], QUERY, *(fill * 9)[:after]]
    found = smallest_of(model, [text])
    (row,) = found.tokens
    assert (row[0], row[-1], found.minimal) == (KEY, QUERY, True)
    assert (found.kind, found.label) == ("overflow", "attention scores")
    assert breaks_by_hand(model, [row])
    assert not any(breaks_by_hand(model, [fewer]) for fewer in without_each(row))
    assert found.runs < 100


def test_a_break_may_move_to_another_token_and_layer_of_the_same_label() -> None:
    text = [FILL, KEY, 2, 3, SELF, 4, 6, QUERY, FILL]
    model = llama()
    with torch.inference_mode(), record(model) as recording:
        model(torch.tensor([text]))
    first = recording.first_break()
    assert first is not None
    assert first.site == "layers.0.self_attn/matmul.0"
    found = smallest_of(model, [text])
    assert (found.tokens, found.site) == (((SELF,),), "layers.1.self_attn/matmul.0")


def test_what_a_call_is_given_beside_its_tokens_is_cut_with_them() -> None:
    """A batch padded on the left, whose row 1 breaks by the positions that it was given: 13 apart, not 4."""
    model = llama()
    ids = [[0, 0, FILL, 2, 3, 4, 6, FILL], [0, KEY, 2, 3, FILL, QUERY, 4, 6], [FILL, 2, 2, 3, 3, 4, 4, 6]]
    mask = [[0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1], [1] * 8]
    places = [[0, 0, 0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 12, 13, 14, 15], [*range(8)]]
    given = {"attention_mask": torch.tensor(mask), "position_ids": torch.tensor(places)}
    assert breaks_by_hand(model, ids, **given)
    found = smallest_of(model, ids, **given)
    assert found.tokens == ((KEY, QUERY),)
    assert found.before == 24
    assert breaks_by_hand(model, [[KEY, QUERY]], position_ids=torch.tensor([[0, 13]]))
    assert not breaks_by_hand(model, [[KEY, QUERY]])


def test_columns_are_those_of_every_argument_that_has_them() -> None:
    ids = torch.arange(8).reshape(2, 4)
    given: dict[str, Tensor] = {
        "input_ids": ids,
        "attention_mask": torch.arange(12).reshape(2, 6),  # two in a cache
        "position_ids": torch.arange(24).reshape(3, 2, 4),
        "inputs_embeds": torch.arange(40).reshape(2, 4, 5),
        "cache_position": torch.arange(4),
        "pixel_values": torch.arange(16).reshape(2, 4, 2),  # four channels are not four tokens
        "labels": ids,
    }
    columns = Columns.of((), given)
    assert columns is not None
    args, kept = columns.kept([1], [0, 3])
    assert args == ()
    expected = {
        "input_ids": ids[1:, [0, 3]],
        "attention_mask": given["attention_mask"][1:, [0, 1, 2, 5]],
        "position_ids": given["position_ids"][:, 1:, [0, 3]],
        "inputs_embeds": given["inputs_embeds"][1:, [0, 3]],
        "cache_position": torch.tensor([0, 3]),
        "pixel_values": given["pixel_values"][1:],
        "labels": ids[1:, [0, 3]],
    }
    assert kept.keys() == expected.keys()
    for name, one in expected.items():
        assert torch.equal(kept[name], one), name
    square = torch.arange(16).reshape(1, 1, 4, 4)
    columns = Columns.of((ids,), {"attention_mask": square, "use_cache": False})
    assert columns is not None
    (cut,), kept = columns.kept([0, 1], [1, 2])
    assert torch.equal(cut, ids[:, 1:3])
    assert torch.equal(kept["attention_mask"], square[:, :, 1:3, 1:3])
    assert kept["use_cache"] is False
    assert Columns.of((torch.randn(2, 4),), {"pixel_values": torch.randn(2, 4)}) is None


def test_tokens_after_a_cache_are_left_out_and_the_cache_stays() -> None:
    model = llama()
    cache: Any = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.tensor([[2, KEY, 3]]), past_key_values=cache)
    before = [layer.keys.clone() for layer in cache.layers]
    text = [4, FILL, 2, 3, QUERY, 6]  # 6 after the key
    mask = torch.ones(1, 9, dtype=torch.long)
    found = smallest_of(model, [text], past_key_values=cache, attention_mask=mask)
    (row,) = found.tokens
    assert row == (4, FILL, 2, 3, QUERY)
    assert all(map(torch.equal, before, (layer.keys for layer in cache.layers)))


def told(found: Diagnosis) -> str:
    """All that is printed of it, as prose."""
    return " ".join(one.text for one in trials.blocks(found) if isinstance(one, Prose))


def test_diagnose_says_the_smallest_input_and_that_it_is_what_was_diagnosed() -> None:
    model = llama()
    found = sk.diagnose(model, input_ids=torch.tensor([[FILL, 2, SELF, 3]]), minimise=True)
    assert found.smallest is not None
    assert (found.smallest.tokens, found.diagnosed) == (((SELF,),), "smallest")
    assert "This is about the smallest input found that fails alike, 1 token of 4, not about the whole one." in told(
        found
    )
    alone = sk.diagnose(model, input_ids=torch.tensor([[SELF]]))
    assert alone.diagnosed == "whole"
    assert [replace(one, cures_whole=None) for one in found.trials] == list(alone.trials)
    assert (found.verdict, found.findings, found.plain) == (alone.verdict, alone.findings, alone.plain)
    unbroken = sk.diagnose(model, input_ids=torch.tensor([[FILL, 2, 3]]), minimise=True)
    assert (unbroken.smallest, unbroken.diagnosed) == (None, "whole")
    assert "nothing breaks, so that no token was left out" in unbroken.notes
    with pytest.raises(MisuseError, match="Only an input with tokens"):
        sk.diagnose(nn.Linear(2, 2).half(), torch.full((1, 2), 60_000.0).half(), minimise=True)


def test_it_stops_after_so_many_runs_and_says_that_it_did() -> None:
    model = llama()
    text = [*[FILL] * 20, KEY, *[FILL] * 18, QUERY]
    reproduction = given_call(model, "__call__", (torch.tensor([text]),), {}, dtype="float16")
    assert has_tokens(reproduction)
    minimised = minimise(reproduction, most_runs=9)
    assert minimised is not None
    found = minimised.smallest
    assert not found.minimal
    assert found.runs <= 10  # the last one confirms what is kept
    assert breaks_by_hand(model, found.tokens)
    diagnosed = sk.diagnose(model, torch.tensor([text]), minimise=True)
    assert "may get smaller" not in told(diagnosed)
    assert "may get smaller" in told(replace(diagnosed, smallest=found))


class Squares(nn.Module):
    """What overflows first, at token 3, ends in a tanh and does no harm; token 5 breaks for good."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 2).requires_grad_(False)
        self.embedding.weight.fill_(0.1)
        self.embedding.weight[3, 0] = self.embedding.weight[5, 1] = 300.0

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.embedding(input_ids)
        first, second = hidden[..., 0], hidden[..., 1]
        return torch.tanh(first * first) + second * second


def test_a_harmless_overflow_that_comes_first_is_not_the_one_to_keep() -> None:
    model = Squares().half()
    found = smallest_of(model, [[1, 3, 2, 5, 4]])
    assert (found.tokens, found.site) == (((5,),), "/mul.1")
    harmless = smallest_of(model, [[1, 3, 2]])
    assert (harmless.tokens, harmless.site) == (((3,),), "/mul.0")


def test_where_an_overflow_is_harmless_the_whole_input_is_diagnosed() -> None:
    found = sk.diagnose(Squares().half(), torch.tensor([[1, 3, 2]]), minimise=True)
    assert found.is_well
    assert found.smallest is not None
    assert (found.smallest.tokens, found.diagnosed) == (((3,),), "whole")
    assert found.plain is not None
    assert found.plain.rows == 1  # of the numbers of three tokens
    assert "all else here is about the whole input" in told(found)


class TwoFaults(nn.Module):
    """The square of token 3 overflows, and of token 5 the double, which comes later; both fit once they are divided."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 2).requires_grad_(False)
        self.embedding.weight.fill_(0.1)
        self.embedding.weight[3, 0], self.embedding.weight[5, 1] = 300.0, 60_000.0

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.embedding(input_ids)
        first, second = hidden[..., 0], hidden[..., 1]
        return (first * first) / 8 + (second + second) / 8


def test_what_cures_the_smallest_input_is_tried_on_the_whole_one() -> None:
    """Of two faults the first alone is in the smallest input, and what cures that one leaves the other."""
    model = TwoFaults().half()
    one_fault, both = torch.tensor([[1, 3, 2, 4]]), torch.tensor([[1, 3, 2, 5]])
    found = sk.diagnose(model, one_fault, minimise=True)
    assert found.smallest is not None
    assert found.smallest.tokens == ((3,),)
    best = found.cures[0]
    assert [one.name for one in found.trials if one.cures_whole is not None] == [best.name]  # no more has to be tried
    assert best.cures_whole
    assert f"On the whole input {best.name} helps, too." in found.advice
    found = sk.diagnose(model, both, minimise=True)
    assert found.smallest is not None
    assert found.smallest.tokens == ((3,),)
    assert found["float32 operator"].cured
    assert found["float32 operator"].cures_whole is False
    assert not sk.diagnose(model, both)["float32 operator"].finite
    (good,) = (one.name for one in found.trials if one.cures_whole)
    assert good in ("float32", "bfloat16")
    assert f"On the whole input {good} helps, too." in found.advice
    assert "float32 operator) does not cure the whole one" in found.advice


class Doubling(nn.Module):
    """Layers without labels: what they double overflows in layer 0 where token 3 comes after token 4, and in layer 1 at
    token 5.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 2).requires_grad_(False)
        self.embedding.weight.fill_(1.0)
        self.embedding.weight[3:5, 0] = 17_000.0
        self.embedding.weight[5, 1] = 34_000.0
        self.layers = nn.ModuleList([Twice(), Twice()])

    def forward(self, input_ids: Tensor) -> Tensor:
        first, second = self.embedding(input_ids).unbind(-1)
        made: Tensor = self.layers[1](self.layers[0](first.cumsum(-1)) / 16 + second)
        return made


class Twice(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * 2


def test_without_labels_breaks_are_alike_but_for_the_numbers_of_layers() -> None:
    model = Doubling().half()
    text = [1, 4, 5, 1, 3]
    with torch.inference_mode(), record(model) as recording:
        model(torch.tensor([text]))
    first = recording.first_break()
    assert first is not None
    assert (first.site, first.label) == ("layers.0", None)
    found = smallest_of(model, [text])
    assert (found.tokens, found.site, found.label) == (((5,),), "layers.1", None)


CONFIG = GemmaConfig(
    generation=3, layers=2, hidden_size=32, feed_forward=64, heads=4, kv_heads=2, head_dim=8, vocabulary=64, window=8,
    global_every=2,
)  # fmt: skip


def gemma_prompts(rows: Sequence[Sequence[int]], large: int) -> tuple[Gemma, Prompted]:
    """A tiny Gemma 3 whose embedding of the token `large` is past float16's maximum when it is normalised."""
    torch.manual_seed(0)
    model = Gemma(CONFIG).eval().requires_grad_(False)
    model.embed_tokens.weight[large] = 30_000.0

    def subject_in(dtype: str, announce: Callable[[int, int], None]) -> Subject:
        return GemmaSubject(copy.deepcopy(model).to(getattr(torch, dtype)))

    source = Source(
        tokens=list(rows[0]),
        piece=lambda token: f"[{token}]",
        subject_in=subject_in,
        read=lambda asked: [],
        tensors=(),
        bytes=0,
    )
    return model, Prompted(name="", opened=source, tokens=tuple(map(tuple, rows)), dtype="float16")


def test_of_a_batch_of_prompts_only_the_row_that_breaks_is_kept() -> None:
    _, batch = gemma_prompts([[2, 5, 6, 7, 8], [2, 9], [2, 5, 40, 6], [2, 3, 4]], large=40)
    minimised = minimise(batch)
    assert minimised is not None
    found = minimised.smallest
    assert (found.tokens, found.texts, found.before) == (((40,),), ("[40]",), 14)


def test_where_padding_breaks_a_shorter_row_is_kept_beside_a_longer_one() -> None:
    model, batch = gemma_prompts([[2, 5, 6, 7, 8], [2, 9, 5], [2, 5, 41, 6, 7]], large=0)
    minimised = minimise(batch)
    assert minimised is not None
    found = minimised.smallest
    assert sorted(map(len, found.tokens)) == [1, 2]
    assert found.minimal
    assert not bool((model.half().embed_tokens(torch.tensor([[0]]))).isfinite().all())


@pytest.mark.table
def test_the_real_gemma_without_bos_breaks_at_a_few_tokens_alike(checkpoint_270m: Checkpoint) -> None:
    """From 2,048 tokens of a novel: what is found breaks in the same way, and without any one token it does not."""
    text = parse_prompt("prose", Path()).text[:12_000]
    whole = prompted("gemma3-270m", [Asked(text=text)], bos=False)
    whole = whole.with_tokens([whole.tokens[0][:2048]])
    model: Any = whole.model("float16")
    with torch.inference_mode(), record(model, stop_at_break=True, matmul=whole.matmul) as recording:
        whole.run(model)
    first = recording.first_break()
    assert first is not None
    assert first.broke is not None
    minimised = minimise(whole, model=model)
    assert minimised is not None
    found = minimised.smallest
    assert found.minimal
    assert (found.kind, found.label) == (first.broke.kind, first.label)
    (row,) = found.tokens
    assert len(row) <= 64

    def overflows(tokens: Sequence[int]) -> bool:
        """As plain hooks see it: a layer makes infinities of what is finite."""
        seen: list[bool] = []

        def layer(module: nn.Module, args: Any, output: Tensor) -> None:
            seen.append(bool(args[0].isfinite().all()) and bool(output.isinf().any()))

        handles = [one.register_forward_hook(layer) for one in model.layers]
        try:
            with torch.inference_mode(), matmul("float32-accumulate"):
                model(torch.tensor([tokens]), last_only=True)
        finally:
            for handle in handles:
                handle.remove()
        return any(seen)

    assert overflows(row)
    assert not any(overflows(fewer) for fewer in without_each(row))
