"""The operator that broke, alone: its operands are kept, cut to the few that break it, and written with a script."""
