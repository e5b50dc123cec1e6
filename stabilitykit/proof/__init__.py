"""proof.json: how it is written, and a checker that shares nothing with whatever made the folder it lies in."""
