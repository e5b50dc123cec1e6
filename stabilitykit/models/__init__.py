"""What runs: the models, whoever wrote them, and what a run asks of one."""
