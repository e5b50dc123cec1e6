"""The command line: one file per command. Torch is imported by the commands, not by `--help`."""

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from stabilitykit.cli.bound import bound
from stabilitykit.cli.check import check
from stabilitykit.cli.diagnose import diagnose
from stabilitykit.cli.forecast import forecast
from stabilitykit.cli.options import Advised
from stabilitykit.cli.profile import profile
from stabilitykit.cli.repair import repair
from stabilitykit.cli.report import report
from stabilitykit.cli.reproduce import reproduce
from stabilitykit.cli.search import search
from stabilitykit.cli.sweep import sweep
from stabilitykit.cli.verify import verify
from stabilitykit.errors import MisuseError, StabilityKitError

app = typer.Typer(
    help="Find where, and why, Gemma leaves float16's range.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (profile, diagnose, forecast, bound, search, repair, verify, check, reproduce, sweep, report):
    app.command(cls=Advised)(command)


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if show_version:
        print(version("stabilitykit"))
        raise typer.Exit


def main() -> None:
    """Runs a command. The kit's own errors become one sentence on standard error and exit code 2 (misuse) or 1."""
    try:
        app()
    except StabilityKitError as error:
        print(f"stabilitykit: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, MisuseError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
