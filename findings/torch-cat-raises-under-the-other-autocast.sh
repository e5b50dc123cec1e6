#!/usr/bin/env bash
# torch 2.13.0 on a CPU, torch.autocast to one 16-bit dtype over tensors of the other.
#
# Guess: a bfloat16 model under torch.autocast("cpu", torch.float16) either runs in one of the two or is refused at its
# first layer. A concatenation, which only moves numbers, runs in any case.
# Seen: linear casts to float16, a sum stays bfloat16, layer_norm too, and torch.cat and torch.stack alone raise
# "Unexpected floating ScalarType in at::autocast::prioritize", even of two bfloat16 tensors; so they do the other way
# round. With float32 among the tensors the same dtype as autocast's gives float32, and the other one raises.
#
# Who meets it: a cache of keys and values that are bfloat16 (DynamicCache concatenates) under float16 autocasting: the
# model runs up to its first attention, and the message names no tensor and no dtype.
# Way out: autocast to the dtype that the model has, or cast what is concatenated before.
# Exit code 0 while this is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "numpy==2.4.6" 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import sys

import torch
from torch.nn import functional

torch.set_grad_enabled(False)
SHORT = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def outcome(run, low):
    try:
        with torch.autocast("cpu", low):
            return SHORT[run().dtype]
    except RuntimeError as error:
        return "raises" if "autocast::prioritize" in str(error) else str(error)


def operators(x):
    return {
        "linear": lambda: functional.linear(x, x),
        "sum": lambda: x + x,
        "layer_norm": lambda: functional.layer_norm(x, (2,)),
        "cat": lambda: torch.cat([x, x]),
        "stack": lambda: torch.stack([x, x]),
        "cat with float32": lambda: torch.cat([x, x.float()]),
    }


half, brain = torch.float16, torch.bfloat16
expected = {
    (brain, half): ["float16", "bfloat16", "bfloat16", "raises", "raises", "raises"],
    (half, brain): ["bfloat16", "float16", "float16", "raises", "raises", "raises"],
    (brain, brain): ["bfloat16", "bfloat16", "bfloat16", "bfloat16", "bfloat16", "float32"],
}
same = True
for (own, low), wanted in expected.items():
    runs = operators(torch.ones(2, 2, dtype=own))
    found = [outcome(run, low) for run in runs.values()]
    same &= found == wanted
    print(f"{SHORT[own]} under {SHORT[low]}:", ", ".join(f"{name} {what}" for name, what in zip(runs, found)))
sys.exit(0 if same else 1)
PY
