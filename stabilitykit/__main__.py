"""`python -m stabilitykit` is the command line."""

from stabilitykit.cli import main

main()
