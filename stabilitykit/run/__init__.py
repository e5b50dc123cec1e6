"""One case: a model and a prompt, run and recorded."""
