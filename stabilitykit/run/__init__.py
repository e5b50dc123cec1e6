"""Running a model on purpose: one case, one checkpoint over several dtypes, and failures on demand."""
