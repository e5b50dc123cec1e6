"""An experiment that nobody wrote: its file, with comments, from a checkpoint, prompts, dtypes and lengths."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from stabilitykit.commands import line
from stabilitykit.errors import MisuseError
from stabilitykit.run.prompts import KINDS
from stabilitykit.sweeps.axes import LENGTHS

PROMPTS = ("prose",)
DTYPES = ("float16", "float32")

_FILE = """\
# Every value of an axis runs with every value of the others.
#
#     {dry}    lists the cases and what they cost
#     {run}    runs those that are missing, and writes the report

title = {title}
checkpoint = {checkpoint}
# device = "cuda"                 # cpu if left out

[[grid]]
# Of the kit: "prose", "code", "scripts", "digits", "repeat", "word: TEXT" or "text: TEXT". Of your own: "@FILE" for a
# text in UTF-8, "@FOLDER" for those in it that end in .txt or .md, "@texts/*.txt" for those that a pattern matches.
prompt = {prompt}
# float16, bfloat16, float32 or float64. The others are compared with float32 where it is here.
dtype = {dtype}
# {lengths}.
# A length that a text does not reach is skipped, with a note.
length = {length}
# bos = [true, false]             # with and without <bos>
# rescale = 4.0                   # a power of two by which to stress the model until it overflows
# level = "operators"             # or "modules" or "layers": less is recorded

# [lengths]
# checks = [1, 16]                # lengths of a range to run again directly, beside those that always are

# [[memory]]                      # the peak memory of a fresh process
# dtype = ["float16", "float32"]
# length = 128

# [report]
# format = "float16"              # the number format that values are judged by
"""


def experiment_text(
    name: str,
    checkpoint: str,
    *,
    prompts: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    lengths: Sequence[int | str] = (),
) -> str:
    """The text of a TOML file called `name`; what is not given is prose, in float16 and float32, up to 512 tokens.

    Nothing is checked: that is done when it is read.
    """
    return _FILE.format(
        dry=line("sweep", name, "--dry-run"),
        run=line("sweep", name),
        title=_toml([f"Where {title_of(checkpoint)} leaves a dtype's range"]),
        checkpoint=_toml([checkpoint]),
        prompt=_toml(prompts or PROMPTS),
        dtype=_toml(dtypes or DTYPES),
        lengths=f"{LENGTHS[0].upper()}{LENGTHS[1:]}",
        length=_toml(lengths or ("up to 512",)),
    )


def title_of(checkpoint: str) -> str:
    """What a checkpoint is called in a title and in the name of a folder: the last part of its path, or of its name."""
    return Path(checkpoint.partition("?")[0].rpartition(":")[2].rstrip("/")).name or checkpoint


def as_prompt(given: str, folder: Path) -> str:
    """What `--prompts` names, as a prompt of an experiment in `folder`: a text of the kit's own as it is, and a file,
    a folder or a pattern as `@...`. A relative path is one from where the command runs.

    Raises MisuseError for a name that is not Unicode.
    """
    try:
        given.encode()
    except UnicodeEncodeError:
        raise MisuseError(f"An experiment's file is UTF-8, and the name {given!r} is not; rename it.") from None
    if given.startswith("@") or given.partition(":")[0] in KINDS:
        return given
    return f"@{given if Path(given).is_absolute() else os.path.relpath(given, folder)}"


def as_length(given: str) -> int | str:
    """What `--length` gives, as a value of the axis."""
    return int(given) if given.isdecimal() else given


def _toml(values: Sequence[int | str]) -> str:
    """TOML's strings and arrays of them are those of JSON, but for what JSON leaves as it is and TOML does not."""
    told = [json.dumps(one, ensure_ascii=False).replace("\x7f", "\\u007f") for one in values]
    return told[0] if len(told) == 1 else f"[{', '.join(told)}]"
