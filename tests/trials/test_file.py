"""`FILE.py:make`: whatever a file makes runs again in each dtype; what is wrong with a file is said in one sentence."""

import gc
import json
import random
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import Result

from stabilitykit.errors import MisuseError
from stabilitykit.records.trials import Diagnosis
from stabilitykit.trials.diagnose import of_reproduction
from stabilitykit.trials.file import FromFile, UserFunction

HEAD = "import torch, transformers\nfrom torch import nn\n"
LLAMA = """
def llama(dtype, large=7, size=40_000.0):
    config = transformers.LlamaConfig(hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
                                      vocab_size=32, pad_token_id=0, bos_token_id=None, eos_token_id=None)
    config._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM(config).requires_grad_(False).eval()
    down = model.model.layers[1].mlp.down_proj.weight
    model.model.embed_tokens.weight[large] = 0
    model.model.embed_tokens.weight[large, 3] = size
    for name in ("gate_proj", "up_proj"):
        getattr(model.model.layers[1].mlp, name).weight[0] = torch.eye(16)[3] * 10
    down[3, 0] = 20  # 40 * 40 * 20 = 32,000: with 40,000 more than float16 holds
    return model.to(dtype)
"""


def written(folder: Path, body: str, name: str = "case.py") -> str:
    (folder / name).write_text(HEAD + textwrap.dedent(body))
    return f"{folder / name}:make"


def diagnosed(folder: Path, body: str, **how: Any) -> Diagnosis:
    return of_reproduction(FromFile.load(written(folder, body)), **how)


def test_a_forward_pass_is_run_in_each_dtype_as_the_file_makes_it(tmp_path: Path) -> None:
    """A neighbour is imported, and the float32 weights are the file's own, not rounded ones cast back."""
    (tmp_path / "stabilitykit_test_neighbour.py").write_text("WEIGHT = 300.12345\n")
    body = """
    ASKED = []
    def make(dtype):
        from stabilitykit_test_neighbour import WEIGHT
        ASKED.append(dtype)
        model = nn.Linear(2, 2, bias=False).requires_grad_(False)
        model.weight[:] = torch.tensor([[WEIGHT, 0.0], [0.0, 1.0]])
        return model.to(dtype), {"input": torch.tensor([[300.0, 1.0], [1.0, 2.0]], dtype=dtype)}
    """
    before = list(sys.path)
    opened = FromFile.load(written(tmp_path, body))
    found = of_reproduction(opened)
    assert not found.finite
    assert found["bfloat16"].finite
    assert found["float32"].cured
    wide = opened.run(opened.model("float32"))
    assert float(wide[0, 0]) == float(torch.tensor(300.12345) * 300)
    asked = opened.make.function.__globals__["ASKED"]
    assert asked[0] == torch.float16
    assert {torch.float16, torch.bfloat16, torch.float32} == set(asked)
    assert sys.path == before
    assert "stabilitykit_test_neighbour" in sys.modules


def test_a_method_is_called_as_the_file_says(tmp_path: Path) -> None:
    body = """
    def make(dtype):
        model = llama(dtype)
        return model.generate, {"input_ids": torch.tensor([[1, 2, 7]]), "max_new_tokens": 3, "do_sample": False}
    """
    found = diagnosed(tmp_path, LLAMA + textwrap.dedent(body))
    assert not found.finite
    assert found.findings["first_break"]["site"] == "layers.1"
    assert found["float32"].cured
    assert found["bfloat16"].finite


def test_a_batch_of_images_is_run(tmp_path: Path) -> None:
    body = """
    def make(dtype):
        sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4)
        model = transformers.ViTModel(config, add_pooling_layer=False).requires_grad_(False).eval()
        model.embeddings.patch_embeddings.projection.weight[0] = 1500.0
        images = torch.rand(2, 3, 8, 8) / 10
        images[1, :, :4, :4] = 1.0  # 48 numbers of a patch
        return model.to(dtype), {"pixel_values": images.to(dtype)}
    """
    found = diagnosed(tmp_path, body)
    assert not found.finite
    assert found.findings["first_break"]["site"] == "embeddings.patch_embeddings.projection"
    assert found.findings["first_break"]["row"] == 1
    assert found["float32"].cured
    with pytest.raises(MisuseError, match="Only an input with tokens"):
        diagnosed(tmp_path, body, minimise=True)


def test_a_cache_among_the_arguments_is_fresh_in_each_run(tmp_path: Path) -> None:
    body = """
    def make(dtype):
        model = llama(dtype)
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
        return model, {"input_ids": torch.tensor([[4, 7]]), "past_key_values": cache, "use_cache": True}
    """
    opened = FromFile.load(written(tmp_path, LLAMA + textwrap.dedent(body)))
    wide = opened.model("float32")
    first, second = opened.run(wide), opened.run(wide)
    assert torch.equal(first.logits, second.logits)
    assert first.past_key_values.get_seq_length() == 5
    assert second.past_key_values.get_seq_length() == 5
    found = of_reproduction(opened)
    assert found.findings["first_break"]["position"] == 4
    assert found["float32"].cured


def test_a_float8_cache_that_holds_infinities_is_compared_with_one_that_does_not(tmp_path: Path) -> None:
    body = """
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(4, 4, bias=False).requires_grad_(False)
            self.project.weight[:] = torch.eye(4)
        def forward(self, hidden):
            cache = self.project(hidden).to(torch.float8_e5m2)  # up to 57,344
            return cache.to(hidden.dtype) / 4

    def make(dtype):
        hidden = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [64_000.0, 1.0, 1.0, 1.0]]], dtype=dtype)
        return Cached().to(dtype), {"hidden": hidden}
    """
    found = diagnosed(tmp_path, body)
    assert not found.finite
    assert not found["bfloat16"].cured
    assert any("narrower formats" in note for note in found.notes)
    assert found.plain is not None
    assert (found.plain.rows, found.plain.compared) == (2, 1)


def test_a_model_that_raises_in_float32_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    body = """
    class Picky(nn.Linear):
        def forward(self, input):
            if self.weight.dtype == torch.float32:
                raise RuntimeError("no kernel for float32")
            return super().forward(input)

    def make(dtype):
        model = Picky(2, 2, bias=False).requires_grad_(False)
        model.weight.fill_(300.0)
        return model.to(dtype), {"input": torch.full((1, 2), 300.0, dtype=dtype)}
    """
    found = diagnosed(tmp_path, body)
    assert not found.finite
    assert not found["float32"].cured
    assert "no kernel for float32" in found["float32"].then
    assert found.cures == ()
    assert any("no kernel for float32" in note for note in found.notes)


def test_what_is_made_is_the_same_each_time_and_the_callers_random_numbers_go_on(tmp_path: Path) -> None:
    body = """
    import random, numpy
    def make(dtype):
        model = nn.Linear(3, 3)
        noise = torch.randn(1, 3) + random.random() + float(numpy.random.rand())
        return model.to(dtype), {"input": noise.to(dtype)}
    """
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    expected = torch.rand(2), random.random(), np.random.rand()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    opened = FromFile.load(written(tmp_path, body))
    first, second = (opened.run(opened.model("float32")) for _ in range(2))
    assert torch.equal(first, second)
    drawn = torch.rand(2), random.random(), np.random.rand()
    assert torch.equal(expected[0], drawn[0])
    assert expected[1:] == drawn[1:]
    assert opened.notes == ()


SAMPLED = (
    LLAMA
    + """
def make(dtype):
    model = llama(dtype)
    return model.generate, {"input_ids": torch.tensor([[1, 2, 7]]), "max_new_tokens": 4, "do_sample": True}
"""
)


def test_a_run_that_samples_is_the_same_each_time(tmp_path: Path) -> None:
    opened = FromFile.load(written(tmp_path, SAMPLED), "float32")
    torch.manual_seed(1)
    first = opened.run(opened.model("float32"))
    torch.manual_seed(2)
    second = opened.run(opened.model("float32"))
    assert torch.equal(first, second)


def test_a_file_that_ignores_the_dtype_is_told_so(tmp_path: Path) -> None:
    body = """
    def make(dtype):
        return nn.Linear(2, 2), {"input": torch.ones(1, 2)}
    """
    found = diagnosed(tmp_path, body)
    assert found.finite
    assert (
        found.notes[0]
        == "what make(torch.float16) returned is a model in float32: it does not follow the dtype it is given"
    )
    assert found.advice.startswith("What was to run in float16 ran in float32, so nothing is known of float16.")
    assert "tokens" not in found.advice  # its outputs are none


def test_a_file_whose_weights_are_others_each_time_is_told_so(tmp_path: Path) -> None:
    body = """
    import numpy
    def make(dtype):
        model = nn.Linear(8, 8).requires_grad_(False)
        model.weight[:] = torch.from_numpy(numpy.random.default_rng().normal(size=(8, 8)))
        return model.to(dtype), {"input": torch.ones(1, 8, dtype=dtype)}
    """
    found = diagnosed(tmp_path, body)
    said = "make(torch.float32) made other weights than make(torch.float16), weight among them"
    assert any(note.startswith(said) for note in found.notes)


def test_no_model_is_held_when_all_is_done(tmp_path: Path) -> None:
    body = """
    import weakref
    ALIVE = weakref.WeakSet()
    def make(dtype):
        model = nn.Linear(2, 2, bias=False).requires_grad_(False)
        model.weight.fill_(300.0)
        ALIVE.add(model)
        return model.to(dtype), {"input": torch.full((1, 2), 300.0, dtype=dtype)}
    """
    opened = FromFile.load(written(tmp_path, body))
    of_reproduction(opened)
    gc.collect()
    assert len(opened.make.function.__globals__["ALIVE"]) == 0


def test_its_tokens_can_be_left_out(tmp_path: Path) -> None:
    body = """
    def make(dtype):
        ids = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]])
        mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
        return llama(dtype), {"input_ids": ids, "attention_mask": mask}
    """
    found = diagnosed(tmp_path, LLAMA + textwrap.dedent(body), minimise=True)
    assert found.smallest is not None
    assert found.smallest.tokens == ((7,),)
    assert (found.smallest.before, found.smallest.minimal) == (10, True)


CALLED = r"when make\(torch\.float16\) is called: "
RETURNS = r"make\(dtype\) of .* must return \(model, kwargs\): .*; "

WRONG: dict[str, tuple[str, str]] = {
    "syntax": ("def make(dtype)\n    return 1", r"case\.py, line 3: SyntaxError: expected ':'\.$"),
    "import": ("import not_there_x", r"case\.py, line 3, when it is run: ModuleNotFoundError: No module named"),
    "exit": ("raise SystemExit(3)", r"case\.py, line 3, when it is run: SystemExit: 3\.$"),
    "raises": (
        "def make(dtype):\n    a = 3\n    return a.b, {}",
        "line 5, " + CALLED + "AttributeError: 'int'",
    ),
    "in torch": (
        "def make(dtype):\n    return torch.ones(2) @ torch.ones(3), {}",
        "line 4, " + CALLED + "RuntimeError: ",
    ),
    "no argument": ("def make():\n    return 1", r"case\.py, " + CALLED + r"TypeError: make\(\) takes 0"),
    "another name": (
        "def build(dtype):\n    return 1",
        r"must define make\(dtype\); it does not\. It defines build\.$",
    ),
    "no function": ("make = 3", r"must define make\(dtype\); its make is int\. It defines no function\.$"),
    "one value": ("def make(dtype):\n    return nn.Linear(2, 2)", RETURNS + r"it returned Linear\."),
    "three": ("def make(dtype):\n    return 1, 2, 3", RETURNS + r"it returned 3 values\."),
    "a step": (
        "def make(dtype):\n    return 1, 2, 3, 4",
        RETURNS + r"it returned 4 values\. For a training step add --backward\.",
    ),
    "lazy": ("def make(dtype):\n    return nn.LazyLinear(2), {}", r"weight of LazyLinear has no numbers yet"),
    "no model": ("def make(dtype):\n    return len, {}", RETURNS + "its first value is builtin_function_or_method"),
    "no dict": ("def make(dtype):\n    return nn.Linear(2, 2), torch.ones(2)", RETURNS + "its second value is Tensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_file_is_said_in_one_line(name: str, tmp_path: Path) -> None:
    body, said = WRONG[name]
    with pytest.raises(MisuseError) as raised:
        FromFile.load(written(tmp_path, body))
    assert re.search(said, str(raised.value)), raised.value
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__ is None
    assert raised.value.__context__ is None or raised.value.__suppress_context__


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("nowhere.py:make", "names a Python file to run, and 'nowhere.py' is none"),
        ("case.py", "named FILE.py:make; got 'case.py'"),
        ("case.py:", "named FILE.py:make; got 'case.py:'"),
        ("case.py:make it", "named FILE.py:make"),
    ],
)
def test_what_is_no_function_of_a_file_is_said_to_be_none(what: str, said: str) -> None:
    with pytest.raises(MisuseError, match=re.escape(said)):
        UserFunction.load(what)


def test_an_unknown_dtype_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match="float17"):
        FromFile.load(written(tmp_path, "raise ValueError"), "float17")


def test_the_command_line_says_what_a_file_comes_to(tmp_path: Path, stabilitykit: Callable[..., Result]) -> None:
    body = """
    def make(dtype):
        return llama(dtype), {"input_ids": torch.tensor([[1, 2, 7, 4]])}
    """
    what = written(tmp_path, LLAMA + textwrap.dedent(body))
    shown = stabilitykit("diagnose", what, "--minimise", "--json")
    assert shown.code == 0
    found = json.loads(shown.out)
    assert found["smallest"]["tokens"] == [[7]]
    assert found["command"].startswith("stabilitykit diagnose")
    assert what in found["command"]
    wrong = stabilitykit("diagnose", written(tmp_path, "def make(dtype):\n    return 1 / 0", "wrong.py"))
    assert wrong.code == 2
    assert "line 4" in wrong.err
    assert "ZeroDivisionError: division by zero" in wrong.err
    assert "Traceback" not in wrong.err
