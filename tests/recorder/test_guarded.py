"""Nothing that a recorder meets or fails at ends or changes the pass it looks at; what it could not see it says."""

import asyncio
import copy
import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from stabilitykit.errors import MisuseError
from stabilitykit.models.operators import WatchMode
from stabilitykit.recorder import Statistic, record
from stabilitykit.recorder.observe import Observer
from stabilitykit.recorder.session import Session
from stabilitykit.recorder.unseen import MOST, Unseen
from stabilitykit.records import Level, Recording

LEVELS: tuple[Level, ...] = get_args(Level)

X = torch.linspace(-1, 1, 2 * 7 * 8).reshape(2, 7, 8)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Level:
    return request.param


class Function(nn.Module):
    """A linear layer and a function of what it makes."""

    def __init__(self, function: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner: nn.Module = nn.Linear(8, 8)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.inner(x))


def bits(tensor: Tensor | None) -> bytes:
    assert tensor is not None
    return tensor.numpy().tobytes()


def unseen(recording: Recording) -> list[str]:
    return [note for note in recording.header.notes if "could not be seen" in note]


def unharmed(model: nn.Module, *args: Any, level: Level = "operators", **kwargs: Any) -> Recording:
    """The recording of a call of `model` which returned the same as without one, and left no hook."""
    given = [one.clone() if isinstance(one, Tensor) else one for one in args]
    expected = copy.deepcopy(model)(*given, **kwargs)
    with warnings.catch_warnings(), record(model, formats=(), level=level) as recording:
        output = model(*args, **kwargs)
    same = zip(tree_leaves(expected), tree_leaves(output), strict=True)
    for one, other in same:
        if isinstance(one, Tensor) and one.layout is torch.strided and not one.is_nested and not one.is_meta:
            assert torch.equal(one.nan_to_num(), other.nan_to_num())
        else:
            assert type(one) is type(other)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    hooks = torch.nn.modules.module
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks
    recording.records  # noqa: B018  they can be made
    return recording


# What modules are given and return


@dataclasses.dataclass
class Answer:
    hidden: Tensor
    note: str


@pytest.mark.parametrize(
    "function",
    [
        lambda x: Answer(x, "fine"),
        lambda x: {"hidden": x, "more": [None, (x * 2, "text")]},
        lambda x: None,
        lambda x: (),
        lambda x: x[:, :0].mean(1),  # of an expert that gets no token
        lambda x: x[:0].amax(dim=1),
        lambda x: x.to_sparse() * 2,
        lambda x: (x @ x.mT).to_sparse_csr(),
        lambda x: torch.nested.nested_tensor([x[0], x[1, :3]]) * 2,
        lambda x: torch.nested.nested_tensor([x[0], x[1, :3]], layout=torch.jagged) * 2,
        lambda x: torch.vmap(lambda row: row.softmax(-1) @ row.mT)(x),
        lambda x: torch.func.grad(lambda y: (y * y).sum())(x),
        lambda x: torch.func.jvp(torch.sin, (x,), (x,)),
        lambda x: torch.fft.fft(x).real + x.to(torch.complex64).imag,
        lambda x: x.to("meta") * 2,
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8).dequantize(),
        lambda x: x.to(torch.float8_e4m3fn).float() * 2,
        lambda x: x.double().to(torch.int64) // 2,
        lambda x: torch.tensor(float("nan")) * x,
        lambda x: torch.bucketize(x, torch.tensor([0.0, 0.5])),
    ],
)  # fmt: skip
def test_values_of_all_kinds_pass_through(function: Callable[[Tensor], Any], level: Level) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of prototypes
        unharmed(Function(function), X, level=level)


def test_a_generator_is_returned_as_it_is(level: Level) -> None:
    class Pieces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Iterator[Tensor]:
            for row in x:
                yield self.inner(row)

    model = Pieces()
    with torch.no_grad(), record(model, formats=(), level=level):
        pieces = list(model(X))
    assert torch.equal(torch.stack(pieces), model.inner(X))


@pytest.mark.parametrize("padded", [False, True])
def test_encoders_that_fuse_their_layers_still_do(padded: bool, level: Level) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 5:] = True
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recording = unharmed(model, X, src_key_padding_mask=padding if padded else None, level=level)
    operators = {record.operator for record in recording}
    if level == "operators" and not padded:
        assert "_transformer_encoder_layer_fwd" in operators
    if level == "operators":
        assert "scaled_dot_product_attention" not in operators


def test_layers_of_an_encoder_that_do_not_fuse_are_seen_inside() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    recording = unharmed(model.eval(), X)  # gradients rule the kernel out
    assert recording.at("layers.1.linear1").operator == "matmul"


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(4), lambda: nn.LazyBatchNorm1d()])
def test_lazy_modules_get_their_parameters(make: Callable[[], nn.Module], level: Level) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = nn.Sequential(make(), nn.ReLU())
        with torch.no_grad(), record(model, formats=(), level=level) as recording:
            torch.manual_seed(0)
            output = model(X)
    assert torch.equal(output, model(X)) or isinstance(model[0], nn.BatchNorm1d)
    assert recording.at("1").shape == output.shape


def test_scripted_modules_run_as_they_are(level: Level) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.GELU()))
    model = nn.Sequential(nn.Linear(8, 8), inner)
    expected = model(X)
    with record(model, formats=(), level=level) as recording:
        output = model(X)
    assert torch.equal(output, expected)
    assert recording.at("1").shape == output.shape
    if level == "operators":
        assert {"matmul", "gelu"} <= {record.operator for record in recording if record.module == "1"}


def test_a_model_that_is_scripted_itself() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.script(nn.Linear(8, 8))
    with record(model, formats=()) as recording:
        assert torch.equal(model(X), model(X))
    assert len(recording) == 2


def test_dynamically_quantised_modules(level: Level) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), {nn.Linear})
        with torch.no_grad():
            recording = unharmed(model, X, level=level)
    assert recording.at("1").shape == X.shape


def test_meta_models_and_sparse_parameters(level: Level) -> None:
    with torch.device("meta"):
        blank = Function(lambda x: x.softmax(-1))
    unharmed(blank, X.to("meta"), level=level)
    sparse = Function(lambda x: x)
    sparse.register_buffer("table", torch.eye(8).to_sparse())
    sparse.function = lambda x: (sparse.table @ x[0].mT).mT
    with torch.no_grad(), record(sparse, formats=(), level=level):
        assert torch.equal(sparse(X), sparse.inner(X)[0])


class Tagged(Tensor):
    """A subclass that sees every function first."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_function__(func, types, args, kwargs or {})
        return output.as_subclass(cls) if type(output) is Tensor else output


def test_subclasses_of_tensor(level: Level) -> None:
    with torch.no_grad():
        recording = unharmed(Function(lambda x: x.softmax(-1) * 2), X.as_subclass(Tagged), level=level)
    assert recording.header.starts == (0,)


# What modules do


def test_a_module_that_runs_inside_itself(level: Level) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            return self.inner(x) if depth == 0 else self(x, depth - 1) + 1

    recording = unharmed(Nested(), X, level=level)
    assert recording.header.starts == (0,)


def test_a_module_that_writes_into_what_it_is_given(level: Level) -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2).add_(1)

    with torch.no_grad():
        unharmed(nn.Sequential(Writes(), Writes(), nn.Linear(8, 8)), X.clone(), level=level)


def test_modules_that_come_and_go_while_it_runs(level: Level) -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.gone = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            torch.manual_seed(1)
            self.late = nn.Linear(8, 8)
            x = self.late(self.first(self.gone(x) if hasattr(self, "gone") else x))
            if hasattr(self, "gone"):
                del self.gone
            return x

    model = Changing()
    gone = model.gone
    unharmed(model, X, level=level)
    assert not gone._forward_hooks


def test_hooks_that_are_taken_off_while_it_runs(level: Level) -> None:
    class Clears(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self._forward_hooks.clear()
            return x * 2

    model = nn.Sequential(Clears(), nn.Linear(8, 8))
    recording = unharmed(model, X, level=level)
    assert recording.at("1").module == "1"


def test_users_hooks_that_raise_still_do(level: Level) -> None:
    def refuse(*args: Any) -> None:
        raise PermissionError("not today")

    for register in (nn.Module.register_forward_pre_hook, nn.Module.register_forward_hook):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        handle = register(model[0], refuse)
        with torch.no_grad(), record(model, formats=(), level=level) as recording:
            with pytest.raises(PermissionError, match="not today"):
                model(X)
            handle.remove()
            model(X)
        assert recording.records[-1].site == "1"
        assert not unseen(recording)


def test_an_operator_that_raises_runs_once_and_its_error_is_the_users() -> None:
    calls: list[int] = []

    def refuses(x: Tensor) -> Tensor:
        calls.append(1)
        raise ZeroDivisionError("as the model does")

    model = Function(torch.library.custom_op("stabilitykit_tests::refuses", mutates_args=())(typed(refuses)))
    with torch.no_grad(), pytest.raises(ZeroDivisionError, match="as the model does"), record(model, formats=()):
        model(X)
    assert calls == [1]


def typed(function: Callable[[Tensor], Tensor]) -> Any:
    """With annotations that are types: this module's are, as `torch.library` reads them."""
    function.__annotations__ = {"x": Tensor, "return": Tensor}
    return function


@pytest.mark.parametrize("factor", [1.0, 6e4])
def test_a_custom_operator_runs_once_at_a_break_too(factor: float) -> None:
    calls: list[int] = []

    def noisy(x: Tensor) -> Tensor:
        calls.append(1)
        return x * factor + torch.rand_like(x)

    model = Function(torch.library.custom_op("stabilitykit_tests::noisy", mutates_args=())(typed(noisy)))
    model.inner = nn.Identity()
    x = torch.full((1, 2, 4), 2.0).half()
    torch.manual_seed(0)
    model(x)
    next_number = float(torch.rand(1))
    calls.clear()
    torch.manual_seed(0)
    with record(model, formats=()) as recording:
        model(x)
    assert float(torch.rand(1)) == next_number
    assert calls == [1]
    assert (recording.first_break() is not None) == (factor > 1)


def test_operators_that_no_dispatcher_knows_run_as_they_are() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unharmed(Function(lambda x: torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y - 1, (x,))), X)
    with FakeTensorMode():
        model = nn.Linear(8, 8)
        with record(model, formats=()):
            assert model(torch.empty(2, 8)).shape == (2, 8)  # which asks for the device of a fake tensor


def test_copies_of_a_recorded_model_are_other_models(level: Level) -> None:
    model = Function(lambda x: x.exp())
    with torch.no_grad(), record(model, formats=(), level=level) as recording:
        other = copy.deepcopy(model)
        model(X)
        other(X)
    with torch.no_grad(), record(model, formats=(), level=level) as alone:
        model(X)
    assert [one.site for one in recording if one.module != "outside"] == [one.site for one in alone]
    assert torch.equal(other(X), model(X))  # their hooks outlive the block


# What a recorder fails at


def failing(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, error: Exception) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Observer, "observe"),
        (Session, "_begin_step"),
        (Session, "_module_output"),
        (Session, "_inputs"),
        (Observer, "settle"),
        (Observer, "begin"),
    ],
)
def test_a_recorder_that_fails_says_so(owner: type, name: str, level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, owner, name, LookupError("planted\nwith more lines"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing was recorded
        recording = unharmed(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), X, level=level)
    if (name, level) == ("_inputs", "operators"):
        assert not unseen(recording)
    else:
        assert any("(LookupError: planted)" in note for note in unseen(recording))
    assert len(unseen(recording)) <= MOST + 1


def test_before_an_operator_too(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, Session, "_before", LookupError("planted"))
    model = nn.Linear(8, 8)
    with record(model, formats=()) as recording, warnings.catch_warnings():
        model(X)
    assert "could not be seen: the result of matmul (LookupError: planted)" in unseen(recording)


def test_interrupts_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "_after", interrupt)
    model = nn.Linear(8, 8)
    with pytest.raises(KeyboardInterrupt), record(model, formats=()):
        model(X)
    assert not model._forward_hooks


def test_the_first_break_still_ends_a_block() -> None:
    model = nn.Sequential(Function(lambda x: x * 1e38 * 1e38), nn.Linear(8, 8))
    reached = False
    with record(model, formats=(), stop_at_break=True) as recording:
        model(X)
        reached = True
    assert not reached
    assert recording.first_break() is not None
    assert not unseen(recording)


def test_a_statistic_of_a_wrong_name_is_refused_before_the_pass() -> None:
    with pytest.raises(MisuseError, match="identifier"), record(nn.Linear(8, 8), statistics=[wrong()]):
        raise AssertionError("the block ran")


def wrong() -> Statistic:
    return Statistic("no name", "unit", lambda x: x.sum())


def test_notes_are_few() -> None:
    unseen = Unseen()
    for number in range(9):
        unseen.failed(f"thing {number}", ValueError("first line\nsecond line"))
    for place in ("a", "b", "c"):
        unseen.failed(f"mean in {place}", ValueError(), "mean")
    notes = unseen.notes()
    assert notes[0] == "could not be seen: thing 0 (ValueError: first line)"
    assert notes[-1] == "could not be seen: 5 more things of other kinds"
    assert len(notes) == MOST + 1


def test_a_mode_that_looks_on_runs_each_operator_once() -> None:
    seen: list[str] = []

    def before(kind: Any, args: Any, kwargs: Any) -> str:
        if kind.name == "mul":
            raise LookupError
        return kind.name

    def after(kind: Any, state: str, args: Any, kwargs: Any, output: Any) -> None:
        assert state == kind.name
        seen.append(state)
        if kind.name == "exp":
            raise KeyError

    def failed(kind: Any, error: Exception) -> None:
        seen.append(f"{kind.name} {type(error).__name__}")

    with WatchMode(before, after, failed):
        found = (torch.ones(2) * 2).exp().sin()
    assert torch.equal(found, (torch.ones(2) * 2).exp().sin())
    assert seen == ["ones", "mul LookupError", "exp", "exp KeyError", "sin"]


# Backward passes


def overflowing_gradients() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)).half()


def test_gradients_that_are_not_finite_are_one_break(level: Level) -> None:
    model = overflowing_gradients()
    model[2].weight.requires_grad_(False)
    with record(model, formats=(), level=level) as recording:
        loss = model(X.half()).float().square().sum()
        (loss * 1e9).backward()
        loss.item()
    found = [record for record in recording if record.broke is not None]
    assert [record.site for record in found] == ["backward/2.bias"]
    record_, broke = found[0], found[0].broke
    assert broke is not None
    assert (record_.module, record_.operator, broke.kind, broke.outside) == ("backward", None, "unresolved", "backward")
    lost = ~model[2].bias.grad.isfinite()
    assert (broke.count, record_.lost, record_.shape) == (int(lost.sum()), int(lost.sum()), (8,))
    assert broke.index == (int(lost.int().argmax()),)
    assert (broke.position, broke.row, broke.token, broke.value) == (None, None, None, None)
    assert broke.limit == 65504
    assert recording.first_break() is record_


def test_gradients_that_stay_lost_are_told_once_and_finite_ones_never() -> None:
    model = overflowing_gradients()
    with record(model, formats=()) as recording:
        for scale in (1.0, 1e9, 1e9):
            (model(X.half()).float().square().sum() * scale).backward()
    assert [record.site for record in recording if record.broke] == ["backward/2.bias"]


def test_operators_inside_a_backward_pass_are_not_recorded_and_those_around_it_are(level: Level) -> None:
    model = Function(lambda x: x.exp())
    with record(model, formats=(), level=level) as recording:
        model(X).sum().backward()
        model.inner.weight.detach() * 2.0
    with record(model, formats=(), level=level) as without:
        model(X).sum()
        model.inner.weight.detach() * 2.0
    assert [record.site for record in recording] == [record.site for record in without]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_modules_that_run_again_are_no_steps(reentrant: bool, level: Level) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    torch.manual_seed(0)
    model = Checkpointed()
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    expected = [bits(held.grad) for held in model.parameters()]
    model.zero_grad()
    with record(model, formats=(), level=level) as recording:
        model(x).sum().backward()
    assert [bits(held.grad) for held in model.parameters()] == expected
    assert recording.header.starts == (0,)
    assert len({record.site for record in recording}) == len(recording)


def test_autograd_is_as_it_was_afterwards() -> None:
    def engines() -> list[Any]:
        return [vars(holder)["_engine_run_backward"] for holder in (torch.autograd, torch.autograd.graph)]

    before = engines()
    outer, inner = nn.Linear(8, 8), nn.Linear(8, 8)
    with record(outer, formats=()):
        with record(inner, formats=()):
            assert engines() != before
            assert len(set(engines())) == 1
            inner(X)
        assert engines() != before
        outer(X)
    assert engines() == before


def test_a_users_mode_still_sees_a_backward_pass() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    def flops(block: Any) -> int:
        model = nn.Linear(8, 8)
        with FlopCounterMode(display=False) as counter, block(model):
            model(X).sum().backward()
        return counter.get_total_flops()

    assert flops(lambda model: record(model, formats=())) == flops(lambda model: torch.enable_grad()) > 0


# One recording at a time


def test_a_second_recording_of_a_model_is_refused_before_its_pass() -> None:
    model = Function()
    with torch.no_grad(), record(model, formats=()) as first:
        for part in (model, model.inner, nn.Sequential(model)):
            with pytest.raises(MisuseError, match="already recording"), record(part):
                raise AssertionError("the block ran")
        model(X)
    assert "matmul" in {record.operator for record in first}
    with torch.no_grad(), record(model, formats=()) as again:
        model(X)
    assert len(again) == len(first)


def test_a_second_recording_in_another_thread_is_refused() -> None:
    model = Function()
    with ThreadPoolExecutor(1) as pool, torch.no_grad(), record(model, formats=()) as recording:
        model(X)

        def second() -> None:
            with record(model, formats=()):
                model(X)

        with pytest.raises(MisuseError, match="already recording"):
            pool.submit(second).result()
        model(X)
    assert recording.header.starts == (0, 0)


def test_a_second_recording_in_another_task_is_refused() -> None:
    model = Function()

    async def run(begun: asyncio.Event, go_on: asyncio.Event) -> Recording:
        with record(model, formats=()) as recording:
            begun.set()
            await go_on.wait()
            model(X)
        return recording

    async def both() -> Recording:
        begun, go_on = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(run(begun, go_on))
        await begun.wait()
        with pytest.raises(MisuseError, match="already recording"):
            await run(asyncio.Event(), go_on)
        go_on.set()
        return await first

    assert asyncio.run(both()).header.starts == (0,)


def test_blocks_of_two_tasks_may_end_in_any_order() -> None:
    in_mode = torch.utils._python_dispatch.is_in_torch_dispatch_mode

    async def run(begun: asyncio.Event, go_on: asyncio.Event) -> list[str]:
        model = Function(lambda x: x.exp())
        with record(model, formats=()) as recording:
            begun.set()
            await go_on.wait()
            assert in_mode()
            model(X)
        return [record.site for record in recording if record.module != "outside"]

    async def both() -> list[list[str]]:
        events = [asyncio.Event() for _ in range(4)]
        first, second = (asyncio.create_task(run(*events[i : i + 2])) for i in (0, 2))
        await events[0].wait()
        await events[2].wait()
        events[1].set()
        found = [await first]
        events[3].set()
        return [*found, await second]

    one, other = asyncio.run(both())
    assert one == other
    assert len(one) > 1
    assert not in_mode()
    assert torch._C._len_torch_dispatch_stack() == 0


def test_passes_in_other_threads_are_not_mixed_in(level: Level) -> None:
    model = Function(lambda x: x.exp())
    with torch.no_grad(), record(model, formats=(), level=level) as alone:
        model(X)
    with torch.no_grad(), record(model, formats=(), level=level) as recording:
        others = [threading.Thread(target=model, args=(X,)) for _ in range(3)]
        for other in others:
            other.start()
        model(X)
        for other in others:
            other.join()
    assert [record.site for record in recording] == [record.site for record in alone]
    assert recording.header.starts == (0,)


def test_replicas_in_threads_are_left_alone() -> None:
    """As `nn.DataParallel` runs them: modules that share their hooks with the recorded one."""
    model = Function(lambda x: x.exp())
    replicas = [copy.copy(model) for _ in range(2)]
    with torch.no_grad(), record(model, formats=()) as recording, ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda replica: replica(X), replicas))
        model(X)
    assert torch.equal(found[0], found[1])
    assert recording.header.starts == (0,)


def test_recordings_of_two_models_in_two_threads_do_not_mix() -> None:
    barrier = threading.Barrier(2)

    def run(scale: float) -> Recording:
        model = Function(lambda x: x * scale)
        with torch.no_grad(), record(model, formats=()) as recording:
            for _ in range(5):
                barrier.wait()
                model(X)
        return recording

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(run, (2.0, 4.0))
    assert len(one) == len(other) == len(run_alone(barrier))
    assert one.at("/mul.0").amax != other.at("/mul.0").amax


def run_alone(barrier: threading.Barrier) -> Recording:
    model = Function(lambda x: x * 2.0)
    with torch.no_grad(), record(model, formats=()) as recording:
        for _ in range(5):
            model(X)
    return recording
