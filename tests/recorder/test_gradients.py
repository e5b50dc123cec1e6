"""Gradients by site: what a hook on each tensor sees, with the same bits as without a recorder."""

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from stabilitykit.diagnosis import verdict
from stabilitykit.recorder import record
from stabilitykit.records import Level, Record, Recording

IDS = torch.tensor([[3, 14, 15, 9, 2, 6], [5, 3, 5, 8, 9, 7]])
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "attn_implementation": "eager",
}  # fmt: skip


def llama(dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**SIZES | more))
    return model.to(dtype)


def gemma(dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES | {"head_dim": 8, "query_pre_attn_scalar": 8} | more))
    return model.to(dtype)


MODELS = {"llama": llama, "gemma": gemma}


def loss_of(model: Any) -> Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def gradients(recording: Recording) -> list[Record]:
    return [record for record in recording if record.site.startswith("backward/")]


def of(recording: Recording, site: str) -> Record:
    (found,) = (record for record in gradients(recording) if record.site == f"backward/{site}")
    return found


def train(model: nn.Module, recorded: Any, *, autocast: torch.dtype | None, steps: int = 2) -> list[Tensor]:
    """Losses, gradients and weights of a few steps with a GradScaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seen = []
    with recorded(model):
        for _ in range(steps):
            optimizer.zero_grad()
            with nullcontext() if autocast is None else torch.autocast("cpu", dtype=autocast):
                loss = loss_of(model)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            seen += [loss.detach(), norm, *(held.grad.clone() for held in model.parameters() if held.grad is not None)]
            scaler.step(optimizer)
            scaler.update()
            seen += [held.detach().clone() for held in model.parameters()]
    return seen


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", MODELS)
def test_a_training_step_has_the_same_bits_with_and_without(family: str, autocast: Any, level: Level) -> None:
    plain = train(MODELS[family](), lambda model: nullcontext(), autocast=autocast)
    recorded = train(
        MODELS[family](),
        lambda model: record(model, backward=True, level=level, formats=("float16",)),
        autocast=autocast,
    )
    assert same(plain, recorded)


def test_every_gradient_is_what_a_hook_on_the_tensor_sees() -> None:
    model = llama()
    hooked: dict[str, Tensor] = {}
    handles = []

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, Tensor):
                tensor.register_hook(lambda grad: hooked.__setitem__(name, grad.clone()))

        return hook

    paths = [
        name for name, _ in model.named_modules() if name.endswith(("_proj", "mlp", "layernorm", "lm_head", "norm"))
    ]
    for name in paths:
        handles.append(model.get_submodule(name).register_forward_hook(keep(name)))
    loss_of(model).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    with record(model, backward=True, formats=("float16",)) as recording:
        loss_of(model).backward()
    for name in paths:
        site = name.removeprefix("model.")
        site = site.replace(".mlp", ".mlp.down_proj") if site.endswith(".mlp") else site  # whose output it hands on
        found, grad = of(recording, site), hooked[name]
        assert found.amax == float(grad.abs().max()), site
        assert found.elements == grad.numel()
        assert found.formats["float16"].zero == int(((grad != 0) & (grad.half() == 0)).sum())
        small = grad.half().abs()
        assert found.formats["float16"].subnormal == int(((small > 0) & (small < 2.0**-14)).sum())
    for name, held in model.named_parameters():
        found = of(recording, name.removeprefix("model."))
        assert held.grad is not None
        assert (found.amax, found.of_weight) == (float(held.grad.abs().max()), True)
        assert found.zero == int((held.grad == 0).sum())


def test_gradients_come_in_the_order_in_which_autograd_makes_them() -> None:
    model = llama()
    order: list[str] = []
    handles = [
        held.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name.removeprefix("model.")))
        for name, held in model.named_parameters()
    ]
    loss_of(model).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    with record(model, backward=True, formats=()) as recording:
        loss_of(model).backward()
    assert [record.site.removeprefix("backward/") for record in gradients(recording) if record.of_weight] == order


class Chain(nn.Module):
    """x · w, then `last` of it."""

    def __init__(self, last: Callable[[Tensor], Tensor], weight: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), weight))
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x * self.weight)


def broken(recording: Recording) -> Record:
    return next(record for record in recording if record.broke is not None)


@pytest.mark.parametrize(
    ("last", "x", "kind", "value"),
    [
        (lambda y: (y * 300).float().sum() * 300, 1.0, "overflow", 90000.0),
        (lambda y: y.sqrt().sum(), 0.0, "division-by-zero", float("inf")),
        (lambda y: torch.where(y > 0, y.sqrt(), 0 * y).sum(), 0.0, "invalid", None),
        (lambda y: y.float().exp().sum(), 11.5, "overflow", 98715.77),
        (lambda y: (1 / (y + 1)).float().sum() * 1000, -0.9, "overflow", -100000.0),
        (lambda y: (y @ torch.full((4, 1), 200.0).half()).float().sum() * 400, 1.0, "overflow", 80000.0),
        (lambda y: torch.linalg.vector_norm(y), 0.0, None, None),
        (lambda y: y.log().sum(), 6e-8, "overflow", 2.0**24),
        (lambda y: (y.expand(30, 2, 4)).float().sum() * 3000, 1.0, "overflow", 90000.0),
    ],
)
def test_what_autograd_makes_infinite_is_computed_again(
    last: Callable[[Tensor], Tensor], x: float, kind: str | None, value: float | None
) -> None:
    model = Chain(last).half()
    given = torch.full((2, 4), x, dtype=torch.float16)
    with record(model, backward=True, formats=()) as recording:
        model(given).backward()
    assert model.weight.grad is not None
    if kind is None:
        assert bool(model.weight.grad.isfinite().all())
        assert recording.first_break() is None
        return
    found = broken(recording)
    assert found.site.startswith("backward/")
    assert found.broke is not None
    assert found.broke.kind == kind
    if value is not None:
        assert found.broke.value == pytest.approx(value, rel=0.02)


def test_a_weights_element_is_told_with_its_own_value() -> None:
    model = nn.Linear(3, 5, bias=False).half()
    x = torch.ones(1, 4, 3).half()
    x[..., 2] = 200.0
    scale = torch.tensor([1.0, 1.0, 1.0, 100.0, 1.0]).half()
    with record(model, backward=True, formats=()) as recording:
        (model(x) * scale).float().sum().backward()
    found = broken(recording).broke
    assert found is not None
    assert (found.index, found.channel, found.value) == ((3, 2), 2, 80000.0)  # 4 tokens · 200 · 100
    assert found.operands == (100.0, 200.0)
    assert found.operand_sites[1] == "x" or found.operand_sites[1] == "input"


def test_what_the_forward_pass_hides_it_does_not_hide_from_autograd() -> None:
    model = Chain(lambda y: torch.where(y > 0, 1 / y, y * 0).sum())
    with record(model, backward=True, formats=()) as recording:
        loss = model(torch.zeros(2, 4))
        loss.backward()
    assert float(loss.detach()) == 0
    first, second = (record for record in recording if record.broke is not None)
    assert (first.operator, first.site) == ("reciprocal", "/reciprocal.0")
    assert second.broke is not None
    assert (second.site, second.operator) == ("backward//mul.0", "reciprocal")
    assert (second.broke.origin_name, second.broke.origin_finite) == ("/reciprocal.0", False)
    assert "In the backward pass the gradient of" in verdict(recording)


def test_no_hook_remains_and_no_gradient_is_kept() -> None:
    model = llama()
    freed: list[Any] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        output.register_hook(lambda grad: freed.append(weakref.ref(grad)))

    model.get_submodule("model.layers.0.mlp.act_fn").register_forward_hook(watch)
    with record(model, backward=True, formats=()):
        loss = loss_of(model)
        loss.backward(retain_graph=True)
        gc.collect()
        assert [one() for one in freed] == [None]
        assert not any(_python_hooks(held) for held in model.parameters())
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 0
    before = [held.grad.clone() for held in model.parameters() if held.grad is not None]
    for held in model.parameters():
        held.grad = None
    loss.backward()  # the graph is as autograd made it
    assert same(before, [held.grad for held in model.parameters() if held.grad is not None])


def _python_hooks(held: Tensor) -> bool:
    return bool(held._backward_hooks) or bool(getattr(held, "_post_accumulate_grad_hooks", None))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(reentrant: bool, level: Level) -> None:
    def run(model: Any, recorded: Any) -> list[Tensor]:
        model.train()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        with recorded(model) as recording:
            (loss_of(model) * 1024).backward()
        runs.append(recording)
        return [held.grad for held in model.parameters()]

    runs: list[Any] = []
    plain = run(llama(use_cache=False), lambda model: nullcontext())
    assert same(plain, run(llama(use_cache=False), lambda model: record(model, backward=True, level=level, formats=())))
    recording: Recording = runs[1]
    assert recording.header.notes == ()
    assert of(recording, "layers.0.mlp.down_proj.weight").amax == float(
        plain[_index("layers.0.mlp.down_proj")].abs().max()
    )
    if level != "layers":
        assert [r.site for r in gradients(recording)].count("backward/layers.0.mlp.down_proj") == 1


def _index(path: str) -> int:
    names = [name for name, _ in llama().named_parameters()]
    return names.index(f"model.{path}.weight")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_of_peft() -> None:
    import peft

    def adapted() -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        return peft.get_peft_model(llama(), config)

    plain = train(adapted(), lambda model: nullcontext(), autocast=torch.float16)
    runs: list[Recording] = []

    class Kept:
        def __init__(self, model: nn.Module) -> None:
            self.inner = record(model, backward=True, formats=())

        def __enter__(self) -> None:
            runs.append(self.inner.__enter__())

        def __exit__(self, *raised: Any) -> None:
            self.inner.__exit__(*raised)

    assert same(plain, train(adapted(), Kept, autocast=torch.float16))
    weights = {record.site for record in gradients(runs[0]) if record.of_weight}
    assert len(weights) == 8
    assert all("lora" in site for site in weights)


def test_accumulation_records_the_sum() -> None:
    model = llama()
    with record(model, backward=True, formats=()) as recording:
        for _ in range(2):
            (loss_of(model) / 2).backward()
    found = [r.amax for r in gradients(recording) if r.site == "backward/norm.weight"]
    held = model.get_parameter("model.norm.weight")
    assert held.grad is not None
    assert len(found) == 2
    assert found[1] == float(held.grad.abs().max())


def test_what_was_infinite_before_the_pass_is_not_blamed_on_it() -> None:
    model = Chain(lambda y: y.sum())
    model.weight.grad = torch.full((4,), float("inf"))
    with record(model, backward=True, formats=()) as recording:
        model(torch.ones(2, 4)).backward()
    found = broken(recording)
    assert found.broke is not None
    assert (found.site, found.broke.kind) == ("backward/weight", "input")
    assert (found.broke.origin_kind, found.broke.origin_name, found.broke.origin_finite) == (
        "outside",
        "weight.grad",
        False,
    )


def test_a_sum_that_overflows_in_accumulation() -> None:
    model = Chain(lambda y: y.float().sum() * 40000).half()
    with record(model, backward=True, formats=()) as recording:
        for _ in range(2):
            model(torch.ones(1, 4).half()).backward()
    found = broken(recording)
    assert found.broke is not None
    assert (found.broke.kind, found.broke.value, found.broke.operands) == ("overflow", 80000.0, (40000.0, 40000.0))
    assert (found.broke.count, found.lost) == (4, 4)


def test_the_loss_scale_is_known_however_it_was_applied() -> None:
    def scale(run: Callable[[Tensor], Any], **how: Any) -> Any:
        model = llama()
        with record(model, backward=True, formats=(), **how) as recording:
            run(loss_of(model))
        return recording.header.case.get("loss_scale")

    assert scale(lambda loss: (loss * 2.0**12).backward()) == 2.0**12
    assert scale(lambda loss: torch.amp.GradScaler("cpu", init_scale=512.0).scale(loss).backward()) == 512.0
    assert scale(lambda loss: (loss / 4 * 8.0).backward()) == 8.0
    assert scale(lambda loss: loss.backward()) is None
    assert scale(lambda loss: (loss * 2.0).backward(), case={"loss_scale": 7.0}) == 7.0


def test_double_backward_is_left_alone() -> None:
    def penalty(recorded: Any) -> list[Tensor]:
        model = llama()
        with recorded(model):
            (grad,) = torch.autograd.grad(loss_of(model), model.get_parameter("lm_head.weight"), create_graph=True)
            grad.square().sum().backward()
        return [held.grad for held in model.parameters() if held.grad is not None]

    assert same(penalty(lambda model: nullcontext()), penalty(lambda model: record(model, backward=True, formats=())))


def test_gradients_are_not_recorded_unless_asked_for() -> None:
    model = llama()
    with record(model, formats=()) as recording:
        loss_of(model).backward()
    assert gradients(recording) == []
    assert not recording.header.backward


def test_a_recording_of_gradients_is_read_again_as_written(tmp_path: Any) -> None:
    model = llama()
    with record(model, backward=True) as recording:
        loss_of(model).backward()
    recording.save(tmp_path / "run.parquet")
    again = Recording.load(tmp_path / "run.parquet")
    assert again.header.backward
    assert again.records == recording.records


def test_two_recorders_at_once_see_each_their_own() -> None:
    first, second = Chain(lambda y: y.sum()), Chain(lambda y: y.sum(), 2.0)
    with record(first, backward=True, formats=()) as one, record(second, backward=True, formats=()) as other:
        (first(torch.ones(1, 4)) * second(torch.ones(1, 4))).backward()
    assert of(one, "weight").amax == 8.0
    assert of(other, "weight").amax == 4.0


def test_a_reentrant_checkpoint_that_breaks_is_told_once() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Chain(lambda y: y.sqrt())
            self.outer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, self.outer(x) * 0, use_reentrant=True)

    model = Inside()
    with record(model, backward=True, formats=()) as recording:
        model(torch.ones(2, 4)).sum().backward()
    found = [record for record in recording if record.broke is not None]
    assert [record.site for record in found] == ["backward/inner.weight"]


@pytest.fixture(params=["operators", "modules", "layers"])
def level(request: pytest.FixtureRequest) -> Level:
    found: Level = request.param
    return found
