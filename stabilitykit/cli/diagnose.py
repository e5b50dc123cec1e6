"""`stabilitykit diagnose`: run a failing input again, and try on it what may help."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import stabilitykit.cli.options as options
from stabilitykit.errors import MisuseError

if TYPE_CHECKING:
    from stabilitykit.records.training import TrainingDiagnosis
    from stabilitykit.records.trials import Diagnosis
    from stabilitykit.run.batch import Asked
    from stabilitykit.run.case import Progress
    from stabilitykit.run.inputs import Tensors
    from stabilitykit.trials.prompts import Fed, Prompted


def diagnose(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="A checkpoint, as profile takes it: gemma3-270m, a folder, a file, random:SIZE, hf:FOLDER or hf:NAME. "
            "Or a Python file and a function in it, make(dtype), which returns (model, kwargs).",
            show_default=False,
        ),
    ],
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Text to run, or @FILE: a text in UTF-8, chats (.json, .jsonl) or, with hf:, the tensors that the "
            "model takes (.safetensors, .npz, .pt).",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        Path | None,
        typer.Option(help="JSON Lines: one prompt, or messages of a chat, a line, run together.", show_default=False),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype that fails: float16, bfloat16 or float32.")] = "float16",
    generate: Annotated[int, typer.Option(min=1, help="Tokens to generate, each a step of its own.")] = 1,
    minimise: Annotated[
        bool, typer.Option("--minimise", help="Diagnose the shortest part of the input that fails alike.")
    ] = False,
    backward: Annotated[
        bool,
        typer.Option(
            "--backward", help="Diagnose a training step: make returns (model, kwargs, loss, optimizer), loss(output)."
        ),
    ] = False,
    loss_scale: Annotated[
        float | None,
        typer.Option(
            min=1.0, help="With --backward: what the loss is multiplied by; 65,536 unless given.", show_default=False
        ),
    ] = None,
    clip: Annotated[
        float | None,
        typer.Option(min=0.0, help="With --backward: the norm to which gradients are clipped.", show_default=False),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Sampling temperature (0 = greedy).")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling.")] = 0,
    no_bos: options.NoBos = False,
    chat: options.Chat = False,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens", help="Read control tokens written in a prompt as tokens.")
    ] = False,
    rescale: options.Rescale = 1.0,
    attention: options.AttentionName = None,
    adapter: options.Adapter = None,
    trust_remote_code: options.TrustRemoteCode = False,
    matmul: Annotated[
        str | None,
        typer.Option(
            help="How 16-bit products are summed; float32-accumulate on a CPU unless given.", show_default=False
        ),
    ] = None,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Run an input that fails, and try on it what may help: other dtypes, then every change that fits what broke.

    Says of each change whether it cures the failure, how far it is from float32, and what does it. Exits 0 whatever was
    found.
    """
    from stabilitykit.cli import screen
    from stabilitykit.records.document import to_document
    from stabilitykit.records.training import LOSS_SCALE

    if not (0 <= temperature < math.inf):
        raise MisuseError(f"--temperature must be 0 (greedy) or a positive number, got {temperature}.")
    is_file = ".py:" in what or what.endswith(".py")
    if backward and not is_file:
        raise MisuseError("--backward diagnoses a training step, which only FILE.py:make describes.")
    if not backward and (loss_scale is not None or clip is not None):
        raise MisuseError("--loss-scale and --clip belong to a training step; add --backward.")
    if is_file and (prompt is not None or batch is not None):
        raise MisuseError("FILE.py:make brings its own input; leave out --prompt and --batch.")
    found: Diagnosis | TrainingDiagnosis
    with screen.progress_bar() as progress:
        if is_file:
            found = _of_file(
                what,
                dtype,
                matmul=matmul,
                minimise=minimise,
                training=(LOSS_SCALE if loss_scale is None else loss_scale, clip) if backward else None,
                progress=progress,
            )
        else:
            from stabilitykit.models.subject import Sampling
            from stabilitykit.run.inputs import Tensors
            from stabilitykit.trials.diagnose import of_reproduction
            from stabilitykit.trials.prompts import fed, prompted

            asked = _asked(prompt, batch, chat)
            how: dict[str, Any] = {
                "dtype": dtype,
                "matmul": matmul,
                "progress": progress,
                "rescale": rescale,
                "attention": attention,
                "adapter": adapter,
                "trust_remote_code": trust_remote_code,
                "device": device,
            }
            opened: Prompted | Fed
            if isinstance(asked, Tensors):
                if generate > 1:
                    raise MisuseError("Tensors are run in one pass, as they are; leave out --generate.")
                opened = fed(what, asked, **how)
            else:
                opened = prompted(
                    what,
                    asked,
                    new_tokens=generate,
                    sampling=Sampling(temperature=temperature or None, seed=seed),
                    bos=not no_bos,
                    special_tokens=special_tokens,
                    **how,
                )
            found = of_reproduction(opened, minimise=minimise, command=options.command_line(), progress=progress)
    if as_json:
        screen.print_json(to_document(found))
        return
    screen.print_diagnosis(found)


def _asked(prompt: str | None, batch: Path | None, chat: bool) -> "list[Asked] | Tensors":
    """Rows of text that run together, or the tensors of one call."""
    from dataclasses import replace

    from stabilitykit.run.batch import read_batch
    from stabilitykit.run.inputs import Tensors, Text, read_prompt

    if (prompt is None) == (batch is None):
        raise MisuseError("Give the input with either --prompt TEXT or --batch FILE.")
    if batch is not None:
        asked = read_batch(batch)
    else:
        found = read_prompt(str(prompt))
        if isinstance(found[0], Tensors):
            if chat:
                raise MisuseError(f"{found[0].name} holds tensors, and a chat is made of text; leave out --chat.")
            return found[0]
        asked = [one.asked for one in found if isinstance(one, Text)]
    return [replace(one, chat=True) for one in asked] if chat else asked


def _of_file(
    what: str,
    dtype: str,
    *,
    matmul: str | None,
    minimise: bool,
    training: tuple[float, float | None] | None,
    progress: "Progress",
) -> "Diagnosis | TrainingDiagnosis":
    """`training` is the loss scale and the norm to clip gradients to, of a training step."""
    from stabilitykit.trials.diagnose import of_reproduction
    from stabilitykit.trials.file import FromFile, UserFunction
    from stabilitykit.trials.training import diagnose_training

    if training is not None:
        loss_scale, clip = training
        make = UserFunction.load(what)
        return diagnose_training(make, dtype=dtype, loss_scale=loss_scale, clip=clip, source=what, progress=progress)
    made = FromFile.load(what, dtype, matmul)
    return of_reproduction(made, minimise=minimise, command=options.command_line(), progress=progress)
