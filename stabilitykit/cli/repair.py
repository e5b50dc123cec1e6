"""`stabilitykit repair`: rank what keeps a model finite in float16, and write one that is."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

import stabilitykit.cli.options as options
from stabilitykit.choices import ExportDtype
from stabilitykit.commands import folder_for, line


def repair(
    checkpoint: options.Checkpoint,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the repaired model, which plain transformers loads.")
    ] = None,
    dtype: Annotated[
        ExportDtype, typer.Option(help="Dtype in which the weights are written; either runs in float16.")
    ] = "float16",
    margin: Annotated[
        float, typer.Option(min=0.0, help="Bits of headroom to leave above the largest magnitude seen.")
    ] = 1.0,
    approximate: Annotated[
        bool,
        typer.Option(
            "--approximate",
            help="Where no exact scaling exists, take one that changes the outputs a little, and say by how much.",
        ),
    ] = False,
    proved: Annotated[
        bool,
        typer.Option(
            "--proved",
            help="Choose by bounds from the weights, so that no prompt of any length overflows (Gemma 1 to 3).",
        ),
    ] = False,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            help="File on which the repaired model must stay finite: a text, chats (.json, .jsonl), tensors "
            "(.safetensors, .npz, .pt), or a folder of them; repeatable. Not used for ranking.",
            show_default=False,
        ),
    ] = None,
    no_bos: Annotated[bool, typer.Option("--no-bos", help="Start the --prompts without <bos>.")] = False,
    inputs: Annotated[
        list[Path] | None,
        typer.Option(
            help="File of what the model's forward takes, by name (.safetensors, .npz, .pt), for models that read no "
            "text; repeatable. The first chooses the scaling, the others rank.",
            show_default=False,
        ),
    ] = None,
    no_ranking: Annotated[
        bool, typer.Option("--no-ranking", help="Only find the scaling, and with --out write and check it.")
    ] = False,
    ranking_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Rank on about so many held-out tokens; 4,608 if not given.", show_default=False),
    ] = None,
    report: options.Report = None,
    adapter: options.Adapter = None,
    trust_remote_code: options.TrustRemoteCode = False,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Rank what keeps a model finite in float16 on held-out texts, and with --out write a repaired one.

    The repair multiplies weights and settings by powers of two: float32 logits keep every bit, and float16 holds what
    it could not. It works on the kit's own Gemma and, with hf:, on whatever transformers runs.

    Exits 0 when the repaired model is finite on all texts, 1 when it is not and nothing was written.
    """
    from stabilitykit.cli import screen
    from stabilitykit.cli.report import check_report, conclude
    from stabilitykit.files import check_new
    from stabilitykit.models.devices import parse_device
    from stabilitykit.remedies.repair import open_original
    from stabilitykit.remedies.repair import repair as run

    place = str(parse_device(device))
    if out is not None:
        check_new(out)
    with screen.progress_bar() as progress:
        opened = open_original(
            checkpoint, device=place, adapter=adapter, trust_remote_code=trust_remote_code, progress=progress
        )
        check_report(report, opened)
        found = run(
            opened,
            prompts=prompts or (),
            bos=not no_bos,
            inputs=inputs or (),
            margin=margin,
            proved=proved,
            approximate=approximate,
            ranking=not no_ranking,
            ranking_tokens=ranking_tokens,
            out=out,
            dtype=dtype,
            device=device,
            command=options.command_line(),
            progress=progress,
        )
    conclude(
        opened,
        found.ranking,
        report=report,
        title=f"What keeps {Path(opened.source).name} finite in float16",
        section="remedies",
        as_json=as_json,
        config=opened.settings,
        show=lambda: screen.print_ranking(found.ranking),
        out=("Repaired model", out if found.finite else None),
    )
    if not found.finite:
        raise typer.Exit(1)
    if as_json:
        return
    if out is not None:
        screen.print_command("To check it again", line("verify", out))
    elif found.ranking.change.moved:
        screen.print_command("To write it", f"{options.command_line()} {shlex.join(['--out', folder_for(checkpoint)])}")
