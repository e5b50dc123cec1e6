#!/usr/bin/env bash
# torch 2.13.0 on a CPU (with ml_dtypes 0.6.0 for comparison), Tensor.to(float8).
#
# Guess: one library has one rule for what is past a float8 format's maximum, and infinity never becomes finite.
# Seen: three rules. float8_e4m3fn saturates, and infinity itself becomes 448, a finite number; float8_e5m2 gives
# infinity; the fnuz formats give NaN. ml_dtypes makes NaN of the first of them from 465 on.
#
#     torch      500      1e30     inf      -inf
#     e4m3fn     448      448      448      -448
#     e5m2       512      inf      inf      -inf
#     e4m3fnuz   nan      nan      nan      nan
#     e5m2fnuz   512      nan      nan      nan
#     ml_dtypes e4m3fn: 500 is nan
#
# Who meets it: a check for inf or NaN after quantising to e4m3fn passes, and the overflow is gone from sight.
# Way out: look for non-finite and too large values before the cast, not after it.
# Exit code 0 while this is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "numpy==2.4.6" "ml_dtypes==0.6.0" 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import math

import ml_dtypes
import numpy as np
import torch

values = torch.tensor([500.0, 1e30, math.inf, -math.inf])
nan = math.nan
expected = {
    "float8_e4m3fn": [448, 448, 448, -448],
    "float8_e5m2": [512, math.inf, math.inf, -math.inf],
    "float8_e4m3fnuz": [nan, nan, nan, nan],
    "float8_e5m2fnuz": [512, nan, nan, nan],
}
for name, wanted in expected.items():
    found = values.to(getattr(torch, name)).float().tolist()
    print(f"{name:>16}", *(f"{value:>8g}" for value in found))
    assert np.array_equal(found, wanted, equal_nan=True), (name, found)
assert np.isnan(np.float32(500).astype(ml_dtypes.float8_e4m3fn).astype(np.float32))
PY
