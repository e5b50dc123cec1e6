"""What recording costs: every speed that the project promises, measured in one run and held against its target.

    python experiments/overhead.py                    every part, in about half an hour
    python experiments/overhead.py recording start    these parts alone; what the others gave before is kept
    python experiments/overhead.py cuda               a model of 7B's shape on a GPU, into reports/overhead_cuda
    python experiments/overhead.py --out FOLDER       elsewhere than reports/overhead

Ratios are of medians of runs that take turns in one process: a machine that is busy slows all of them. What was
measured is kept in overhead.json, and told in report.md and report.html. Parts from different machines refuse to merge.
"""

import argparse
import gc
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import stabilitykit as sk
from stabilitykit.checkpoints.config import RELEASED, GemmaConfig
from stabilitykit.checkpoints.parameters import parameter_shapes
from stabilitykit.guards.watch import Watch
from stabilitykit.models.gemma import Gemma, KVCache
from stabilitykit.models.matmul import matmul
from stabilitykit.records import Header, Record, Recording
from stabilitykit.records.sweep import Case, Plan, Results
from stabilitykit.report.blocks import Column, Figure, Hover, Prose, Section, Table
from stabilitykit.report.html import html
from stabilitykit.report.pdf import BROWSERS
from stabilitykit.report.sections import explore
from stabilitykit.report.style import BLUE, INK, VERMILLION
from stabilitykit.report.write import write_report
from stabilitykit.run.prompts import parse_prompt
from stabilitykit.run.prompts import tokens as tokens_of

if TYPE_CHECKING:
    import matplotlib.figure

ROOT = Path(__file__).parent.parent
CHECKPOINT = "gemma3-270m"
LARGE = "gemma-7b"
PARTS = (
    "recording",
    "growth",
    "products",
    "peers",
    "guarding",
    "start",
    "check",
    "report",
    "explorer",
    "context",
    "large",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. `target` and `stretch` are the most that `measured` should be, in `unit`.

    Without them it is there for comparison. A `bar` has a place in the figure.
    """

    what: str
    measured: float
    unit: str
    target: float | None = None
    stretch: float | None = None
    detail: str = ""
    bar: bool = False

    @property
    def met(self) -> str | None:
        if self.target is None:
            return None
        if self.measured > self.target:
            return "no"
        return "stretch too" if self.stretch is not None and self.measured <= self.stretch else "yes"


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
    wanted: dict[int, dict[str, tuple[float, float]]] = {
        512: {"operators": (1.15, 1.05), "modules": (1.08, 1.03)},
        64: {"operators": (1.35, 1.2)},
    }
    for length, targets in wanted.items():
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
                "operators": partial(recorded, model, ids, {}, last),
                "modules": partial(recorded, model, ids, {"level": "modules"}, last),
                "empty": lambda: under(Empty),
                "floor": lambda: under(Floor),
            },
            rounds,
        )
        found = recorded(model, ids, {}, last)
        elements = sum(record.elements for record in found)
        detail = f"{len(found):,} tensors, {elements / 1e6:,.0f} million elements; bare {seconds['bare']:.2f} s"
        names = {
            "empty": "an empty dispatch mode",
            "floor": "one aminmax of each tensor",
            "modules": "recording modules",
            "operators": "recording operators",
        }
        for name, what in names.items():
            target, stretch = targets.get(name, (None, None))
            yield Row(
                what=f"{what}, {length} tokens",
                measured=seconds[name] / seconds["bare"],
                unit="× bare",
                target=target,
                stretch=stretch,
                detail=detail if name == "operators" else "",
                bar=True,
            )
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
            {"bare": bare, "recorded": partial(recorded, model, ids, {}, {"last_only": True})}, rounds
        )
        elements = sum(record.elements for record in recorded(model, ids, {}, {"last_only": True}))
        cost[length] = (seconds["recorded"] - seconds["bare"]) / elements * 1e9
    yield Row(
        what="cost of recording an element, 2,048 tokens ÷ 256",
        measured=cost[2048] / cost[256],
        unit="×",
        target=1.2,  # linear, with a margin for noise
        detail=", ".join(f"{length:,} tokens {spent:.2f} ns" for length, spent in cost.items()),
    )


def product_rows(tokens: list[int], rounds: int) -> Iterator[Row]:
    """float16 products summed in float32, against the library's own."""
    model = sk.load(CHECKPOINT, dtype="float16")
    for length, target, stretch in ((512, 1 / 5, 1 / 6), (1024, 1 / 7, 1 / 8)):
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
            stretch=stretch,
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
        head_dim=ours.head_dim, query_pre_attn_scalar=int(ours.query_scalar),
    )  # fmt: skip
    config._attn_implementation = "eager"
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
                "ours": partial(recorded, model, ids, {}, forward),
                "theirs": lambda: bare(watched),
            },
            rounds,
        )
        for name, what in (("ours", "recording operators"), ("theirs", "DebugUnderflowOverflow")):
            yield Row(
                what=f"{what}, transformers' model, {length} tokens",
                measured=seconds[name] / seconds["bare"],
                unit="× bare",
                bar=True,
            )


def guarding_rows(model: Gemma, tokens: list[int], rounds: int) -> Iterator[Row]:
    """Decode steps after 64 tokens, and a prefill, under a guard and without one, which take turns call by call."""
    ways: tuple[Watch | None, ...] = (None, "logits", "residual")

    @torch.no_grad()
    def called(watch: Watch | None, ids: torch.Tensor, cache: KVCache | None) -> float:
        with sk.guard(model, watch=watch) if watch is not None else nullcontext():
            began = time.perf_counter()
            model(ids, cache=cache, last_only=True)
            return time.perf_counter() - began

    def turns(chosen: Sequence[Watch | None], ids: torch.Tensor, count: int, room: int) -> dict[Watch | None, float]:
        """The median of each; every call of one way has the others' before and after it."""
        caches: dict[Watch | None, KVCache | None] = dict.fromkeys(chosen)
        for way in chosen if room else ():
            caches[way] = KVCache(model.config, batch=1, length=room, dtype=model.dtype)
            called(None, torch.tensor([tokens[:64]]), caches[way])
        times: dict[Watch | None, list[float]] = {way: [] for way in chosen}
        for turn in range(count):
            at = turn % len(chosen)
            for way in (*chosen[at:], *chosen[:at]):
                times[way].append(called(way, ids, caches[way]))
        return {way: statistics.median(spent) for way, spent in times.items()}

    count = 50 * rounds
    steps = turns(ways, torch.tensor([[tokens[64]]]), count, 64 + count)
    passes = turns((None, "residual"), torch.tensor([tokens[:512]]), 2 * rounds, 0)
    wanted: tuple[tuple[str, Watch, Mapping[Watch | None, float], float, float], ...] = (
        ("a decode step", "logits", steps, 1.01, 1.003),
        ("a decode step", "residual", steps, 1.03, 1.01),
        ("prefill of 512 tokens", "residual", passes, 1.01, 1.003),
    )
    for what, watch, times, target, stretch in wanted:
        yield Row(
            what=f"{what}, guarded, watch={watch}",
            measured=times[watch] / times[None],
            unit="× bare",
            target=target,
            stretch=stretch,
            detail=f"bare {times[None] * 1e3:,.0f} ms, medians of {count if times is steps else 2 * rounds}",
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
from stabilitykit.models.gemma import build
from stabilitykit.models.gemma.tokenizer import Tokenizer
began = time.perf_counter(); opened = open_checkpoint("gemma3-270m"); model = build(opened)
loaded = time.perf_counter(); Tokenizer(opened.vocabulary)
print(json.dumps([loaded - began, time.perf_counter() - loaded]))
"""


ONE_PASS = """
import torch
import stabilitykit as sk
from stabilitykit.models.matmul import matmul
model = sk.load("gemma3-270m", dtype="float16")
ids = torch.tensor([model.tokenizer.encode("The capital of France is")])
with torch.inference_mode(), matmul("float32-accumulate"):
    model(ids, last_only=True)
"""


def start_rows() -> Iterator[Row]:
    """Processes of their own; the modules' files are in the system's cache."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "STABILITYKIT_CACHE": cache}
        loads = [json.loads(said(["-c", LOADING], environment).output) for _ in range(4)]
    later = statistics.median(load[0] for load in loads[1:])
    tokenizer = statistics.median(load[1] for load in loads[1:])
    yield Row(what="first load of the GGUF", measured=loads[0][0], unit="s", target=15, stretch=8)
    yield Row(what="later loads", measured=later, unit="s", target=1.5, stretch=0.5)
    yield Row(what="tokenizer", measured=tokenizer, unit="s", target=0.5, stretch=0.2)
    times = [said(["stabilitykit", "--help"]).seconds for _ in range(7)]
    yield Row(what="stabilitykit --help", measured=statistics.median(times), unit="s", target=0.4, stretch=0.2)
    profile = ["stabilitykit", "profile", CHECKPOINT, "--prompt", "The capital of France is"]
    times_of = taking_turns({"profile": lambda: said(profile), "pass": lambda: said(["-c", ONE_PASS])}, 5)
    yield Row(
        what="stabilitykit profile",
        measured=times_of["profile"],
        unit="s",
        target=4,
        stretch=2.5,
        detail="one sentence in float16, weights checked",
    )
    yield Row(
        what="profile ÷ load and one pass",
        measured=times_of["profile"] / times_of["pass"],
        unit="×",
        target=2,
        stretch=1.5,
        detail="both in processes of their own; of the other, nobody watches the pass",
    )


def check_rows() -> Iterator[Row]:
    """In the dtype in which every prompt runs to its end."""
    times = [said(["stabilitykit", "check", CHECKPOINT, "--dtype", "bfloat16"]).seconds for _ in range(3)]
    yield Row(
        what="stabilitykit check",
        measured=statistics.median(times),
        unit="s",
        target=60,
        stretch=20,
        detail="bfloat16, three texts of 512 tokens",
    )


def report_rows() -> Iterator[Row]:
    """Of the records that the repository keeps, in a folder without a report; the PDF where there is a browser."""
    kept = ROOT / "reports" / "float16_break"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "sweep"
        shutil.copytree(kept / "records", out / "records")
        shutil.copy(kept / "experiment.json", out)
        first = said(["stabilitykit", "report", str(out)]).seconds
        times = [said(["stabilitykit", "report", str(out)]).seconds for _ in range(5)]
        printed = [said(["stabilitykit", "report", str(out), "--pdf"]).seconds for _ in range(3)] if browser() else []
        cases = len(list((out / "records").iterdir()))
    detail = f"float16_break, {cases} files of records"
    again = "stabilitykit report, of what it was drawn from before"
    yield Row(what=again, measured=statistics.median(times), unit="s", target=2, stretch=1.2, detail=detail)
    yield Row(what="stabilitykit report, all figures drawn", measured=first, unit="s", detail=detail)
    if printed:
        yield Row(what="stabilitykit report --pdf", measured=statistics.median(printed), unit="s", detail=detail)


def browser() -> bool:
    return any(map(shutil.which, BROWSERS))


EXPLORE = """
const done = arguments[0];
const form = document.querySelector("#explorer form"), map = document.querySelector("#explorer .map");
const painted = () => new Promise((resolve) => requestAnimationFrame(() => {
  const channel = new MessageChannel();  // a task of its own, after the frame
  channel.port1.onmessage = resolve;
  channel.port2.postMessage(0);
}));
const put = (field, value) => {
  field.value = value;
  field.dispatchEvent(new Event("input", { bubbles: true }));
};
const press = (key) => {
  map.querySelector("[tabindex='0']").dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
};
const pick = (name, at) => {
  const fields = form.querySelectorAll(`[name=${name}]`), field = fields[at % fields.length];
  field.checked = true;
  field.dispatchEvent(new Event("input", { bubbles: true }));
};
const cells = [...map.querySelectorAll("[role=gridcell][tabindex]")];
const kinds = {
  "a step of the slider": (turn) => put(form.at, turn + 1),
  "an arrow key": (turn) => press(turn % 2 ? "ArrowDown" : "ArrowRight"),
  "a click": (turn) => cells[(997 * turn) % cells.length].click(),
  "a filter": (turn) => put(form.filter, turn % 2 ? "site 1" : ""),
  "another format": (turn) => put(form.format, form.format.options[turn % form.format.options.length].value),
  "another dtype": (turn) => pick("dtype", turn % 2),
};
(async () => {
  const found = {};
  for (const [kind, act] of Object.entries(kinds)) {
    found[kind] = [];
    for (let turn = 0; turn < 25; turn += 1) {
      await new Promise((resolve) => setTimeout(resolve, 100));
      const start = performance.now();
      act(turn);
      await painted();
      found[kind].push(performance.now() - start);
    }
  }
  done(found);
})();
"""


def explorer_rows() -> Iterator[Row]:
    """Headless Chromium, from an input to the end of the next frame, with 10,000 cells in the map at once."""
    from selenium import webdriver

    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(html("Explorer", [explore.section(many_records(Path(folder) / "sweep"))], {}), encoding="utf-8")
        options = webdriver.ChromeOptions()
        flags = f"--headless --no-sandbox --disable-gpu --window-size=1280,900 --user-data-dir={folder}/profile"
        for flag in flags.split():
            options.add_argument(flag)
        options.binary_location = shutil.which("chromium") or ""
        # By its path, or Selenium asks the network for one.
        driver = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
        browser = webdriver.Chrome(options=options, service=driver)
        try:
            browser.set_script_timeout(120)
            browser.get(page.as_uri())
            while not browser.execute_script("return document.getElementById('explorer').dataset.ready"):
                time.sleep(0.1)
            browser.execute_script("document.getElementById('explorer').scrollIntoView()")
            times = browser.execute_async_script(EXPLORE)
        finally:
            browser.quit()
    for kind, measured in times.items():
        yield Row(
            what=f"explorer, {kind}",
            measured=statistics.median(measured),
            unit="ms",
            target=100,
            stretch=50,
            detail="10,000 records in the map; to the end of the next frame",
        )


def many_records(folder: Path) -> Results:
    """A sweep of one prompt of 64 tokens in two dtypes, in each 100 layers of 100 sites, with made-up magnitudes."""
    random = Random(0)
    cases = [Case(kind="run", settings={"prompt": "prose", "length": 64, "dtype": d}) for d in ("float32", "bfloat16")]
    results = Results.create(
        folder,
        Plan(
            name="explorer", title="Explorer", command="", source="", checkpoint="made up", sha256="", config={},
            cases=tuple(cases), sections=(), versions={}, machine={},
        ),
    )  # fmt: skip
    for case in cases:
        dtype = case.settings["dtype"]
        records = []
        for order in range(10_000):
            layer, site = divmod(order, 100)
            peaks = tuple(2.0 ** random.uniform(0, 17) for _ in range(64))
            counts = tuple(random.randrange(1000) for _ in range(20))
            made = Record(
                order=order, step=0, site=f"layers.{layer}/mul.{site}", label=f"site {site}", module=f"layers.{layer}",
                operator="mul", layer=layer, dtype=dtype, shape=(1, 64, 640), stored_dtype="float16", elements=40_960,
                masked=0, nan=0, positive_inf=0, negative_inf=0, zero=0, subnormal=0, amax=max(peaks), smallest=0.5,
                minimum=-1.0, maximum=max(peaks), mean=0.0, rms=1.0, exponent_first=-2, exponents=counts, formats={},
                amax_row=0, amax_position=peaks.index(max(peaks)), amax_channel=0, position_amax=peaks, positions=64,
                channels=640,
            )  # fmt: skip
            records.append(made)
        header = Header(
            checkpoint="made up", sha256=None, dtype=dtype, device="cpu", level="operators", matmul="native",
            formats=(), rows=1, tokens=None, starts=(0,),
        )  # fmt: skip
        Recording(header, records).save(results.path(case))
    return results


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a process printed, how long it took, and the most memory that it held, mapped pages included, in GiB."""

    output: str
    seconds: float
    peak: float


WATCHED = """
import atexit, runpy, sys
from pathlib import Path
def tell(path=sys.argv[1]):
    status = Path("/proc/self/status")
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.exists() else {}
    Path(path).write_text(fields.get("VmHWM", "nan kB").split()[0])
atexit.register(tell)
del sys.argv[:2]
if sys.argv[0] == "-c":
    exec(sys.argv[1])
else:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""  # the system's own count for a child begins with what its parent had


def said(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Said:
    """Runs Python with these arguments, a module's or those of `-c`."""
    with tempfile.TemporaryDirectory() as folder:
        peak = Path(folder) / "peak"
        began = time.perf_counter()
        run = [sys.executable, "-c", WATCHED, str(peak), *command]
        done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        return Said(output=done.stdout, seconds=seconds, peak=float(peak.read_text()) / 2**20)


CONTEXT = """
import json, time, torch
import stabilitykit as sk
model = sk.load("gemma3-270m")
tokens = torch.tensor([[2] + [(7 * i) % 50000 + 300 for i in range(model.config.context - 1)]])
began = time.perf_counter()
with torch.no_grad(), sk.record(model) as recording:
    model(tokens, last_only=True)
print(json.dumps([time.perf_counter() - began, len(recording), sum(record.elements for record in recording)]))
"""


def context_rows() -> Iterator[Row]:
    done = said(["-c", CONTEXT])
    spent, sites, elements = json.loads(done.output)
    detail = f"{sites:,} tensors, {elements / 1e9:,.0f} billion elements"
    yield Row(
        what="32,768 tokens, recording operators: time",
        measured=spent / 60,
        unit="min",
        target=15,
        stretch=6,
        detail=detail,
    )
    yield Row(
        what="32,768 tokens, recording operators: peak memory", measured=done.peak, unit="GiB", target=8, stretch=4
    )


def large_rows(folder: Path) -> Iterator[Row]:
    """A checkpoint of 7B's shape in bfloat16, written to `folder` unless it is there, and streamed."""
    if not (folder / "config.json").exists():
        write_large(folder, RELEASED[LARGE])
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    command = ["stabilitykit", "profile", str(folder), "--prompt", "The capital of France is", "--dtype", "float16"]
    done = said([*command, "--stream", "--json"])
    yield Row(
        what="profile of a 7B-shaped checkpoint: peak memory",
        measured=done.peak,
        unit="GiB",
        target=4,
        stretch=2,
        detail=f"{stored / 1e9:.0f} GB of bfloat16 safetensors, run in float16, in {done.seconds / 60:.1f} min",
    )


def write_large(folder: Path, config: GemmaConfig) -> None:
    """Random bits of a plausible size, the same block again and again: only their bytes matter here."""
    folder.mkdir(parents=True, exist_ok=True)
    block = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    shapes = {f"model.{name}": shape for name, shape in parameter_shapes(config).items()}
    shards: list[list[str]] = [[]]
    for name in shapes:
        if sum(math.prod(shapes[other]) for other in shards[-1]) > 2e9:
            shards.append([])
        shards[-1].append(name)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            begin, end = end, end + 2 * math.prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                left = math.prod(shapes[name])
                scale = 0.1 if len(shapes[name]) == 1 else shapes[name][1] ** -0.5
                scaled = (block * scale).view(torch.int16).numpy()
                while left:
                    scaled[: min(left, len(scaled))].tofile(out)
                    left -= min(left, len(scaled))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    opened = sk.open_checkpoint(f"random:{LARGE}?layers=1&hidden_size=8&feed_forward=8&heads=1&kv_heads=1&head_dim=4")
    from stabilitykit.checkpoints.vocabulary import serialised

    (folder / "tokenizer.model").write_bytes(serialised(opened.vocabulary))
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "gemma",
                "vocab_size": config.vocabulary,
                "hidden_size": config.hidden_size,
                "intermediate_size": config.feed_forward,
                "num_hidden_layers": config.layers,
                "head_dim": config.head_dim,
                "num_attention_heads": config.heads,
                "num_key_value_heads": config.kv_heads,
                "max_position_embeddings": config.context,
            }
        )
    )


def cuda_rows(rounds: int) -> Iterator[Row]:
    """A random model of 7B's shape in float16: a prompt of 2,048 tokens, and one more token after it."""
    device = torch.device("cuda")
    config = RELEASED[LARGE]
    torch.manual_seed(0)
    with device:
        model = Gemma(config).half().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.1 if parameter.ndim == 1 else parameter.shape[1] ** -0.5)
    prompt = torch.randint(300, 50_000, (1, 2048), device=device)
    cache = KVCache(config, batch=1, length=2049, dtype=torch.float16, device=device)
    with torch.no_grad():
        model(prompt, cache=cache, last_only=True)

    def run(ids: torch.Tensor, how: Mapping[str, Any] | None, kept: KVCache | None = None) -> None:
        if kept is not None:
            kept._held = 2048  # the same token again and again
        if how is None:
            with torch.no_grad():
                model(ids, cache=kept, last_only=True)
        else:
            recorded(model, ids, how, {"cache": kept, "last_only": True})
        torch.cuda.synchronize()

    for what, ids, kept, target in (
        ("prefill, 2,048 tokens", prompt, None, 1.05),
        ("decode, one token after 2,048", prompt[:, :1], cache, None),
    ):
        seconds = taking_turns(
            {
                "bare": partial(run, ids, None, kept),
                "modules": partial(run, ids, {"level": "modules"}, kept),
                "operators": partial(run, ids, {}, kept),
            },
            rounds,
        )
        for name in ("modules", "operators"):
            yield Row(
                what=f"recording {name}, {what}",
                measured=seconds[name] / seconds["bare"],
                unit="× bare",
                target=target if name == "operators" else None,
                detail=f"{torch.cuda.get_device_name()}; bare {seconds['bare'] * 1e3:.1f} ms",
                bar=True,
            )
    with no_waits(model):
        run(prompt, {})
    yield Row(what="waits for the device, first layer to last", measured=0, unit="", target=0)


@contextmanager
def no_waits(model: Gemma) -> Iterator[None]:
    """Any wait for the device between the first layer and the last raises."""
    handles = [
        model.layers[0].register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error")),
        model.layers[-1].register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default")),
    ]
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
        for handle in handles:
            handle.remove()


def machine() -> dict[str, str]:
    return {
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def sections(rows: Sequence[Row], sites: Sequence[str]) -> list[Section]:
    promised = [row for row in rows if row.target is not None]
    missed = [row for row in promised if row.met == "no"]
    summary = f"Of {len(promised)} targets {len(promised) - len(missed)} are met."
    if missed:
        summary += " Missed: " + "; ".join(f"{row.what} ({row.measured:.3g} {row.unit})" for row in missed) + "."
    columns = [Column(name) for name in ("what", "measured", "unit", "target", "stretch", "target met", "")]
    table = Table(
        name="overhead",
        title="What was measured",
        columns=[Column(c.name, format=lambda x: f"{x:.3g}") for c in columns],
        rows=[(r.what, r.measured, r.unit, r.target, r.stretch, r.met, r.detail) for r in rows],
        note="Targets are the most that a figure should be. × bare: as many times the pass that nobody watches.",
    )
    bars = [row for row in rows if row.bar]
    figure = Figure(
        name="ratios",
        title="A recorded pass against one that nobody watches",
        caption="Each bar is a median of runs that took turns; diamonds are targets. 1 is a pass that costs nothing.",
        alt="; ".join(f"{row.what}: {row.measured:.2f} times bare" for row in bars),
        draw=lambda figure: draw(figure, bars),
        size=(8.0, 0.8 + 0.32 * len(bars)),
    )
    about = [(name, value) for name, value in machine().items()]
    return [
        Section(
            key="overhead",
            title="What recording costs",
            opening="Times on one machine say little about another; their ratios say more. Gemma 3 270M, dequantised "
            "from Q4_K_M, float32 unless said otherwise, logits of the last position.",
            blocks=[Prose(summary), *([figure] if bars else []), table],
        ),
        Section(
            key="machine",
            title="Machine",
            opening="What the numbers were measured on, and how to measure them again.",
            blocks=[
                Prose("To make this again: `python experiments/overhead.py`"),
                Table(name="machine", title="Machine", columns=[Column("what"), Column("value")], rows=about),
            ],
        ),
        *(
            [
                Section(
                    key="sites",
                    title="Recorded sites",
                    opening="Every tensor that a recording of operators measures in one pass, in order of execution.",
                    blocks=[
                        Table(
                            name="sites",
                            title=f"{len(sites):,} sites",
                            columns=[Column("order"), Column("site")],
                            rows=list(enumerate(sites)),
                        )
                    ],
                )
            ]
            if sites
            else []
        ),
    ]


def draw(figure: "matplotlib.figure.Figure", rows: Sequence[Row]) -> list[Hover]:
    axes = figure.subplots()
    axes.set_xscale("log")
    hovers = []
    for level, row in enumerate(rows):
        ours = "recording" in row.what
        axes.barh(level, row.measured - 1, left=1, height=0.6, color=BLUE if ours else VERMILLION)
        axes.text(max(row.measured, 1) * 1.03, level, f"{row.measured:.2f}×", va="center", fontsize=8)
        if row.target is not None:
            axes.plot(row.target, level, marker="D", color=INK, markersize=5)
        hovers.append(Hover(left=1, right=max(row.measured, 1.01), bottom=level - 0.4, top=level + 0.4, text=row.what))
    ticks = [1, 1.2, 1.5, 2, 3, 5, 10, 15]
    axes.set_xlim(0.97, max(20, *(1.3 * row.measured for row in rows)))
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(rows)), [row.what for row in rows])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("time ÷ bare forward pass (logarithmic)")
    return hovers


def parts(names: Sequence[str], rounds: int, large: Path) -> Iterator[tuple[str, Iterator[Row]]]:
    if "cuda" in names:
        yield "cuda", cuda_rows(rounds)
        return
    model = sk.load(CHECKPOINT)
    assert model.tokenizer is not None
    tokens = tokens_of(parse_prompt("prose", ROOT / "experiments"), model.tokenizer, bos=True, length=2048)
    every = {
        "recording": lambda: recording_rows(model, tokens, rounds),
        "growth": lambda: growth_rows(model, tokens, max(1, rounds // 2)),
        "products": lambda: product_rows(tokens, rounds),
        "peers": lambda: peer_rows(tokens, rounds),
        "guarding": lambda: guarding_rows(model, tokens, rounds),
        "start": start_rows,
        "check": check_rows,
        "report": report_rows,
        "explorer": explorer_rows,
        "context": context_rows,
        "large": lambda: large_rows(large),
    }
    for name in PARTS:
        if name in names:
            yield name, every[name]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=(*PARTS, "cuda", []), help="all but cuda if not given")
    parser.add_argument("--rounds", type=int, default=9, help="runs of which the median counts")
    parser.add_argument("--large", type=Path, help="where the 17 GB of the last part are, or shall be written and left")
    parser.add_argument("--out", type=Path, help="reports/overhead, or reports/overhead_cuda, if not given")
    given = parser.parse_args()
    names = given.parts or PARTS
    out = given.out or ROOT / "reports" / ("overhead_cuda" if "cuda" in names else "overhead")
    kept = out / "overhead.json"
    document: dict[str, Any] = {"machine": machine(), "parts": {}}
    if kept.exists():
        document = json.loads(kept.read_text(encoding="utf-8"))
        if document["machine"] != machine():
            raise SystemExit(f"{kept} was measured on another machine: choose another folder with --out.")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, measured in parts(names, given.rounds, given.large or Path(scratch) / LARGE):
            found = []
            for row in measured:
                print(f"{row.what}: {row.measured:.3g} {row.unit}, {row.met or '-'}", file=sys.stderr, flush=True)
                found.append(asdict(row))
            document["parts"][name] = found
            kept.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = [Row(**row) for name in (*PARTS, "cuda") for row in document["parts"].get(name, ())]
    page = write_report("What recording costs", sections(rows, recorded_sites() if "cuda" not in names else []), out)
    width = max(len(row.what) for row in rows)
    print(f"{'':{width}}  {'measured':>14} {'target':>8}  target met")
    for row in rows:
        target = "" if row.target is None else f"{row.target:.3g}"
        print(f"{row.what:{width}}  {row.measured:>7.3g} {row.unit:<6} {target:>8}  {row.met or ''}")
    print(page)


def recorded_sites() -> list[str]:
    model = sk.load(CHECKPOINT)
    found = recorded(model, torch.tensor([[2, 651]]), {}, {"last_only": True})
    return [record.site for record in found]


if __name__ == "__main__":
    main()
