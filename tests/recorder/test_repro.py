"""What broke first, written as one operator with few operands, breaks again where there is no stabilitykit."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from alone import run_alone, told
from safetensors.torch import load_file
from torch import Tensor, nn
from truth.others import t5_clamped

import stabilitykit as sk
from stabilitykit.checkpoints import open_checkpoint
from stabilitykit.errors import MisuseError
from stabilitykit.records import Recording
from stabilitykit.scaling.stressed import stressed

HALF = torch.float16


class Calls(nn.Module):
    """A model that is one function, called with the model's input and what it holds."""

    def __init__(self, function: Callable[..., Tensor], *held: Tensor) -> None:
        super().__init__()
        self.function = function
        for number, tensor in enumerate(held):
            self.register_buffer(f"held_{number}", tensor)

    def forward(self, *given: Tensor) -> Tensor:
        return self.function(*given, *self.buffers())


def recorded(model: nn.Module, *given: Any, **how: Any) -> Recording:
    with torch.inference_mode(), sk.record(model, keep_operands=True, **how) as recording:
        model(*given)
    return recording


def tiny_stressed(name: str, gamma: float = 2.0**14) -> Recording:
    small = "layers=2&hidden_size=32&feed_forward=64&heads=2&kv_heads=1&head_dim=16&vocabulary=512&context=64"
    model = stressed(open_checkpoint(f"random:{name}?{small}"), gamma, dtype="float16")
    return recorded(model, torch.tensor([[2, 7, 11, 13]]))


def clamped() -> Recording:
    planted = t5_clamped()
    with torch.inference_mode(), sk.record(planted.model, keep_operands=True) as recording:
        planted.run(planted.model)
    return recording


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(HALF)


def sanitised(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nan_to_num(F.linear(x, weight), nan=0.0, posinf=6e4, neginf=-6e4)


def written_in_place(x: Tensor) -> Tensor:
    return x.clone().mul_(100.0).add_(x * 400.0).mul_(300.0)


LONG = noise(3, 500)  # a row, of which every term but a few is small
ROWS = torch.zeros(3, 5, 8, dtype=HALF)
ROWS[1, 2, 6] = 9000.0
THERE_AND_BACK = torch.tensor([[1.0], [3e38]]) * torch.tensor([1.0, 1.0, -1.0, -1.0])
HEADS = noise(1, 2, 9, 16)


def of(function: Callable[..., Tensor], x: Tensor, *held: Tensor) -> Callable[[], Recording]:
    return lambda: recorded(Calls(function, *held), x)


def attended(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, torch.where(torch.arange(9)[:, None] == 4, math.inf, x))


def softmax_of_nothing(x: Tensor) -> Tensor:
    return torch.softmax(x.masked_fill(x == 0, -math.inf), -1)


CASES: dict[str, tuple[Callable[[], Recording], str]] = {
    "gemma": (lambda: tiny_stressed("gemma-2b"), "overflow"),
    "gemma2": (lambda: tiny_stressed("gemma2-2b"), "overflow"),
    "gemma3": (lambda: tiny_stressed("gemma3-270m", 2.0**16), "overflow"),
    "T5's clamp": (clamped, "overflow"),
    "sanitised": (of(sanitised, LONG * 100, noise(16, 500, seed=1) * 300), "overflow"),
    "product": (of(torch.matmul, LONG * 40, noise(500, 9, seed=1) * 100), "overflow"),
    "negative product": (of(lambda x, w: torch.matmul(-x, w), LONG * 40, noise(500, 9, seed=1) * 100), "overflow"),
    "one element": (of(lambda x: x * 8.0, ROWS), "overflow"),
    "in place": (of(written_in_place, ROWS / 100), "overflow"),
    "cast": (of(lambda x: (x.float() * 9).half(), ROWS), "overflow"),
    "sum": (of(lambda x: x.abs().cumsum(-1), LONG * 400), "overflow"),
    "partial sum": (of(lambda x: x.sum(-1), THERE_AND_BACK), "reduction"),
    "norm": (of(lambda x, w: F.layer_norm(x, (500,), w), LONG, noise(500).clamp(-1, 1) * 3e4), "overflow"),
    "convolution": (of(F.conv1d, LONG[None] * 300, noise(4, 3, 5) * 300), "overflow"),
    "logarithm": (of(torch.log, LONG.relu()), "division-by-zero"),
    "0 / 0": (of(lambda x: x / x, ROWS), "invalid"),
    "masked row": (of(softmax_of_nothing, ROWS), "masked-row"),
    "input": (of(lambda x: x + 1, torch.where(ROWS > 0, math.nan, ROWS)), "input"),
    "fused attention": (of(attended, HEADS), "constant"),
}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("alone")
    found = {}
    for number, (name, (make, kind)) in enumerate(CASES.items()):
        recording = make()
        first = recording.first_break()
        assert first is not None
        assert first.broke is not None
        assert first.broke.kind == kind, name
        found[name] = recording.export_repro(folder / str(number))
    return found


@pytest.fixture(scope="module")
def printed(scripts: dict[str, Path]) -> dict[str, list[str]]:
    return dict(zip(scripts, run_alone(list(scripts.values())), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_script_prints_alone_what_it_says(name: str, scripts: dict[str, Path], printed: dict[str, list[str]]) -> None:
    script = scripts[name]
    assert printed[name] == told(script)
    text = script.read_text()
    assert len(text.splitlines()) <= 60
    assert set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)) == {"pathlib", "torch", "safetensors"}
    assert {one.name for one in script.parent.iterdir()} == {"repro.py", "operands.safetensors"}


@pytest.mark.parametrize("name", CASES)
def test_operands_are_finite_and_the_result_is_not(name: str, printed: dict[str, list[str]]) -> None:
    """Which is what the kinds say, of an element that float64 holds where the format is to blame."""
    lines = {line.partition(":")[0]: line for line in printed[name]}
    lost = {what: int(re.search(r"(\d+) of \d+ not finite", line)[1]) for what, line in lines.items()}  # type: ignore[index]
    kind = CASES[name][1]
    results = [what for what in lines if what + " in float64" in lines]
    assert len(results) == 1
    (result,) = results
    operands = list(lines)[: list(lines).index(result)]
    assert lost[result] > 0
    assert any(lost[one] for one in operands) == (kind in ("input", "constant", "masked-row"))
    assert (lost[f"{result} in float64"] == 0) == (kind in ("overflow", "reduction"))
    if kind == "overflow":
        numbers = [
            abs(float(one)) for one in lines[f"{result} in float64"].rpartition(": ")[2].split(", ") if one != "..."
        ]
        assert max(numbers) > 65504 or "..." in lines[f"{result} in float64"]


def test_what_absorbed_it_is_run_too(printed: dict[str, list[str]]) -> None:
    for name, operator in (("T5's clamp", "clamp"), ("sanitised", "nan_to_num")):
        last = printed[name][-1]
        assert last.startswith(f"{operator}, which absorbs it: float16 ")
        assert "0 of 1 not finite" in last
        assert abs(float(last.rpartition(": ")[2])) >= 6e4
    assert not any("absorbs" in line for line in printed["product"])


def test_one_element_of_the_culprits_row_and_token_is_left(scripts: dict[str, Path]) -> None:
    """Planted at row 1, position 2, channel 6: everything else is 0, and breaks nothing."""
    for name, expected in (("one element", 9000.0), ("in place", None), ("cast", 81000.0)):
        (operand,) = load_file(scripts[name].parent / "operands.safetensors").values()
        assert operand.shape == (1, 1, 1)
        assert expected is None or math.isclose(float(operand), expected, rel_tol=1e-3)


@pytest.mark.parametrize("name", ["product", "negative product"])
def test_of_a_product_no_term_can_be_left_out(name: str, scripts: dict[str, Path]) -> None:
    """And what is left has the sign that the whole sum has."""
    broke = CASES[name][0]().at("/matmul.0").broke
    assert broke is not None
    assert broke.value is not None
    operands = load_file(scripts[name].parent / "operands.safetensors")
    left, right = operands["self"], operands["mat2"]
    assert left.shape[0] == right.shape[1] == 1
    terms = (left[0].double() * right[:, 0].double()).tolist()
    assert 1 < len(terms) < 50
    assert math.copysign(sum(terms), broke.value) == sum(terms)
    assert abs(sum(terms)) > 65519
    assert all(abs(sum(terms) - term) < 65521 for term in terms)


def test_a_partial_sum_keeps_what_brings_it_back(scripts: dict[str, Path]) -> None:
    """What is left of 3e38 + 3e38 - 3e38 - 3e38 has to be finite in the end, and on the way not."""
    (operand,) = load_file(scripts["partial sum"].parent / "operands.safetensors").values()
    assert abs(float(operand.double().sum())) < 3.4e38
    assert not bool(operand.sum(-1).isfinite().all())


@pytest.fixture
def broken() -> Recording:
    return recorded(Calls(lambda x: x * 8.0), ROWS)


def test_nothing_is_overwritten(broken: Recording, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(MisuseError, match="not empty"):
        broken.export_repro(tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["mine.txt"]
    broken.export_repro(tmp_path / "new")
    broken.export_repro(tmp_path / "again")  # as often as one likes
    assert (tmp_path / "new" / "repro.py").read_text() == (tmp_path / "again" / "repro.py").read_text()


def test_operands_are_copies_and_bits_stay_as_they_are(tmp_path: Path) -> None:
    x, model = ROWS.clone(), Calls(lambda x: (x * 8.0).add_(1.0))
    with torch.inference_mode():
        plain = model(x)
        with sk.record(model, keep_operands=True) as recording:
            seen = model(x)
    x.zero_()
    assert torch.equal(plain.view(torch.int16), seen.view(torch.int16))
    recording.export_repro(tmp_path / "new")
    assert float(load_file(tmp_path / "new" / "operands.safetensors")["self"]) == 9000.0


def test_a_file_has_no_operands(broken: Recording, tmp_path: Path) -> None:
    broken.save(tmp_path / "run.parquet")
    model = Calls(lambda x: x * 8.0)
    with torch.inference_mode(), sk.record(model) as without:
        model(ROWS)
    for recording in (Recording.load(tmp_path / "run.parquet"), without):
        with pytest.raises(MisuseError, match="keep_operands=True"):
            recording.export_repro(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@torch.library.custom_op("stabilitykit_tests::eightfold", mutates_args=())
def eightfold(x: Tensor) -> Tensor:
    return x * 8.0


def test_what_cannot_be_run_alone_is_said(tmp_path: Path) -> None:
    cases: dict[str, Callable[[], Recording]] = {
        "Nothing broke": lambda: recorded(Calls(lambda x: x * 2.0), ROWS),
        "stabilitykit_tests::eightfold, is not one of torch's own": lambda: recorded(Calls(eightfold), ROWS),
        "level 'modules' sees no operators": lambda: recorded(Calls(lambda x: x * 8.0), ROWS, level="modules"),
        "random numbers": lambda: recorded(Calls(lambda x: torch.normal(x, 6e4)), ROWS[0] + 6e4),
        "holds no complex128": lambda: recorded(
            Calls(lambda x: x * 1e200), torch.tensor([1e200 + 1j], dtype=torch.complex128)
        ),
        "The run computed matrix products as float16-accumulate:8": lambda: recorded(
            Calls(torch.matmul, torch.tensor([[300.0], [-300.0]]).repeat_interleave(150, 0).half()),
            torch.full((4, 300), 3.0).half(),
            matmul="float16-accumulate:8",
        ),
        r"take 80\.1 MiB, and of a recording 64 MiB": lambda: recorded(
            Calls(lambda x: x.prod(-1)), torch.full((1, 42_000_000), 2.0).half()
        ),
    }
    for words, make in cases.items():
        with pytest.raises(MisuseError, match=words):
            make().export_repro(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_of_a_large_operand_what_makes_the_element_is_kept(tmp_path: Path) -> None:
    weight = torch.zeros(80_000, 600, dtype=HALF)  # 96 MB
    weight[77_777] = 300.0
    recording = recorded(
        nn.Linear(600, 80_000, bias=False, dtype=HALF).requires_grad_(False), torch.ones(2, 600).half()
    )
    assert recording.first_break() is None
    head = nn.Linear(600, 1, bias=False, dtype=HALF)
    head.weight = nn.Parameter(weight, requires_grad=False)
    script = recorded(head, torch.ones(2, 600).half()).export_repro(tmp_path / "new")
    assert "of the 48,001,200 elements" in " ".join(script.read_text().split())
    assert (script.parent / "operands.safetensors").stat().st_size < 5_000


def test_a_gradient_is_said_not_to_be_kept(tmp_path: Path) -> None:
    model = nn.Linear(4, 4, dtype=HALF)
    with sk.record(model, backward=True, keep_operands=True) as recording:
        (model(torch.ones(1, 4).half()).float().sum() * 2.0**17).backward()
    with pytest.raises(MisuseError, match="is a gradient"):
        recording.export_repro(tmp_path / "new")


class Eightfold(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 8.0


def test_redacted_there_is_no_word_of_the_users(tmp_path: Path) -> None:
    """Not the module's name, the token's text, nor the checkpoint's path; without redaction each of them is there."""
    model: Any = nn.Sequential()
    model.add_module("embed_tokens", nn.Embedding(4, 8))
    model.add_module("of_ruth", Eightfold())
    model.source = "/home/anna/checkpoint"
    model.embed_tokens.weight = nn.Parameter(torch.arange(4.0)[:, None] * torch.full((8,), 3000.0), requires_grad=False)
    model.half()
    with torch.inference_mode(), sk.record(model, keep_operands=True, token_text=lambda _: "Zoe") as recording:
        model(torch.tensor([[1, 3]]))
    written = {}
    for redact in (False, True):
        script = recording.export_repro(tmp_path / str(redact), redact=redact)
        file = (script.parent / "operands.safetensors").read_bytes().decode(errors="replace")
        written[redact] = script.read_text() + file
        assert str(tmp_path) not in written[redact]
    for word in ("of_ruth", "Zoe", "anna"):
        assert word in written[False]
        assert word not in written[True]


def test_text_that_would_end_the_docstring_does_not(tmp_path: Path) -> None:
    model: Any = Calls(lambda x: x * 8.0)
    model.source = 'a"""\nraise SystemExit("b") \\x'
    (lines,) = run_alone([recorded(model, ROWS).export_repro(tmp_path / "new")])
    assert lines == told(tmp_path / "new" / "repro.py")
