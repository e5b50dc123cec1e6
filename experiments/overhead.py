"""What recording costs: every speed that the project promises, measured in one run and held against its target.

    python experiments/overhead.py                 the table, in about five minutes
    python experiments/overhead.py --long          and the model's whole context of 32,768 tokens
    python experiments/overhead.py --out FOLDER    elsewhere than reports/overhead

Ratios are of medians of runs that take turns in one process. It writes overhead.json and report.md, and prints the
report.
"""

import argparse
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import stabilitykit as sk
from stabilitykit.experiment.prompts import parse_prompt
from stabilitykit.experiment.prompts import tokens as tokens_of
from stabilitykit.gemma import Gemma
from stabilitykit.gemma.matmul import matmul
from stabilitykit.records import Recording

ROOT = Path(__file__).parent.parent
CHECKPOINT = "gemma3-270m"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. `target` and `measured` are in `unit`; without a target it is there for comparison."""

    what: str
    measured: float
    unit: str
    target: float | None = None
    detail: str = ""

    @property
    def met(self) -> str:
        if self.target is None:
            return "–"
        return "yes" if self.measured <= self.target else "no"


class Empty(TorchDispatchMode):
    """The least that seeing every operator costs."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Floor(TorchDispatchMode):
    """One `torch.aminmax` of every tensor that an operator makes: the least that looking at them costs."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.is_floating_point() and not func.is_view:
            torch.aminmax(output)
        return output


def taking_turns(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Seconds of each, the median of as many rounds, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            gc.collect()
            began = time.perf_counter()
            run()
            if round_:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(spent) for name, spent in times.items()}


def recorded(model: Any, ids: torch.Tensor, how: Mapping[str, Any], forward: Mapping[str, Any]) -> Recording:
    with torch.no_grad(), sk.record(model, **how) as recording:
        model(ids, **forward)
    return recording


def recording_rows(model: Gemma, tokens: list[int], rounds: int) -> Iterator[Row]:
    """Our model, last-position logits, float32."""
    last = {"last_only": True}
    for length, targets in ((512, (1.15, 1.08)), (64, (1.35, None))):
        ids = torch.tensor([tokens[:length]])

        def bare(ids: torch.Tensor = ids) -> None:
            with torch.no_grad():
                model(ids, **last)

        def under(mode: Callable[[], Any], ids: torch.Tensor = ids) -> None:
            with torch.no_grad(), mode():
                model(ids, **last)

        seconds = taking_turns(
            {
                "bare": bare,
                "operators": lambda ids=ids: recorded(model, ids, {}, last),
                "modules": lambda ids=ids: recorded(model, ids, {"level": "modules"}, last),
                "empty": lambda: under(Empty),
                "floor": lambda: under(Floor),
            },
            rounds,
        )
        found = recorded(model, ids, {}, last)
        elements = sum(record.elements for record in found)
        detail = f"{len(found):,} tensors, {elements / 1e6:,.0f} million elements; bare {seconds['bare']:.2f} s"
        ratio = {name: spent / seconds["bare"] for name, spent in seconds.items()}
        yield Row(
            what=f"operators ÷ bare, {length} tokens", measured=ratio["operators"], unit="×", target=targets[0],
            detail=detail,
        )  # fmt: skip
        yield Row(what=f"modules ÷ bare, {length} tokens", measured=ratio["modules"], unit="×", target=targets[1])
        yield Row(what=f"an empty dispatch mode ÷ bare, {length} tokens", measured=ratio["empty"], unit="×")
        yield Row(what=f"one aminmax of each tensor ÷ bare, {length} tokens", measured=ratio["floor"], unit="×")
    recording = recorded(model, torch.tensor([tokens[:512]]), {}, last)
    began = time.perf_counter()
    _ = recording.records
    yield Row(what="making the records, when they are first read", measured=time.perf_counter() - began, unit="s")


def growth_rows(model: Gemma, tokens: list[int], rounds: int) -> Iterator[Row]:
    """Linear: the cost of an element at the longest prompt is no more than at the shortest, with a margin for noise."""
    cost = {}
    for length in (256, 1024, 2048):
        ids = torch.tensor([tokens[:length]])

        def bare(ids: torch.Tensor = ids) -> None:
            with torch.no_grad():
                model(ids, last_only=True)

        seconds = taking_turns(
            {"bare": bare, "recorded": lambda ids=ids: recorded(model, ids, {}, {"last_only": True})}, rounds
        )
        elements = sum(record.elements for record in recorded(model, ids, {}, {"last_only": True}))
        cost[length] = (seconds["recorded"] - seconds["bare"]) / elements * 1e9
    yield Row(
        what="growth: cost of an element at 2,048 tokens ÷ at 256",
        measured=cost[2048] / cost[256],
        unit="×",
        target=1.2,
        detail=", ".join(f"{length:,} tokens {spent:.2f} ns" for length, spent in cost.items()),
    )


def product_rows(tokens: list[int], rounds: int) -> Iterator[Row]:
    """float16 products summed in float32, against the library's own."""
    model = sk.load(CHECKPOINT, dtype="float16")
    for length, target in ((512, 1 / 5), (1024, 1 / 7)):
        ids = torch.tensor([tokens[:length]])

        def run(kind: str, ids: torch.Tensor = ids) -> None:
            with torch.no_grad(), matmul(kind):
                model(ids, last_only=True)

        seconds = taking_turns(
            {"native": lambda: run("native"), "wide": lambda: run("float32-accumulate")}, max(1, rounds // 3)
        )
        yield Row(
            what=f"float16, products summed in float32 ÷ native, {length:,} tokens",
            measured=seconds["wide"] / seconds["native"],
            unit="×",
            target=target,
            detail=f"native {seconds['native']:.2f} s",
        )


def peer_rows(tokens: list[int], rounds: int) -> Iterator[Row]:
    """transformers' own model of the same shape, with its own tool for this and with ours."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig
    from transformers.debug_utils import DebugUnderflowOverflow

    torch.manual_seed(0)
    ours = sk.open_checkpoint(CHECKPOINT).config
    config = Gemma3TextConfig(
        vocab_size=ours.vocabulary, hidden_size=ours.hidden_size, intermediate_size=ours.feed_forward,
        num_hidden_layers=ours.layers, num_attention_heads=ours.heads, num_key_value_heads=ours.kv_heads,
        head_dim=ours.head_dim, query_pre_attn_scalar=int(ours.query_scalar), attn_implementation="eager",
    )  # fmt: skip
    model, watched = Gemma3ForCausalLM(config).eval(), Gemma3ForCausalLM(config).eval()
    with silenced():
        DebugUnderflowOverflow(watched)
    forward = {"logits_to_keep": 1, "use_cache": False}
    for length in (512, 64):
        ids = torch.tensor([tokens[:length]])

        def bare(which: Any, ids: torch.Tensor = ids) -> None:
            with torch.no_grad():
                which(ids, logits_to_keep=1, use_cache=False)

        seconds = taking_turns(
            {
                "bare": lambda: bare(model),
                "ours": lambda ids=ids: recorded(model, ids, {}, forward),
                "theirs": lambda: bare(watched),
            },
            rounds,
        )
        for name, what in (("ours", "our operators"), ("theirs", "DebugUnderflowOverflow")):
            yield Row(
                what=f"{what} ÷ bare, transformers' model, {length} tokens",
                measured=seconds[name] / seconds["bare"],
                unit="×",
            )


@contextmanager
def silenced() -> Iterator[None]:
    with Path(os.devnull).open("w") as nowhere:
        out, sys.stdout = sys.stdout, nowhere
        try:
            yield
        finally:
            sys.stdout = out


LOADING = """
import json, time
from stabilitykit.checkpoints import open_checkpoint
from stabilitykit.gemma import build
from stabilitykit.gemma.tokenizer import Tokenizer
began = time.perf_counter(); opened = open_checkpoint("gemma3-270m"); model = build(opened)
loaded = time.perf_counter(); Tokenizer(opened.vocabulary)
print(json.dumps([loaded - began, time.perf_counter() - loaded]))
"""


def start_rows() -> Iterator[Row]:
    """Processes of their own; the modules' files are in the system's cache."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "STABILITYKIT_CACHE": cache}
        loads = [json.loads(said([sys.executable, "-c", LOADING], environment)[1]) for _ in range(4)]
    yield Row(what="first load of the GGUF", measured=loads[0][0], unit="s", target=15)
    yield Row(what="later loads", measured=statistics.median(load[0] for load in loads[1:]), unit="s", target=1.5)
    yield Row(what="tokenizer", measured=statistics.median(load[1] for load in loads), unit="s", target=0.5)
    command = [sys.executable, "-m", "stabilitykit"]
    times = [said([*command, "--help"])[0] for _ in range(5)]
    yield Row(what="stabilitykit --help", measured=statistics.median(times), unit="s", target=0.4)
    source = ROOT / "reports" / "float16_break"
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(source, Path(folder) / "float16_break")
        times = [said([*command, "report", str(copy)])[0] for _ in range(2)]
    yield Row(what="stabilitykit report (27 cases)", measured=min(times), unit="s", target=3)


def said(command: list[str], environment: Mapping[str, str] | None = None) -> tuple[float, str]:
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return time.perf_counter() - began, done.stdout


CONTEXT = """
import json, resource, time, torch
import stabilitykit as sk
model = sk.load("gemma3-270m")
tokens = torch.tensor([[2] + [(7 * i) % 50000 + 300 for i in range(model.config.context - 1)]])
began = time.perf_counter()
with torch.no_grad(), sk.record(model) as recording:
    model(tokens, last_only=True)
spent = time.perf_counter() - began
print(json.dumps([spent, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, len(recording)]))
"""


def context_rows() -> Iterator[Row]:
    spent, peak, sites = json.loads(said([sys.executable, "-c", CONTEXT])[1])
    detail = f"{sites:,} tensors recorded"
    yield Row(what="32,768 tokens, operators: time", measured=spent / 60, unit="min", target=15, detail=detail)
    yield Row(what="32,768 tokens, operators: peak memory", measured=peak, unit="GiB", target=8)


def report(rows: list[Row], sites: list[str]) -> str:
    lines = [
        "# What recording costs",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} "
        f"threads, Python {platform.python_version()}; Gemma 3 270M, dequantised from Q4_K_M, float32 unless said "
        "otherwise, logits of the last position. Made by `python experiments/overhead.py`.",
        "",
        "| what | measured | target | target met | |",
        "|---|---:|---:|---|---|",
    ]
    for row in rows:
        target = "–" if row.target is None else f"{row.target:.3g} {row.unit}"
        lines.append(f"| {row.what} | {row.measured:.3g} {row.unit} | {target} | {row.met} | {row.detail} |")
    lines += ["", f"The {len(sites):,} sites that are recorded:", "", "```", *sites, "```", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="runs of which the median counts")
    parser.add_argument("--long", action="store_true", help="the whole context too: minutes, and gigabytes")
    parser.add_argument("--out", type=Path, default=ROOT / "reports" / "overhead")
    given = parser.parse_args()
    model = sk.load(CHECKPOINT)
    assert model.tokenizer is not None
    tokens = tokens_of(parse_prompt("prose", ROOT / "experiments"), model.tokenizer, bos=True, length=2048)
    rows: list[Row] = []
    parts = [
        lambda: recording_rows(model, tokens, given.rounds),
        lambda: growth_rows(model, tokens, max(1, given.rounds // 2)),
        lambda: product_rows(tokens, given.rounds),
        lambda: peer_rows(tokens, given.rounds),
        start_rows,
        *([context_rows] if given.long else []),
    ]
    for part in parts:
        for row in part():
            print(f"{row.what}: {row.measured:.3g} {row.unit}, target met: {row.met}", file=sys.stderr, flush=True)
            rows.append(row)
    found = recorded(model, torch.tensor([tokens[:64]]), {}, {"last_only": True})
    text = report(rows, [record.site for record in found])
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "report.md").write_text(text, encoding="utf-8")
    document = [asdict(row) | {"met": row.met} for row in rows]
    (given.out / "overhead.json").write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    print(text.split("\nThe ")[0])


if __name__ == "__main__":
    main()
