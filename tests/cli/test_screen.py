"""What the commands print, to the letter; and the bar that shows only where work is long and somebody looks."""

import io
import re
from dataclasses import replace

import pytest
from bounded import bounds
from rich.console import Console
from scored import ranking
from searched import search
from swept import broken_run, plan, run_case

from stabilitykit.cli import screen
from stabilitykit.records.sweep import Case
from stabilitykit.sweeps.cost import Cost

LAYERS = """\
float16, by layer
layer     amax  headroom  subnormal  entropy  lost  amax is in
0       60,000      0.13          –        –     1  layers.0/add.0, ' a'
1            –         –          –        –    12  –
logits       –         –          –        –    12  –
"""

CHAIN = """\
How it spread
event     site     what               operator how
break     layers.0 residual after MLP add      overflow: 1 element lost at position 0 '<bos>',
                                               channel 2
first NaN layers.1 –                  add      inf - inf makes 12 NaN
layer     layers.1 –                  add      12 NaN, in 3 of 3 tokens and 4 of 4 channels
logits    lm_head  –                  matmul   every logit is NaN
error     sampler  –                  –        no `probabilities`
A token or a channel is lost where any of its elements is inf or NaN.
"""

RANKING = """\
Closest to float32 is float32 residual, 100 times as close as bfloat16; it needs code around the
model, which no folder carries. What a folder carries is scaling, 50 times as close as bfloat16.

The repair scales 4 of 30 parameters by powers of two and rms_norm_eps by 2^-4: the largest value
that float16 must store, 100,000 in layers.1, becomes 25,000. Nothing is rounded in float32, where
logits keep every bit. In float16 15 more weights are subnormal, 25 in all, and 2 more become zero.
Of scaling's mean KL one token among 1,000 makes up 25%: there it is 0.005.

Against float32, over 1,000 held-out tokens
                   mean                                        headroom  weights   extra
remedy               KL      ±    99% largest top-1 perplexity   [bits]  [bytes] [bytes]  time
float32 residual 1.0e-5 1.0e-5 2.0e-3  4.0e-3 99.0%    +0.010%      1.5 1.00 MiB     0 B 1.00×
scaling          2.0e-5 1.0e-5 2.0e-3  5.0e-3 99.0%    +0.010%      1.5 1.00 MiB     0 B 1.00×
bfloat16         1.0e-3 1.0e-5 2.0e-3  4.0e-3 99.0%    +0.010%      1.5 1.00 MiB     0 B 1.00×
float16               –      –      –       –     –          –        – 1.00 MiB     0 B 1.00×
"""

BOUNDS = """\
Of 6 tensors, 2 stay below the float16 maximum, 65,504, for every prompt. The others: 2 open, 1
reachable by a hidden state, 1 reachable by a prompt.

Bounds by kind of tensor, as stored in float16 (maximum 65,504)
                                                                            bound
                                                                  in            ÷
tensor             verdict                               bound layer  found found observed
embedding, scaled  safe for every prompt                    20     –      –     –       19
down projection    reachable by a hidden state, 1 of 2  80,000     1 66,000  1.06       20
residual after MLP reachable by a prompt, 1 of 2       130,000     1      –     –   66,000
logits             open                                    inf     –      –     –        –
"""

CASES = """\
A toy: 2 cases
kind  case                               tokens      about    memory
run   prose 3 tokens with <bos> float16       3      0.1 s  1.00 MiB
run   prose 3 tokens with <bos> float32   1,200  1 h 7 min  3.00 GiB

"""


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    out = io.StringIO()
    monkeypatch.setattr(screen, "output", Console(file=out, width=100, highlight=False, color_system=None))
    return out


def text(printed: io.StringIO) -> str:
    return "\n".join(line.rstrip() for line in printed.getvalue().splitlines())


def test_layers_of_a_broken_run(printed: io.StringIO) -> None:
    screen.print_layers(broken_run())
    assert text(printed) == LAYERS


def test_the_chain_of_a_broken_run(printed: io.StringIO) -> None:
    screen.print_chain(broken_run())
    assert text(printed) == CHAIN


def test_remedies_fit_a_terminal_of_a_hundred_columns(printed: io.StringIO) -> None:
    screen.print_ranking(ranking())
    assert text(printed).startswith(RANKING)
    assert all(len(line) <= 100 for line in text(printed).splitlines())


def test_bounds(printed: io.StringIO) -> None:
    screen.print_bounds(bounds().sites)
    assert text(printed).startswith(BOUNDS)


def test_a_search_shows_the_worst_eight_and_says_where_the_others_are(printed: io.StringIO) -> None:
    found = search()
    (scan,) = found.scans
    screen.print_search(replace(found, scans=(replace(scan, worst=scan.worst * 5),)))
    assert "The first 8 of 10 rows; all are in the JSON document (--json)." in text(printed)
    assert "'ow' 'ars' (2 tokens)" in text(printed)


def test_cases_and_what_they_cost(printed: io.StringIO) -> None:
    cases: list[Case] = [run_case(tokens=3), run_case("float32", tokens=1200)]
    costs = [Cost(seconds=0.01, memory=2**20), Cost(seconds=4000.0, memory=3 * 2**30)]
    screen.print_cases(plan(cases), costs)
    assert text(printed).startswith(CASES)


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Standard error, on a terminal."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80)
    monkeypatch.setattr(screen, "messages", console)
    return out


def test_a_bar_shows_what_is_done_once_the_work_is_long(messages: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "_PATIENCE", -1.0)
    with screen.progress_bar() as progress:
        progress("reading weights", 1, 4)
        progress("running", 1, 2)
    assert "running" in messages.getvalue()
    assert "50%" in messages.getvalue()


def test_a_bar_stays_away_from_short_work(messages: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "_PATIENCE", 3600.0)
    with screen.progress_bar() as progress:
        progress("reading weights", 4, 4)
    assert messages.getvalue() == ""


def test_in_a_pipe_long_work_is_a_line_for_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(screen, "messages", Console(file=out))
    monkeypatch.setattr(screen, "_PATIENCE", -1.0)
    with screen.progress_bar() as progress:
        progress("reading weights", 1, 4)
    assert out.getvalue() == ""
    monkeypatch.setattr(screen, "_LONG", -1.0)
    with screen.progress_bar() as progress:
        for done in range(4):
            progress("reading weights", done, 4)
        progress("held-out texts: scaling", 0, 2)
    assert re.sub(r"\d+ s", "_ s", out.getvalue()) == "_ s: reading weights\n_ s: held-out texts: scaling\n"
