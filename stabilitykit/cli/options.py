"""The options that several commands have, each said once; and the command line itself."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from stabilitykit.choices import Attention, RoundingName
from stabilitykit.commands import Typed, typed

if TYPE_CHECKING:
    from typer._click.core import Command, Context

if TYPE_CHECKING:
    from stabilitykit.run.batch import Asked
    from stabilitykit.run.inputs import Tensors

BoundedCheckpoint = Annotated[
    str,
    typer.Argument(
        help="gemma3-270m (extra: demo), a Hugging Face folder of Gemma 1 to 3, a .gguf or .ckpt file, random:SIZE, or "
        "hf:FOLDER or hf:NAME (local cache) of a Gemma 1 to 4, Llama, Mistral, Qwen2 or Qwen3.",
        show_default=False,
    ),
]
Checkpoint = Annotated[
    str,
    typer.Argument(
        help="gemma3-270m (extra: demo), a Hugging Face folder, a .gguf or gemma_pytorch's .ckpt file, "
        "random:SIZE?layers=2&seed=0, or hf:FOLDER or hf:NAME to run transformers' own code (extra: hf).",
        show_default=False,
    ),
]
Prompt = Annotated[
    str,
    typer.Option(
        help="Text to run, or @FILE: a text in UTF-8, a chat (.json, a list of messages) or, with hf:, the tensors "
        "that the model takes (.safetensors, .npz, .pt).",
        show_default=False,
    ),
]
NoBos = Annotated[bool, typer.Option("--no-bos", help="Start the prompt without <bos>.")]
Chat = Annotated[
    bool, typer.Option("--chat", help="Wrap the prompt in Gemma's turn template, or in that of an hf: tokenizer.")
]
Device = Annotated[str, typer.Option(help="Device to run on: cpu, cuda or mps.")]
Rounding = Annotated[
    RoundingName, typer.Option(help="Implementation whose rounding points the kit's own model reproduces.")
]
Rescale = Annotated[
    float,
    typer.Option(
        "--stress",
        "--rescale",
        help="A power of two by which to scale what the embedding or the first projection writes, and all that follows "
        "with it; a large one makes float16 overflow. float32 logits keep every bit, of hf: models but for gains 1 + w "
        "that float32 rounds, which are counted.",
    ),
]
AttentionName = Annotated[
    Attention | None,
    typer.Option("--attention", help="Attention of hf: models; transformers' own choice if not given."),
]
Adapter = Annotated[
    Path | None, typer.Option(help="Folder of an adapter that peft reads, such as a LoRA, for hf: models.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run Python code that an hf: folder brings; it never runs without this option."
    ),
]
Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="Read each weight matrix when it is used; done anyway where the model does not fit in the free memory.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Redact = Annotated[bool, typer.Option("--redact", help="Keep the prompt and its tokens out of all output.")]
Report = Annotated[
    Path | None,
    typer.Option(
        help="Folder of a sweep, whose report gets a section on the result; or a new folder for a report of its own."
    ),
]


class Advised(TyperCommand):
    """A command whose findings advise in terms of what was typed."""

    def invoke(self, ctx: "Context") -> Any:
        """Runs the command."""
        given: dict[str, list[str]] = {}
        checkpoint = file = None
        for parameter in self.params:
            name, value = str(parameter.name), ctx.params.get(str(parameter.name))
            if value is None or str(getattr(ctx.get_parameter_source(name), "name", "")) != "COMMANDLINE":
                continue
            if name in ("checkpoint", "what"):
                is_file = name == "what" and (".py:" in value or value.endswith(".py"))
                checkpoint, file = (None, value) if is_file else (value, None)
            elif isinstance(parameter, TyperOption):
                values = value if isinstance(value, list | tuple) else [] if parameter.is_flag else [value]
                whole = (int(one) if isinstance(one, float) and one.is_integer() else one for one in values)
                given[parameter.opts[0]] = [str(one) for one in whole]
        commands: dict[str, Command] = getattr(ctx.parent and ctx.parent.command, "commands", {})
        known = {name: {word for one in command.params for word in one.opts} for name, command in commands.items()}
        with typed(Typed(checkpoint=checkpoint, file=file, options=given, known=known)):
            return super().invoke(ctx)


def command_line() -> str:
    """What the user typed, to be typed again."""
    return shlex.join(["stabilitykit", *sys.argv[1:]])


def one_prompt(prompt: str) -> "Asked | Tensors":
    """What --prompt stands for: a text, or the one text, chat or set of tensors that @FILE holds.

    Raises MisuseError for a file that cannot be read, and for one that holds several.
    """
    from stabilitykit.run.inputs import one_prompt as read

    return read(prompt)
