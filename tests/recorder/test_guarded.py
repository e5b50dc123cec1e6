"""Nothing that a recorder meets ends or changes the pass that it looks at."""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from watched import Function, X, unharmed, unseen

from stabilitykit.recorder import record
from stabilitykit.records import Level

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
