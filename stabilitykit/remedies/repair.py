"""A repair: a scaling chosen by measured peaks, every remedy ranked on other inputs."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import torch

from stabilitykit.checkpoints import Checkpoint
from stabilitykit.choices import Attention, ExportDtype, check_choice
from stabilitykit.errors import MisuseError
from stabilitykit.files import check_new
from stabilitykit.models.devices import parse_device
from stabilitykit.models.machine import provenance_of
from stabilitykit.models.subject import Subject
from stabilitykit.models.transformers.backend import PREFIX
from stabilitykit.records.remedies import Change, Ranking, Score
from stabilitykit.records.scaling import UNCHANGED, Scaling
from stabilitykit.remedies import REMEDIES
from stabilitykit.remedies.change import change_of, small
from stabilitykit.remedies.choose import Choice, choose
from stabilitykit.remedies.export import export
from stabilitykit.remedies.float32_residual import FLOAT32_RESIDUAL
from stabilitykit.remedies.original import GemmaOriginal, HuggingFaceOriginal, Original
from stabilitykit.remedies.proved import prove
from stabilitykit.remedies.ranking import rank
from stabilitykit.remedies.remedy import LeftOut, Remedy
from stabilitykit.remedies.repaired import Repair
from stabilitykit.remedies.samples import Samples, answer, samples_for
from stabilitykit.remedies.seen import look
from stabilitykit.run.case import Progress, stage
from stabilitykit.run.source import checkpoint_of

PLAIN = Remedy(name="float16", summary="Plain float16, as it is.")


def repair(
    checkpoint: str | Path | Checkpoint | Original,
    samples: Samples | None = None,
    *,
    prompts: Sequence[str | Path] = (),
    bos: bool = True,
    inputs: Sequence[str | Path] = (),
    margin: float = 1.0,
    proved: bool = False,
    approximate: bool = False,
    ranking: bool = True,
    ranking_tokens: int | None = None,
    out: str | Path | None = None,
    dtype: ExportDtype = "float16",
    device: str = "cpu",
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
) -> Repair:
    """Scales a model by powers of two so that float16 holds it, and ranks that and other remedies on held-out inputs.

    Weights and settings of the config are multiplied so that the model computes the same function: float32 logits keep
    every bit.

    Args:
        checkpoint: what `open_checkpoint` takes or returned, for the kit's own Gemma; `hf:FOLDER` or `hf:NAME` for
            whatever transformers runs.
        samples: the inputs that choose the scaling and those that rank; windows of the kit's own texts unless given.
        prompts: more files, or folders of them, whose texts, chats or tensors have to stay finite; they choose the
            scaling and rank nothing.
        bos: `prompts` begin with <bos>.
        inputs: files of tensors by the names of the model's arguments (.safetensors, .npz, .pt), in place of texts. The
            first chooses, the others rank; one alone does both.
        margin: bits of headroom to leave above the largest magnitude seen, at least 0. Where they cannot be had, as
            many as can are left, and `shortfall` says how many are missing.
        proved: of Gemma 1, 2 and 3: choose by bounds from the weights instead, so that no prompt of any length
            overflows.
        approximate: where no exact scaling keeps the model finite, take one that changes what it computes a little, and
            say by how much.
        ranking: rank remedies; without it only the scaling is found, and `finite` is what float32 showed.
        ranking_tokens: rank on about so many tokens instead of 4,608.
        out: a new folder for the repaired model, which plain transformers loads. It is written only where the result is
            `finite`.
        dtype: in which the folder's weights are written, float16 or float32; both run in float16.
        device: cpu, cuda or mps.
        adapter: of `hf:` models, the folder of an adapter that peft reads, such as a LoRA.
        trust_remote_code: run Python code that an `hf:` folder brings.
        command: the command line to name in the result, if there was one.
        progress: called with (what is being done, how much of it is done, out of how much).

    Returns:
        A Repair: `ranking` with a score for each remedy, the best first; `finite` says whether the repaired model is.

    Raises:
        MisuseError: for a folder that exists already, a file that cannot be read, a model that reads no text and is
            given no `inputs`, options that contradict each other, and where no proved repair exists.
        CheckpointError: for a checkpoint that is damaged, or is not what it was taken for.

    >>> tiny = "random:gemma2-2b?layers=2&hidden_size=32&feed_forward=64&heads=4&head_dim=8&vocabulary=512&context=32"
    >>> found = repair(tiny)
    >>> found.finite, found.ranking.change.moved  # nothing had to be changed
    (True, 0)
    """
    check_choice("dtype", dtype, get_args(ExportDtype))
    if margin < 0:
        raise MisuseError(f"margin must be at least 0 bits, got {margin:g}.")
    device = str(parse_device(device))
    if out is not None:
        check_new(Path(out))
        if find_spec("transformers") is None:
            raise MisuseError(
                "A repaired folder is loaded and compared by plain transformers before it gets its name, and that is "
                'not installed: pip install "stabilitykit[hf]", or leave out --out.'
            )
    if isinstance(checkpoint, str | Path | Checkpoint):
        original = open_original(
            checkpoint, device=device, adapter=adapter, trust_remote_code=trust_remote_code, progress=progress
        )
    else:
        original = checkpoint
    subject = original.open()
    if samples is None:
        samples = samples_for(
            subject,
            prompts=[Path(one) for one in prompts],
            bos=bos,
            inputs=[Path(one) for one in inputs],
            held_out=ranking_tokens,
        )
    found = _Repairing(original, subject, samples, margin, device, command, progress).run(
        proved=proved, approximate=approximate, ranking=ranking
    )
    if out is not None and found.finite:
        export(found, Path(out), dtype, progress=progress)
    return found


def open_original(
    checkpoint: str | Path | Checkpoint,
    *,
    device: str = "cpu",
    attention: Attention | None = "eager",
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Original:
    """The model to repair: transformers' where the name begins with `hf:`, else the kit's own Gemma.

    `attention` is eager unless given: it stores the scores, which fused attention does not, so that what fits there
    fits in both. Raises as `open_model` does.
    """
    name = str(checkpoint)
    if not isinstance(checkpoint, Checkpoint) and name.startswith(PREFIX):
        return HuggingFaceOriginal.of(
            name.removeprefix(PREFIX),
            device=device,
            attention=attention,
            adapter=adapter,
            trust_remote_code=trust_remote_code,
            progress=stage("reading weights", progress),
        )
    if adapter is not None or trust_remote_code:
        raise MisuseError(
            f"adapter and trust_remote_code apply to models that transformers runs; write hf: before {name}."
        )
    return GemmaOriginal(checkpoint_of(checkpoint, progress), device)


class _Repairing:
    """What the steps of a repair share."""

    def __init__(
        self,
        original: Original,
        subject: Subject,
        samples: Samples,
        margin: float,
        device: str,
        command: str | None,
        progress: Progress | None,
    ) -> None:
        self.original = original
        self.subject = subject
        self.samples = samples
        self.margin = margin
        self.device = device
        self.command = command
        self.progress = progress

    def run(self, *, proved: bool, approximate: bool, ranking: bool) -> Repair:
        """With `proved` the model to be carried is the one whose bounds say that no prompt makes it overflow; the one
        chosen by what was measured is ranked beside it.
        """
        proof = None
        if proved:
            if not isinstance(self.original, GemmaOriginal):
                raise MisuseError("Bounds are those of Gemma 1, 2 and 3 in the kit's own model; leave out --proved.")
            proof = prove(self.original.checkpoint, progress=self.progress)
        chosen = choose(self.original, self.subject, self.samples.choosing, self.margin, self.progress)
        remedies, left_out, islands = self.remedies() if ranking else ([], [], [])
        carried = self.carry(chosen, None if proof is None else proof.scaling, approximate, remedies)
        scores: list[Score] = []
        if ranking:
            scores, more = rank(
                self.original, remedies, self.samples.held_out, reference=self.subject, progress=self.progress
            )
            left_out += more
        (peak, site), (scaled_peak, scaled_site) = chosen.before, chosen.after
        if carried.scaling != chosen.exact:
            after = self.original.open("float32", carried.scaling)
            again = look(self.original, after, self.samples.choosing, stage("checking the choice", self.progress))
            scaled_peak, scaled_site = again.peak, again.site
        made = Ranking(
            margin=self.margin,
            peak=peak,
            site=site,
            scaled_peak=scaled_peak,
            scaled_site=scaled_site,
            scaling=carried.scaling,
            change=self.change(carried.scaling, chosen),
            islands=tuple(islands),
            carried=carried.name,
            scores=tuple(scores),
            shortfall=chosen.shortfall,
            obstacles=chosen.obstacles,
            left_out={one.name: one.why for one in left_out},
            measured=None if proof is None else small(self.original, self.subject, chosen.exact),
            **provenance_of(self.original, self.command, self.device),
        )
        return Repair(
            original=self.original,
            samples=self.samples,
            ranking=made,
            bounds=() if proof is None else proof.bounds,
        )

    def remedies(self) -> tuple[list[Remedy], list[LeftOut], list[str]]:
        """Those that apply, the plain run first, and those that do not; and the sites that overflow float16."""
        seen = look(self.original, self.subject, self.samples.choosing, stage("looking for overflows", self.progress))
        offers = [offer(seen) for offer in REMEDIES]
        apply = [PLAIN, *(one for one in offers if isinstance(one, Remedy))]
        return apply, [one for one in offers if isinstance(one, LeftOut)], sorted(seen.overflowing)

    def carry(self, chosen: Choice, proved: Scaling | None, approximate: bool, remedies: list[Remedy]) -> Remedy:
        """What a folder carries; adds all scalings to `remedies`."""
        carried = PLAIN
        if chosen.exact != UNCHANGED:
            carried = scaling_remedy(chosen.exact)
            remedies.append(carried)
            remedies += [carried + one for one in remedies if one.name == FLOAT32_RESIDUAL.name]
        if chosen.approximate is not None:
            nearly = approximate_remedy(chosen.approximate)
            remedies.append(nearly)
            carried = nearly if approximate else carried
        if proved is not None and proved != UNCHANGED:
            carried = scaling_remedy(proved, proved=True)
            remedies.append(carried)
        return carried

    def change(self, scaling: Scaling, chosen: Choice) -> Change:
        """What `scaling` does, and whether float32 keeps every bit of what it returned on the first choosing input."""
        counted = change_of(self.original, self.subject, scaling)
        streamed = isinstance(self.original, HuggingFaceOriginal) and self.original.is_streamed
        if scaling == UNCHANGED or (streamed and scaling == chosen.exact):  # what is written is compared bit by bit
            return replace(counted, residual=chosen.residual)
        announce = stage("comparing float32", self.progress)
        announce(0, 1)
        inputs = self.samples.choosing[0]
        scaled = self.original.open("float32", scaling).module
        with torch.inference_mode():
            before, after = (answer(module, inputs).values for module in (self.subject.module, scaled))
        far = float((after - before).abs().max() / before.abs().max()) if not torch.equal(after, before) else None
        residual = chosen.residual if scaling == chosen.exact else None
        return replace(counted, approximate=far, residual=residual)


def scaling_remedy(scaling: Scaling, *, proved: bool = False) -> Remedy:
    """A scaling as a remedy."""
    summary = "Multiplies weights and settings by powers of two: the same function, to the last bit in float32."
    if proved:
        summary += " Chosen from bounds, so that no prompt can make it overflow."
    return Remedy(name="scaling, proved" if proved else "scaling", summary=summary, scaling=scaling)


def approximate_remedy(scaling: Scaling) -> Remedy:
    return Remedy(
        name="approximate scaling",
        summary="Multiplies weights and settings by powers of two where no exact scaling fits: an eps that no setting "
        "can say, or a bound that never binds, stays as it is, so that what it returns changes a little.",
        scaling=scaling,
    )
