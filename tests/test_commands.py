"""The command lines that advice names: what the user typed is said again, for a shell, where the command takes it."""

import shlex

import pytest

from stabilitykit.commands import Typed, again, line, repair, training, typed

KNOWN = {
    "profile": {"--prompt", "--dtype", "--chat", "--adapter", "--stress"},
    "diagnose": {"--prompt", "--batch", "--dtype", "--chat", "--adapter", "--stress"},
    "repair": {"--dtype", "--adapter", "--out"},
}


def test_a_line_is_quoted_for_a_shell() -> None:
    words = ("my folder/it's", "--out", "a b")
    assert shlex.split(line("repair", *words)) == ["stabilitykit", "repair", *words]


def test_without_a_command_line_nothing_is_known_but_the_checkpoint() -> None:
    assert again("diagnose", "toy") == "stabilitykit diagnose toy --prompt ..."
    assert again("repair", "toy", "--json") == "stabilitykit repair toy --json"
    assert repair("hf:models/my toy/") == "stabilitykit repair 'hf:models/my toy/' --out 'my toy-float16'"
    assert training() == "sk.diagnose_training(make)"


def test_what_was_typed_is_said_again_where_the_command_takes_it() -> None:
    options = {
        "--prompt": ["it's"],
        "--chat": [],
        "--dtype": ["bfloat16", "float32"],
        "--adapter": ["l o"],
        "--json": [],
    }
    with typed(Typed(checkpoint="./toy", options=options, known=KNOWN)):
        assert shlex.split(again("diagnose", "toy")) == [
            *("stabilitykit", "diagnose", "./toy", "--prompt", "it's", "--chat", "--adapter", "l o"),
        ]
        # of several dtypes it is that which broke
        assert shlex.split(again("diagnose", "toy", dtype="bfloat16"))[3:5] == ["--dtype", "bfloat16"]
        assert again("diagnose", "toy", dtype="float16") == again("diagnose", "toy")
        assert again("profile", "toy", "--prompt", "@a b").count("--prompt '@a b'") == 1
        # a repair reads no prompt
        assert repair("toy") == "stabilitykit repair ./toy --out toy-float16 --adapter 'l o'"
    assert "it's" not in again("diagnose", "toy")


def test_on_a_page_and_of_a_command_without_a_model_nothing_is_said_again() -> None:
    options = {"--prompt": ["mine"], "--chat": []}
    for command in (None, Typed(options=options, known=KNOWN)):
        with typed(Typed(checkpoint="mine", options=options, known=KNOWN)), typed(command):
            assert again("diagnose", "toy") == "stabilitykit diagnose toy --prompt ..."


def test_a_redacted_prompt_is_not_told() -> None:
    with typed(Typed(checkpoint="toy", options={"--prompt": ["secret"], "--redact": []}, known=KNOWN)):
        assert again("diagnose", "toy") == "stabilitykit diagnose toy --prompt ..."


def test_a_stressed_model_is_none_that_could_be_repaired() -> None:
    with typed(Typed(checkpoint="toy", options={"--stress": ["4.0"]}, known=KNOWN)):
        assert repair("toy") is None


@pytest.mark.parametrize("file", ["mine.py:make", "my file.py"])
def test_a_step_of_a_file_is_diagnosed_in_that_file(file: str) -> None:
    with typed(Typed(file=file)):
        assert shlex.split(training()) == ["stabilitykit", "diagnose", file, "--backward"]
    with typed(Typed(checkpoint="toy")):
        assert training() == "stabilitykit diagnose FILE.py:make --backward"
