"""Faults planted in decoders, the same ones in every family that has the part."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from truth.models import DECODERS, Parts, decoder, under_stress
from truth.plants import Run, answer, given, lost_places, only_at, rows_of
from truth.row import Expected, Origin, Planted, Row

IDS = torch.arange(10, 16)[None]
LAST = IDS.shape[1] - 1
AT = 3  # where faults are planted
HALF = torch.float16


def forward(model: Any) -> Tensor:
    return model(IDS).logits


def site(path: str) -> str:
    """As sites name a module: without the wrapper around the text model."""
    return path.removeprefix("model.")


def here(position: int = AT, ids: Tensor = IDS, row: int = 0) -> dict[str, Any]:
    return {"row": row, "position": position, "positions": (position,), "token": int(ids[row, position])}


def largest(model: Any, path: str, run: Run, place: int, channel: int, made_by: tuple[str, ...]) -> Origin:
    """The larger of what a linear layer combines there: its weight's row, or what it is given."""
    row, x = rows_of(model.get_submodule(path))[channel].abs().max(), given(model, path, run)[place].abs().max()
    if float(row) > 1.05 * float(x):
        return Origin(kinds=("weight",), names=(f"{site(path)}.weight",), finite=True)
    return Origin(kinds=("computed",), names=made_by, finite=True)


def after(model: Any, path: str, position: int, channel: int | None = 0, run: Run = forward) -> Callable[[Any], None]:
    """Shows that the module at `path` is given finite numbers and returns others at this one place."""

    def symptom(result: Any) -> None:
        assert not lost_places(model, path, run, inputs=True)
        only_at(lost_places(model, path, run), position, channel)

    return symptom


def linear(
    name: str, path: str, *, value: float = 80000.0, position: int = AT, layer: int = 1, channel: int = 0
) -> Planted:
    """A linear layer's output past float16's maximum, at one position."""
    model = decoder(name)
    path = path.format(layer)
    answer(model, path, forward, {position: value}, channel)
    origin = largest(model, path, forward, position, channel, ("*",))
    capped = path == DECODERS[name].parts.head and getattr(model.config, "final_logit_softcapping", None)
    model.half()
    return Planted(
        model=model,
        run=forward,
        symptom=after(model, path, position, channel),
        expected=Expected(
            sites=(site(path),), operators=("matmul",), kinds=("overflow",), origin=origin, channel=channel,
                value=value,
            step=0, outcome="absorbed" if capped else "reached", harmless=True if capped else None,
            says=("65,504",), residual=writes(name, path), **here(position),
        ),
    )  # fmt: skip


def writes(name: str, path: str) -> bool:
    """Whether the layer at `path` writes to the residual stream, so that scaling that scales its output."""
    parts = DECODERS[name].parts
    return path in {one.format(layer) for one in (parts.down, parts.output) for layer in (0, 1)}


def down(name: str, **how: Any) -> Planted:
    return linear(name, DECODERS[name].parts.down, **how)


def up(name: str, **how: Any) -> Planted:
    return linear(name, DECODERS[name].parts.up, **how)


def product(name: str, position: int = AT, layer: int = 1, size: float = 300.0, channel: int = 0) -> Planted:
    """gate · up past float16's maximum, with both of them in range."""
    model, parts = decoder(name), DECODERS[name].parts
    assert parts.gate is not None
    assert parts.product is not None
    for path in (parts.gate, parts.up):
        answer(model, path.format(layer), forward, {position: size}, channel)
    model.half()
    into = parts.down.format(layer)

    def symptom(result: Tensor) -> None:
        assert not lost_places(model, parts.up.format(layer), forward)
        only_at(lost_places(model, into, forward, inputs=True), position, channel)

    return Planted(
        model=model,
        run=forward,
        symptom=symptom,
        expected=Expected(
            sites=(parts.product.format(layer),), operators=("mul",), kinds=("overflow",), channel=channel,
                value=size**2,
            origin=Origin(kinds=("computed",), finite=True), step=0, outcome="reached", says=("up_proj|gate",),
            **here(position),
        ),
    )  # fmt: skip


def residual(name: str, position: int = AT, channel: int = 5, gamma: float = 1.0) -> Planted:
    """The sum that ends a layer: 40,000 in the stream, and 40,000 more from the MLP; of a model that is put under
    stress γ, 40,000 / γ before.
    """
    model, parts = decoder(name), DECODERS[name].parts
    answer(model, parts.output.format(1), forward, {position: 40000.0 / gamma}, channel)
    answer(model, parts.down.format(1), forward, {position: 40000.0 / gamma}, channel)
    if gamma != 1:
        model = under_stress(model, gamma, IDS)
    model.half()
    layer = parts.layer.format(1)

    def symptom(result: Tensor) -> None:
        assert not lost_places(model, parts.down.format(1), forward)
        only_at(lost_places(model, layer, forward), position, channel)

    return Planted(
        model=model,
        run=forward,
        symptom=symptom,
        expected=Expected(
            sites=(site(layer), f"{site(layer)}/add.0"), operators=("add",), kinds=("overflow",), channel=channel,
                value=80000.0,
            origin=Origin(kinds=("computed",), finite=True), step=0, outcome="reached", says=("65,504",),
            residual=True, **here(position),
        ),
    )  # fmt: skip


def stressed(name: str) -> Planted:
    """A sum of 1,250 that is 80,000 after everything was scaled with the embedding."""
    return residual(name, gamma=64.0)


def norm(name: str) -> Planted:
    """A norm's gain that lifts one channel past the maximum at one position."""
    model, parts = decoder(name), DECODERS[name].parts
    path = parts.norm.format(1)
    module = model.get_submodule(path)
    bias = getattr(module, "bias", None)
    x = given(model, path, forward)
    normed = x - x.mean(-1, keepdim=True) if bias is not None else x
    normed = normed / normed.square().mean(-1, keepdim=True).sqrt()
    first, second = normed.abs().topk(2, dim=0).values
    channel = int(torch.where(first * second > 1.1, first / second, 0.0).argmax())  # a gain that float16 holds
    assert float(first[channel]) > 1.01 * float(second[channel])
    position = int(normed[:, channel].abs().argmax())
    gain = 65504.0 / math.sqrt(float(first[channel] * second[channel]))
    one = 1.0 if parts.norm_operator == "cast" and float(module.weight.abs().max()) == 0 else 0.0
    module.weight.data[channel] = gain - one
    model.half()
    assert bool(module.weight.isfinite().all())
    operator = "add" if bias is not None else parts.norm_operator
    return Planted(
        model=model,
        run=forward,
        symptom=after(model, path, position, channel),
        expected=Expected(
            sites=(site(path),),
            operators=(operator, "native_layer_norm", "layer_norm") if bias is not None else (operator,),
            kinds=("overflow",), channel=channel, value=None if bias is not None else gain * float(normed[position,
                channel]),
            step=0, outcome="reached", **here(position),
        ),
    )  # fmt: skip


def scores(name: str, position: int = AT) -> Planted:
    """q · k = 90,000 where a token looks at itself; divided by √16 it would be 22,500."""
    model, parts = decoder(name), DECODERS[name].parts
    assert parts.queries is not None
    assert parts.keys is not None
    for path in (parts.queries, parts.keys):
        linear = model.get_submodule(path.format(0))
        rows_of(linear)[:16] = 0.0
        if getattr(linear, "bias", None) is not None:
            linear.bias.data[:16] = 0.0
        answer(model, path.format(0), forward, {position: 300.0}, channel=3)
    capped = getattr(model.config, "attn_logit_softcapping", None)  # tanh(infinity) = 1 = tanh(22,500 / 50)
    model.half()
    output = parts.output.format(0)

    def symptom(result: Tensor) -> None:
        for path in (parts.queries, parts.keys):
            assert not lost_places(model, str(path).format(0), forward)
        assert capped or position in {place[1] for place in lost_places(model, output, forward, inputs=True)}

    return Planted(
        model=model,
        run=forward,
        symptom=symptom,
        expected=Expected(
            sites=(parts.scores.format(0),), operators=("matmul",), kinds=("overflow",), value=90000.0, row=0,
            position=position, token=int(IDS[0, position]), scaled=22500.0, step=0,
                origin=Origin(kinds=("computed",), finite=True),
            outcome="absorbed" if capped else "reached", harmless=True if capped else None,
            says=() if capped else ("22,5|scale",),
        ),
    )  # fmt: skip


def weight(name: str, lost: float = math.nan, place: tuple[int, int] = (7, 5), layer: int = 1) -> Planted:
    """A weight that is not finite: every token is lost."""
    model, parts = decoder(name), DECODERS[name].parts
    path = parts.output.format(layer)
    rows_of(model.get_submodule(path))[place] = lost
    model.half()
    return Planted(
        model=model,
        run=forward,
        symptom=lambda result: only_channel(lost_places(model, path, forward), place[0]),
        expected=Expected(
            sites=(site(path),), operators=("matmul",), kinds=("weight",), step=0, row=0, position=0, channel=place[0],
            origin=Origin(kinds=("weight",), names=(f"{site(path)}.weight",), finite=False), outcome="reached",
            positions=tuple(range(LAST + 1)), says=(site(path),), never=("overflows in", "starts with"),
        ),
    )  # fmt: skip


def only_channel(places: list[tuple[int, ...]], channel: int) -> None:
    assert {place[-1] for place in places} == {channel}


def embedding(name: str, position: int = AT, channel: int = 9) -> Planted:
    """An embedding of 70,000, which .half() makes infinite: only the token that has it is lost."""
    model, parts = decoder(name), DECODERS[name].parts
    model.get_submodule(parts.embedding).weight.data[int(IDS[0, position]), channel] = 70000.0
    model.half()
    path = site(parts.embedding)
    return Planted(
        model=model,
        run=forward,
        symptom=lambda result: only_at(lost_places(model, parts.embedding, forward), position, channel),
        expected=Expected(
            sites=(path, f"{path}/embedding.0"), operators=("embedding",), kinds=("weight",), step=0, channel=channel,
            origin=Origin(kinds=("weight",), names=(f"{path}.weight",), finite=False), outcome="reached",
            says=(parts.embedding.rpartition(".")[2],),
                never=(r"(?<!if not, )no number format helps", "overflows in"), **here(position),
        ),
    )  # fmt: skip


def masked(name: str, position: int = AT) -> Planted:
    """An additive mask that hides every key from the query at one position."""
    model, parts = decoder(name), DECODERS[name].parts
    size = LAST + 1
    mask = torch.full((1, 1, size, size), -math.inf).triu(1)
    mask[..., position, :] = -math.inf

    def run(m: Any) -> Tensor:
        given: Any = mask.half()
        if getattr(m.config, "layer_types", None) and "sliding_attention" in m.config.layer_types:
            given = {"full_attention": given, "sliding_attention": given}
        return m(IDS, attention_mask=given).logits

    model.half()
    output = parts.output.format(0)
    return Planted(
        model=model,
        run=run,
        symptom=lambda result: only_row(lost_places(model, output, run, inputs=True), position),
        expected=Expected(
            sites=(f"{site(parts.attention.format(0))}/softmax.0",), operators=("softmax",), kinds=("masked-row",),
            row=0, position=position, positions=(position,), step=0, outcome="reached", says=("mask", "every key"),
            never=("overflows in", "wider range", "starts with"),
        ),
    )  # fmt: skip


def only_row(places: list[tuple[int, ...]], position: int) -> None:
    assert {place[1] for place in places} == {position}, places


def embedded(name: str, at: int = AT) -> Planted:
    """NaN in the embeddings that are passed in place of ids, at one position."""
    model, parts = decoder(name).half(), DECODERS[name].parts
    vectors = model.get_submodule(parts.embedding)(IDS).clone()
    vectors[0, at, 5] = math.nan

    more = {"per_layer_inputs": torch.zeros(1, LAST + 1, 2, 8, dtype=HALF)} if name == "gemma4" else {}

    def run(m: Any) -> Tensor:
        return m(inputs_embeds=vectors, **more).logits

    return Planted(
        model=model,
        run=run,
        symptom=lambda result: only_at([tuple(p) for p in (~vectors.isfinite()).nonzero().tolist()], at, 5),
        expected=Expected(
            sites=(f"{site(parts.norm.format(0))}*", "per_layer_model_projection*", "/*", "transformer/*",
                "embed_dropout*"),
            kinds=("input",), row=0, position=at, step=0,
            origin=Origin(kinds=("input",), names=("inputs_embeds", "*inputs_embeds*"), finite=False),
            outcome="reached", says=("inputs_embeds",), never=("token 1", "starts with", "finite operands"),
        ),
    )  # fmt: skip


def cache_slot(name: str, slot: int = 2) -> Planted:
    """NaN in a slot of the cache, written there between two steps."""
    model, parts = decoder(name).half(), DECODERS[name].parts

    def run(m: Any) -> Tensor:
        cache: Any = DynamicCache(config=m.config)
        m(IDS, past_key_values=cache)
        cache.layers[1].values[0, 0, slot, 5] = math.nan
        return m(torch.tensor([[20]]), past_key_values=cache).logits

    return Planted(
        model=model,
        run=run,
        symptom=lambda result: only_channel(lost_at_step(model, parts.output.format(1), run), 5),
        expected=Expected(
            sites=(f"{site(parts.attention.format(1))}/matmul.1",), operators=("matmul",), kinds=("input", "constant"),
            step=1, origin=Origin(kinds=("cache", "outside", "constant"), finite=False), outcome="reached",
            never=("overflows in", "finite operands"),
        ),
    )  # fmt: skip


def lost_at_step(model: Any, path: str, run: Run) -> list[tuple[int, ...]]:
    """Of what the module is given at the second step, the first head's share."""
    seen: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    with torch.inference_mode():
        run(model)
    hook.remove()
    assert bool(seen[0].isfinite().all())
    return [tuple(place) for place in (~seen[1][..., :16].isfinite()).nonzero().tolist()]


def autocast(name: str, position: int = AT) -> Planted:
    """A float32 model under autocasting to float16."""
    model, parts = decoder(name), DECODERS[name].parts
    path = parts.down.format(1)

    def run(m: Any) -> Tensor:
        with torch.autocast("cpu", HALF):
            return m(IDS).logits

    answer(model, path, forward, {position: 80000.0})
    return Planted(
        model=model,
        run=run,
        symptom=after(model, path, position, run=run),
        expected=Expected(
            sites=(site(path),), operators=("matmul",), kinds=("overflow",), channel=0, value=80000.0, step=0,
            outcome="reached", says=("float16",), residual=True, **here(position),
        ),
    )  # fmt: skip


class Forced(LogitsProcessor):
    """Lets only the next of these tokens be drawn."""

    def __init__(self, length: int, tokens: tuple[int, ...]) -> None:
        self.length, self.tokens = length, tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        kept = torch.full_like(scores, -math.inf)
        token = self.tokens[input_ids.shape[1] - self.length]
        kept[:, token] = scores[:, token].nan_to_num(0.0)
        return kept


def generated(name: str, cache: str | None = None, **how: Any) -> Planted:
    """Greedy generation in which the second token generated breaks the third step."""
    model, parts = decoder(name), DECODERS[name].parts
    path, tokens = parts.down.format(1), (20, 77, 21)
    forced = LogitsProcessorList([Forced(IDS.shape[1], tokens)])

    def run(m: Any) -> Tensor:
        out = m.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False, logits_processor=forced,
            cache_implementation=cache, return_dict_in_generate=True, output_logits=True, **how,
        )  # fmt: skip
        return torch.stack(out.logits)

    answer(model, path, run, {LAST + 2: 80000.0})
    model.half()
    return Planted(
        model=model,
        run=run,
        expected=Expected(
            sites=(site(path),), operators=("matmul",), kinds=("overflow",), row=0, position=LAST + 2, step=2, token=77,
            channel=0, value=80000.0, outcome="reached", says=("generated",), residual=True,
        ),
    )  # fmt: skip


def _has(parts: Parts, plant: Callable[..., Planted]) -> bool:
    needed: dict[Callable[..., Planted], bool] = {
        down: not parts.down.endswith("experts"),
        up: bool(parts.up),
        product: parts.product is not None,
        residual: parts.residual and not parts.down.endswith("experts"),
        stressed: parts.residual and not parts.down.endswith("experts"),
        scores: parts.queries is not None,
        autocast: not parts.down.endswith("experts"),
        generated: not parts.down.endswith("experts"),
    }
    return needed.get(plant, True)


PLANTS: tuple[tuple[str, int, Callable[..., Planted]], ...] = (
    ("down projection overflows", 5, down),
    ("gate · up overflows", 5, product),
    ("q · k before the scale", 5, scores),
    ("residual sum", 5, residual),
    ("residual sum under stress", 5, stressed),
    ("gain of a norm", 5, norm),
    ("NaN in a weight", 10, weight),
    ("embedding past the maximum", 4, embedding),
    ("row of a mask hides every key", 2, masked),
    ("NaN in inputs_embeds", 1, embedded),
    ("NaN in a slot of the cache", 1, cache_slot),
    ("autocast", 10, autocast),
    ("third step of a generation", 6, generated),
)

ROWS: tuple[Row, ...] = tuple(
    Row(name=text, root=root, family=name, make=partial(plant, name))
    for name in DECODERS
    for text, root, plant in PLANTS
    if _has(DECODERS[name].parts, plant)
)
