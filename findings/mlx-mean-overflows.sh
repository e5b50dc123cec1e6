#!/usr/bin/env bash
# MLX 0.32.4 on an x86-64 CPU, mean, var and std of float16 arrays.
#
# Guess: as in torch and in numpy the mean of float16 numbers is made from a float32 sum and rounded once: the mean of 4,096
# times 40 is 40, and squares in a hand-written RMS norm are the only thing to look after.
# Seen: sum, and mean which divides it, are kept in float16: the mean of 4,096 times 40 is inf. So is the variance of
# 4,096 numbers from N(0, 100²), which is 9,667 and fits. Where nothing overflows, the mean of 60,000 ones is 1.00098.
# mlx.fast.rms_norm and mlx.fast.layer_norm are right on the same numbers.
#
# Who meets it: pooling over tokens, norms and losses written out with mean, statistics of activations.
# Way out: a cast to float32 before the reduction, or the functions of mlx.fast.
# Exit code 0 while this is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "mlx[cpu]==0.32.4" "numpy==2.4.6" 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import math
import sys

import mlx.core as mx
import numpy as np

forties = np.full(4096, 40.0, np.float16)
drawn = (np.random.RandomState(0).randn(4096) * 100).astype(np.float16)
norm = mx.fast.rms_norm(mx.full((1, 4096), 300.0, dtype=mx.float16), mx.ones(4096, dtype=mx.float16), 1e-6)
found = {
    "mean of 4,096 times 40": (float(mx.mean(mx.array(forties))), float(forties.mean())),
    "var of 4,096 from N(0, 100²)": (float(mx.var(mx.array(drawn))), float(drawn.astype(np.float32).var())),
    "mean of 60,000 ones": (float(mx.mean(mx.ones((60000,), dtype=mx.float16))), 1.0),
    "rms_norm of 4,096 times 300": (float(norm[0, 0]), 1.0),
}
for what, (own, true) in found.items():
    print(f"{what}: {own:g}, in truth {true:g}")
own = [value for value, _ in found.values()]
sys.exit(0 if own[:2] == [math.inf, math.inf] and abs(own[2] - 1.000976) < 1e-4 and own[3] == 1 else 1)
PY
