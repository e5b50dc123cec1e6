"""Where damage comes from, whoever wrote it; what masks are; what rounding made; where damage ends."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from stabilitykit.recorder import record
from stabilitykit.records import Break, Record, Recording

NAN, INF = math.nan, math.inf
Operation = Callable[[Tensor], Tensor]


class Plain(nn.Module):
    """Applies an operation to its input times a weight of ones."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x * self.weight)


def run(module: nn.Module, *inputs: Tensor, level: str = "operators") -> Recording:
    with torch.no_grad(), record(module, level=level) as recording:  # type: ignore[arg-type]
        module(*inputs)
    return recording


def run_plain(operation: Operation, x: Tensor) -> Recording:
    return run(Plain(operation).to(x.dtype), x)


def broken(recording: Recording) -> tuple[Record, Break]:
    first = recording.first_break()
    assert first is not None
    assert first.broke is not None
    return first, first.broke


EIGHT = torch.tensor([[[1.0, 2, 3, 4], [5, 6, 7, 8]]]).half()


def assigned(value: Callable[[], float | Tensor]) -> Operation:
    def operation(x: Tensor) -> Tensor:
        x[0, 1] = value()
        return x + 1

    return operation


@pytest.mark.parametrize(
    ("operation", "operator", "name"),
    [
        (lambda x: x.masked_fill(x > 7, NAN) + 1, "masked_fill", "nan"),
        (lambda x: x.masked_fill(x > 7, INF) + 1, "masked_fill", "inf"),
        (lambda x: torch.where(x > 7, NAN, x) + 1, "where", "nan"),
        (lambda x: torch.where(x > 7, torch.tensor(INF, dtype=x.dtype), x) + 1, "where", "inf"),
        (lambda x: x.clamp(max=NAN) + 1, "clamp", "nan"),
        (lambda x: x.clamp_(max=NAN) + 1, "clamp", "nan"),
        (assigned(lambda: NAN), "fill", "nan"),
        (assigned(lambda: torch.full((4,), NAN).half()), "add", "full"),
        (lambda x: functional.pad(x, (0, 1), value=NAN) * 2, "mul", "nan"),
        (lambda x: torch.cat([x, torch.full((1, 1, 4), INF).half()], 1) - 1, "sub", "full"),
        (lambda x: torch.stack([x, torch.full((1, 2, 4), NAN).half()]).sum(0), "sum", "full"),
        (lambda x: x @ torch.full((4, 3), NAN).half(), "matmul", "full"),
        (lambda x: x + INF, "add", "inf"),
        (lambda x: x.index_fill(1, torch.tensor([1]), NAN) + 1, "index_fill", "nan"),
    ],
)
def test_what_the_code_puts_in_is_a_constant(operation: Operation, operator: str, name: str) -> None:
    first, broke = broken(run_plain(operation, EIGHT))
    assert (first.operator, broke.kind) == (operator, "constant")
    assert (broke.origin_kind, broke.origin_name, broke.origin_finite) == ("constant", name, False)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.masked_fill(x > 7, -INF).softmax(-1),
        lambda x: x.masked_fill(x > 7, -INF).amax(-1),
        lambda x: torch.where(x > 7, -INF, x).logsumexp(-1),
        lambda x: functional.max_pool1d(functional.pad(x, (1, 1), value=-INF), 3, 1),
        lambda x: x.clamp(min=-INF, max=INF),
        lambda x: torch.log(torch.arange(4).half()).nan_to_num() + x,
        lambda x: (1 / torch.arange(4).half()).clamp(max=1.0) + x,
    ],
)
def test_infinities_that_are_meant_are_no_break(operation: Operation) -> None:
    assert run_plain(operation, EIGHT).first_break() is None


class Tables(nn.Module):
    """A weight, a buffer and an attribute; what is asked for is multiplied by the input."""

    def __init__(self, used: str) -> None:
        super().__init__()
        self.used = used
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("table", torch.ones(4))
        self.attribute = torch.ones(4)

    def forward(self, x: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        if self.used == "cache":
            assert cache is not None
            return torch.cat([cache[0], x], 1).sum(1)
        if self.used == "input":
            return x * 2
        return x * torch.as_tensor(getattr(self, self.used))


@pytest.mark.parametrize(
    ("used", "kind", "origin", "name"),
    [
        ("weight", "weight", "weight", "weight"),
        ("table", "weight", "buffer", "table"),
        ("attribute", "input", "outside", "a tensor"),
        ("cache", "input", "cache", "cache"),
        ("input", "input", "input", "x"),
    ],
)
def test_what_was_not_finite_to_begin_with_is_named(used: str, kind: str, origin: str, name: str) -> None:
    module, x, cache = Tables(used), torch.ones(1, 2, 4), [torch.ones(1, 3, 4)]
    damaged = {"cache": cache[0], "input": x}.get(used)
    (torch.as_tensor(getattr(module, used)).data if damaged is None else damaged)[..., 1] = NAN
    with torch.no_grad(), record(module) as recording:
        module(x, cache=cache)
    _, broke = broken(recording)
    assert (broke.kind, broke.origin_kind, broke.origin_name, broke.origin_finite) == (kind, origin, name, False)


@torch.library.custom_op("stabilitykit_tests::grow_", mutates_args=("x",))
def grow_(x: Tensor) -> None:
    x.mul_(60000)


def foreach(x: Tensor) -> Tensor:
    many = [x * 1, x * 0.5]
    torch._foreach_mul_(many, [60000.0, 1.0])
    return many[0] - many[1]


def grown(x: Tensor) -> Tensor:
    y = x * 1
    grow_(y)
    return y - 1


TWICE = torch.zeros(2, dtype=torch.long)
ROWS = TWICE[:, None].expand(2, 4)


@pytest.mark.parametrize(
    ("operation", "operator", "kind", "value"),
    [
        (lambda x: (x[0] * 1).index_put_((TWICE,), x[0], accumulate=True) - 1, "index_put", "overflow", 180000.0),
        (lambda x: (x[0] * 1).scatter_reduce(0, ROWS, x[0], "sum") - 1, "scatter_reduce", "overflow", 180000.0),
        (lambda x: (x[0] * 1).index_add(0, TWICE, x[0]) - 1, "index_add", "overflow", 180000.0),
        (lambda x: (x[0] * 1).scatter_add(0, ROWS, x[0]) - 1, "scatter_add", "overflow", 180000.0),
        (foreach, "mul", "overflow", 3.6e9),
        (grown, "grow", "unresolved", None),
        (lambda x: 120000 - x * 1 - 120000, "sub", "overflow", 180000.0),
        (lambda x: torch.add(x * -1, x * -1, alpha=3), "add", "overflow", 240000.0),
    ],
)
def test_what_combines_values_in_place_or_in_lists_breaks_itself(
    operation: Operation, operator: str, kind: str, value: float | None
) -> None:
    x = torch.full((1, 2, 4), -60000.0 if operator in ("sub", "add") else 60000.0).half()
    first, broke = broken(run_plain(operation, x))
    assert (first.operator, broke.kind) == (operator, kind)
    assert broke.value == value


# Masks


class Added(nn.Module):
    """Adds a buffer to what it is given, and hands it to an operation."""

    def __init__(self, table: Tensor, then: Operation) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.table: Tensor
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(x * 1 + self.table)


LOW = torch.tensor([0, 0, 0, -40000.0]).half().expand(2, 4).contiguous()


@pytest.mark.parametrize(
    "then", [lambda x: x, lambda x: x * 1 - 1, lambda x: x.mean(-1), lambda x: x @ torch.ones(4, 2).half()]
)
def test_large_negative_numbers_that_mask_nothing_count_like_all_others(then: Operation) -> None:
    x = torch.full((1, 2, 4), -40000.0).half()
    first, broke = broken(run(Added(LOW, then), x))
    assert (first.site, broke.kind, broke.value, broke.count) == ("/add.0", "overflow", -80000.0, 2)
    assert (first.masked, first.negative_inf, first.amax) == (0, 2, 40000.0)


@pytest.mark.parametrize(
    "then",
    [lambda x: x.softmax(-1), lambda x: x.log_softmax(-1).exp(), lambda x: x.amax(-1), lambda x: x.topk(2).values],
)
def test_what_goes_to_a_softmax_or_a_maximum_was_masked(then: Operation) -> None:
    x = torch.full((1, 2, 4), -40000.0).half()
    recording = run(Added(LOW, then), x)
    assert recording.first_break() is None
    assert recording.at("/add.0").masked == 2


def test_a_mask_whose_sum_overflows_hides_a_row_in_this_dtype_alone() -> None:
    lowest = torch.full((2, 4), torch.finfo(torch.float16).min).half()
    first, broke = broken(run(Added(lowest, lambda x: x.softmax(-1)), torch.full((1, 2, 4), -50.0).half()))
    assert (first.operator, broke.kind) == ("softmax", "masked-row")
    assert (broke.rounded_site, broke.rounded_from) == ("/add.0", -65554.0)
    unmasked = run(Added(torch.full((2, 4), -INF).half(), lambda x: x.softmax(-1)), torch.zeros(1, 2, 4).half())
    assert broken(unmasked)[1].rounded_site is None  # -inf on purpose: in any dtype


# Rounding


def normalised(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-8)


@pytest.mark.parametrize(
    ("operation", "x", "kind", "site", "value"),
    [
        (normalised, torch.ones(1, 2, 4), "invalid", "/add.0", 1e-8),
        (
            lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-8),
            torch.full((1, 2, 4), 1e-4),
            "division-by-zero",
            "/pow.0",
            1.0004e-8,
        ),
        (
            lambda x: torch.log(torch.softmax(x, -1)),
            torch.tensor([[[0.0, 20, 0, 0]]]),
            "division-by-zero",
            "/softmax.0",
            math.exp(-20) / (1 + 3 * math.exp(-20)),
        ),
    ],
)
def test_a_zero_that_only_rounding_made_is_traced(
    operation: Operation, x: Tensor, kind: str, site: str, value: float
) -> None:
    _, broke = broken(run_plain(operation, x.half()))
    assert (broke.kind, broke.rounded_site) == (kind, site)
    assert broke.rounded_from == pytest.approx(value, rel=1e-3)
    assert run_plain(operation, x).first_break() is None  # float32 is finite, as the tracing says


@pytest.mark.parametrize("operation", [lambda x: (x - x) / (x - x), lambda x: torch.log(x - x), lambda x: x / (x * 0)])
def test_a_zero_in_every_format_is_not_traced(operation: Operation) -> None:
    for dtype in (torch.float16, torch.float32):
        _, broke = broken(run_plain(operation, torch.ones(1, 2, 4, dtype=dtype)))
        assert broke.rounded_site is None
        assert broke.kind in ("invalid", "division-by-zero")


# Where damage ends


@pytest.mark.parametrize(
    ("operation", "absorber"),
    [
        (lambda x: torch.tanh(x * 1000), "/tanh.0"),
        (lambda x: x / (x * 1000), "/div.0"),
        (lambda x: (x * 1000).clamp(max=60000), "/clamp.0"),
        (lambda x: (x * 1000).nan_to_num(posinf=1.0), "/nan_to_num.0"),
        (lambda x: torch.where(x > 1, (x * 1000), x).nan_to_num_(), "/nan_to_num.0"),
    ],
)
def test_an_operator_that_makes_damage_finite_is_marked(operation: Operation, absorber: str) -> None:
    recording = run_plain(operation, torch.full((1, 2, 4), 100.0).half())
    broken(recording)
    assert [record.site for record in recording if record.absorbs] == [absorber]
    assert recording.header.lost_steps == ()


def test_damage_that_is_left_behind_was_not_absorbed() -> None:
    def operation(x: Tensor) -> Tensor:
        y = x * torch.tensor([[[1000.0], [1.0]]]).half()
        return y[:, 1] * 2

    recording = run_plain(operation, torch.full((1, 2, 4), 100.0).half())
    broken(recording)
    assert not any(record.absorbs for record in recording)
    assert recording.header.lost_steps == ()


def test_damage_that_comes_out_has_its_step() -> None:
    assert run_plain(lambda x: x * 1000, torch.full((1, 2, 4), 100.0).half()).header.lost_steps == (0,)


def test_a_scale_that_follows_is_applied_to_the_value() -> None:
    def scores(x: Tensor) -> Tensor:
        return ((x @ x.mT) * 0.125).softmax(-1)

    _, broke = broken(run_plain(scores, torch.full((1, 2, 4), 200.0).half()))
    assert (broke.value, broke.scaled) == (160000.0, 20000.0)


def test_a_float_position_out_of_range_breaks_where_it_was_cast() -> None:
    class Rotary(nn.Module):
        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            return x * (positions[..., None].half() * 0.5).cos()

    first, broke = broken(run(Rotary(), torch.ones(1, 2, 4).half(), torch.tensor([[7, 70000]])))
    assert (first.site, first.operator, broke.kind) == ("/constant_cast.0", "cast", "overflow")
    assert (broke.value, broke.operands) == (70000.0, (70000.0,))


# Outside the model


def test_code_outside_the_model_is_named_with_its_line() -> None:
    module = nn.Linear(4, 4).half()
    with torch.no_grad(), record(module) as recording:
        y = module(torch.ones(1, 2, 4).half()) * 0 + 300
        y * y
    first, broke = broken(recording)
    assert (first.site, broke.kind) == ("outside/mul.1", "overflow")
    assert broke.outside is not None
    assert broke.outside.startswith("test_damage.py:")
    assert "y * y" in broke.outside


@pytest.mark.parametrize("level", ["modules", "layers"])
def test_without_operators_nothing_is_claimed_that_was_not_seen(level: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).exp() * 1e30)

    module = Two().half()
    nn.init.constant_(module.first.bias, 20.0)
    _, broke = broken(run(module, torch.ones(1, 2, 4).half(), level=level))
    assert (broke.kind, broke.origin_kind) == ("unresolved", None)
    module.second.weight.data[1, 1] = NAN
    nn.init.constant_(module.first.bias, -20.0)
    _, broke = broken(run(module, torch.ones(1, 2, 4).half(), level=level))
    assert (broke.kind, broke.origin_name, broke.origin_finite) == ("weight", "second.weight", False)
    _, broke = broken(run(Two(), torch.full((1, 2, 4), NAN), level=level))
    assert (broke.kind, broke.origin_kind, broke.origin_name) == ("input", "input", "x")
