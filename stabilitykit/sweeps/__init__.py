"""Many cases: an experiment file, its cases, and the process that runs them."""
