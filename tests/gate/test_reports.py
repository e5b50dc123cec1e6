"""JUnit and SARIF, read back by the libraries that others read them with."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from gate.models import TINY, gemma, spoilt
from junitparser import Failure, JUnitXml, Skipped
from sarif.loader import load_sarif_file

import stabilitykit as sk
from stabilitykit.gate.junit import junit
from stabilitykit.gate.sarif import sarif, write_sarif
from stabilitykit.records.gate import Gate

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompt.txt"
    path.write_text("The capital of France is")
    return path


def cases(found: Gate) -> dict[str, list[Any]]:
    """The results of each case, by its name."""
    report = JUnitXml.fromstring(junit(found).encode())
    (suite,) = report
    assert (report.tests, report.failures, report.skipped) == (suite.tests, suite.failures, suite.skipped)
    made = {case.name: case.result for case in suite}
    assert suite.tests == len(made)
    assert suite.failures == sum(any(isinstance(one, Failure) for one in results) for results in made.values())
    assert suite.skipped == sum(any(isinstance(one, Skipped) for one in results) for results in made.values())
    return made


def test_a_check_that_holds_passes_every_case(prompt: Path) -> None:
    found = sk.check(TINY, prompts=[prompt], min_headroom=1.0, max_kl=1.0)
    assert cases(found) == {
        "weights": [], "prompt.txt: range": [], "prompt.txt: headroom": [], "prompt.txt: output": [],
        "prompt.txt: kl": [],
    }  # fmt: skip


def test_a_violation_fails_the_case_of_its_prompt_with_site_and_numbers(prompt: Path) -> None:
    found = sk.check(TINY, prompts=[prompt], rescale=65536.0)
    made = cases(found)
    assert made["weights"] == []
    (failure,) = made["prompt.txt: range"]
    assert (failure.type, failure.text) == ("range", found.violations[0].text)
    assert "embed_tokens" in failure.message
    assert "65,504" in failure.message


def test_only_the_prompt_that_violates_fails(prompt: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a")
    prompts = [prompt, tmp_path / "short.txt"]
    low, high = sorted(one.headroom or 0.0 for one in sk.check(TINY, prompts=prompts).prompts)
    assert low < high
    found = sk.check(TINY, prompts=prompts, min_headroom=(low + high) / 2)
    (worst,) = (one.name for one in found.prompts if one.headroom == low)
    failed = [name for name, results in cases(found).items() if results]
    assert failed == [f"{worst}: headroom"]


def test_weights_that_fail_leave_the_prompts_skipped(tmp_path: Path) -> None:
    found = sk.check(spoilt(gemma(tmp_path / "gemma"), "model.norm.weight", float("inf")))
    made = cases(found)
    assert [type(one) for one in made["weights"]] == [Failure]
    assert [type(one) for one in made["prompts"]] == [Skipped]


def test_characters_that_xml_has_no_place_for_are_escaped(prompt: Path) -> None:
    found = sk.check(TINY, prompts=[prompt], rescale=65536.0)
    odd = replace(found.violations[0], text="token '\x00\x1b[31m<&\">'")
    (failure,) = cases(replace(found, violations=(odd,)))["prompt.txt: range"]
    assert failure.text == "token '\\x00\\x1b[31m<&\">'"


def test_sarif_is_read_with_each_violation_its_rule_and_place(prompt: Path, tmp_path: Path) -> None:
    found = sk.check(TINY, prompts=[prompt], rescale=65536.0)
    write_sarif(tmp_path / "check.sarif", found)
    read = load_sarif_file(str(tmp_path / "check.sarif"))
    assert read.get_distinct_tool_names() == ["stabilitykit"]
    (record,) = read.get_records()
    assert (record["Severity"], record["Code"]) == ("error", "range")
    assert record["Description"].startswith("float16 overflows in embedding, scaled")
    (result,) = sarif(found)["runs"][0]["results"]
    assert result["locations"][0]["logicalLocations"] == [{"fullyQualifiedName": "embed_tokens", "kind": "member"}]
    rules = sarif(found)["runs"][0]["tool"]["driver"]["rules"]
    assert rules[result["ruleIndex"]]["id"] == result["ruleId"]


def test_what_holds_has_no_result(prompt: Path, tmp_path: Path) -> None:
    write_sarif(tmp_path / "check.sarif", sk.check(TINY, prompts=[prompt]))
    assert load_sarif_file(str(tmp_path / "check.sarif")).get_result_count() == 0


def test_sarif_keeps_to_the_standards_schema_and_says_what_code_scanning_asks_of_a_rule(prompt: Path) -> None:
    schema = json.loads((Path(__file__).parent / "reference" / "sarif-2.1.0.json").read_text())
    for rescale, violations in ((1.0, False), (65536.0, True)):
        log = sarif(sk.check(TINY, prompts=[prompt], rescale=rescale))
        jsonschema.Draft202012Validator(schema).validate(log)
        (run,) = log["runs"]
        assert bool(run["results"]) == violations
        for rule in run["tool"]["driver"]["rules"]:
            assert all((rule["fullDescription"]["text"], rule["help"]["text"], rule["help"]["markdown"]))


def test_a_value_that_is_not_finite_is_a_string_in_sarif(tmp_path: Path) -> None:
    found = sk.check(spoilt(gemma(tmp_path / "gemma"), "model.norm.weight", float("nan")))
    log = json.loads(json.dumps(sarif(found), allow_nan=False))
    (result,) = log["runs"][0]["results"]
    assert result["properties"]["value"] == "nan"
    assert result["locations"][0]["logicalLocations"][0]["fullyQualifiedName"] == found.violations[0].site
