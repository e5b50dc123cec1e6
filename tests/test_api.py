"""The public functions beside the commands: models that are open, what is refused, and that nothing is printed."""

from pathlib import Path

import pytest
import torch

import stabilitykit as sk
from stabilitykit.errors import MisuseError
from stabilitykit.models.subject import Subject

TINY = "random:gemma3-270m?layers=2&hidden_size=32&feed_forward=64&heads=2&head_dim=16&vocabulary=512&context=64"


@pytest.fixture(scope="module")
def model() -> Subject:
    return sk.open_model(TINY, dtype="float16")


def test_a_profile_of_an_open_model_is_that_of_its_checkpoint(
    model: Subject, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    named = sk.profile(TINY, "Hi", dtypes=["float16"])
    for opened in (model, sk.load(TINY, dtype="float16")):
        found = sk.profile(opened, "Hi")
        assert (found.tokens, found.pieces) == (named.tokens, ("<bos>", "H", "i"))
        assert found["float16"].frame.equals(named["float16"].frame)
    named.save(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["findings.json", "float16.parquet"]
    assert capsys.readouterr() == ("", "")


def test_a_forecast_of_an_open_model_is_that_of_its_checkpoint() -> None:
    wide = sk.open_model(TINY)
    named, found = (sk.forecast(one, "Hi", formats=["float16"], chat=True) for one in (TINY, wide))
    assert found["float16"].headroom == named["float16"].headroom
    assert len(found.tokens) > 3  # the turn's own


def test_a_random_models_bits_are_those_of_load(model: Subject) -> None:
    tokens = torch.tensor([[2, 70]])
    with torch.inference_mode():
        assert torch.equal(model.module(tokens), sk.load(TINY, dtype="float16")(tokens))


def test_misuse_is_told_in_a_sentence(model: Subject) -> None:
    for call, said in (
        (lambda: sk.profile(model, "Hi", dtypes=["float32"]), "runs in float16, not float32"),
        (lambda: sk.profile(model, "Hi", rescale=2.0), "keeps the rescale it was opened with"),
        (lambda: sk.profile(torch.nn.Linear(2, 2), "Hi"), r"open_model\(\), got Linear"),  # type: ignore[arg-type]
        (lambda: sk.profile(TINY, ""), "The prompt is empty"),
        (lambda: sk.profile(TINY, "Hi", new_tokens=0), "new_tokens must be at least 1, got 0"),
        (lambda: sk.profile(TINY, "Hi", system="Be brief."), "add --chat"),
        (lambda: sk.forecast(TINY, "Hi", dtype="float16"), "Unknown dtype 'float16'; choose one of: float32"),  # type: ignore[arg-type]
        (lambda: sk.bound(TINY, dtype="float64"), "Unknown dtype 'float64'; choose one of: float16"),  # type: ignore[arg-type]
        (lambda: sk.search(TINY, dtype="float8"), "Unknown dtype 'float8'; choose one of: float16"),  # type: ignore[arg-type]
        (lambda: sk.repair(TINY, margin=-1.0), "margin must be at least 0 bits, got -1"),
        (lambda: sk.open_model("hf:x/y", rescale=3.0), "a power of two from"),
        (lambda: sk.open_model(TINY, attention="eager"), "apply to transformers' models only"),
        (lambda: sk.open_model(TINY, rounding="jax"), "Unknown rounding 'jax'; choose one of: transformers"),  # type: ignore[arg-type]
        (lambda: sk.open_model("hf:x/y", rounding="gemma_pytorch"), "applies to the kit's own model only"),
    ):
        with pytest.raises(MisuseError, match=said):
            call()
    with pytest.raises(TypeError, match="rescal"):
        sk.profile(TINY, "Hi", rescal=2.0)  # type: ignore[call-arg]
