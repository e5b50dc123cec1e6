"""One reading of a tensor: numba's machine code on a CPU, Triton's on CUDA, torch's own operators everywhere else."""
