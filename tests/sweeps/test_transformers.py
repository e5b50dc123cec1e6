"""A sweep of models that transformers runs: decoders and encoders, single lengths and ranges of them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from folders import save
from scaled.runs import VOCABULARY

from stabilitykit.errors import MisuseError
from stabilitykit.models.transformers import open_tokenizer
from stabilitykit.records.sweep import Case, Results
from stabilitykit.sweeps.file import read_experiment
from stabilitykit.sweeps.model import open_swept
from stabilitykit.sweeps.plan import make_plan
from stabilitykit.sweeps.worker import Runner

_SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64,
}  # fmt: skip
GRID = """checkpoint = "hf:{folder}"
[[grid]]
prompt = "text: Hello, world"
length = ["1..6", 6]
dtype = ["float32", "float16"]
"""


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES, bos_token_id=2, eos_token_id=1))
    return save(made, tmp_path / "llama")


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return save(transformers.BertModel(transformers.BertConfig(**_SIZES)), tmp_path / "bert")


def swept(folder: Path, text: str) -> Results:
    """A finished sweep, all of it run in this process."""
    path = folder / "experiment.toml"
    path.write_text(text)
    read = read_experiment(path)
    results = Results.create(folder / "out", make_plan(read, open_swept(read.checkpoint), command="stabilitykit sweep"))
    runner = Runner(results, folder, open_swept(results.plan.checkpoint))
    for case in results.missing():
        runner.run(case, lambda what, done, total: None)
    return results


def recording_of(results: Results, dtype: str) -> Any:
    return next(recording for case, recording in results.runs() if case.settings["dtype"] == dtype)


def map_of(results: Results, dtype: str) -> Any:
    return next(found for case, found in results.length_maps() if case.settings["dtype"] == dtype)


def test_a_decoder_is_swept_and_compared_with_its_float32_run(llama: Path, tmp_path: Path) -> None:
    results = swept(tmp_path, GRID.format(folder=llama))
    assert results.plan.checkpoint == f"hf:{llama}"
    assert results.plan.notes[0].startswith("run by transformers")
    ids = torch.tensor([open_tokenizer(str(llama)).encode("Hello,")])
    models = [transformers.LlamaForCausalLM.from_pretrained(llama, dtype=dtype) for dtype in ("float16", "float32")]
    with torch.inference_mode():
        low, wide = (model(ids).logits[0].double() for model in models)
    expected = (wide.softmax(-1) * (wide.log_softmax(-1) - low.log_softmax(-1))).sum(-1)
    error = recording_of(results, "float16").header.logits_error
    assert error.compared == 6
    assert error.kl_mean == pytest.approx(float(expected.mean()), rel=0.2)  # products are summed in float32 here
    assert any(one.deviation is not None for one in recording_of(results, "float16"))
    assert len(map_of(results, "float16").spans) == 1  # one pass decides them all


def test_of_an_encoder_every_length_runs_by_itself(bert: Path, tmp_path: Path) -> None:
    """The last token changes what all others make, so that no length can be read off another's run."""
    results = swept(tmp_path, GRID.format(folder=bert))
    found = map_of(results, "float32")
    assert [(span.first, span.last, span.run, span.direct) for span in found.spans] == [
        (n, n, n, True) for n in range(1, 7)
    ]
    ids = torch.tensor([open_tokenizer(str(bert)).encode("Hello,")])
    model = transformers.BertModel.from_pretrained(bert)
    made: list[torch.Tensor] = []  # the largest magnitude at each position, of each length
    model.encoder.layer[1].intermediate.dense.register_forward_hook(
        lambda module, args, output: made.append(output[0].abs().amax(-1))
    )
    with torch.inference_mode():
        for length in range(1, 7):
            model(ids[:, :length])
    read = [found.amax("encoder.layer.1.intermediate.dense", length) for length in range(1, 7)]
    assert read == pytest.approx([float(one.max()) for one in made], rel=1e-5)
    assert read != pytest.approx(made[-1].cummax(0).values.tolist(), rel=1e-3)  # what one causal pass would say
    run = recording_of(results, "float16")
    assert run.header.logits_error is None  # it has no logits
    deviations = [one.deviation for one in run if one.deviation is not None]
    assert deviations
    assert all(math.isfinite(one.sqnr) for one in deviations if one.sqnr is not None)


def test_a_model_under_stress_overflows_at_the_site_that_a_profile_names(llama: Path, tmp_path: Path) -> None:
    text = GRID.format(folder=llama).replace('"1..6", 6', "6") + "rescale = 1048576.0\n"
    results = swept(tmp_path, text)
    assert recording_of(results, "float16").first_break() is not None
    assert recording_of(results, "float32").first_break() is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('rounding = "gemma_pytorch"', r"line 6: rounding applies to the kit's own model only"),
        ("[[memory]]\nlength = 4", r"line 6: \[\[memory\]\] is of the kit's own model, Gemma 1 to 3, and transformers"),
        ("[[shortage]]\nlength = 4", r"line 6: \[\[shortage\]\] is of the kit's own model"),
    ],
)
def test_what_only_the_kits_own_model_has_is_refused_with_its_line(
    llama: Path, tmp_path: Path, more: str, said: str
) -> None:
    with pytest.raises(MisuseError, match=said):
        swept(tmp_path, GRID.format(folder=llama) + more + "\n")


def test_a_chat_and_a_line_of_a_batch_are_prompts(llama: Path, tmp_path: Path) -> None:
    template = "{% for one in messages %}{{ one['role'] }}: {{ one['content'] }};{% endfor %}"
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(llama)
    (tmp_path / "chat.json").write_text('[{"role": "user", "content": "Hi"}]')
    (tmp_path / "batch.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two!"}\n')
    text = f"""checkpoint = "hf:{llama}"
[[grid]]
prompt = ["@chat.json", "@batch.jsonl:2"]
"""
    results = swept(tmp_path, text)
    read = {case.settings["prompt"]: (recording.header.tokens or ())[0] for case, recording in results.runs()}
    encode = open_tokenizer(str(llama)).encode
    assert read == {"@chat.json": tuple(encode("user: Hi;")), "@batch.jsonl:2": tuple(encode("two!"))}
    (tmp_path / "x.npz").touch()
    for name, said in (
        ("@batch.jsonl", r"line 3: batch\.jsonl holds 2 prompts; name each by its line among them"),
        ("@batch.jsonl:3", "holds the prompts 1 to 2; '3' is none"),
        ("@x.npz", r"holds tensors; run it with `stabilitykit profile --prompt @x\.npz`"),
    ):
        with pytest.raises(MisuseError, match=said):
            swept(tmp_path, f'checkpoint = "hf:{llama}"\n[[grid]]\nprompt = "{name}"\n')


def test_ids_of_cases_do_not_depend_on_who_runs_the_model(llama: Path, tmp_path: Path) -> None:
    """They are files of finished work: the id of a case that was planned before stays what it was."""
    case = Case(
        kind="run",
        settings={
            "prompt": "prose", "length": 4, "bos": True, "dtype": "float16", "rescale": 1.0, "level": "operators",
            "rounding": "transformers", "temperature": 1.0, "seed": 0, "matmul": "auto", "text_sha256": "ab",
            "tokens": 4, "device": "cpu",
        },
    )  # fmt: skip
    assert case.id.endswith("-58139684cb")
    path = tmp_path / "experiment.toml"
    path.write_text(GRID.format(folder=llama))
    plan = make_plan(read_experiment(path), open_swept(f"hf:{llama}"), command="")
    assert set(plan.cases[0].settings) == set(case.settings)
