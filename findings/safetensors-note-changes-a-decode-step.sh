#!/usr/bin/env bash
# safetensors 0.8.0 read by torch 2.13.0 on an x86-64 CPU, float32.
#
# Guess: two files that hold the same weights, bit for bit, give the same model, bit for bit.
# Seen: a file's header is as long as its metadata, padded to 8 bytes, and weights are mapped right behind it. A matrix whose
# address is no multiple of 16 is summed up by other instructions as soon as there is one row to multiply, which is every
# step of a generation with a cache. A note of eight characters more in the metadata changes the last bits of that step;
# of two rows it changes none, so a test on a prompt does not see it.
#
#     note of 0 characters: weights equal True, address mod 16 = 8, one row equal False, two rows equal True
#     note of 8 characters: weights equal True, address mod 16 = 0, one row equal True, two rows equal True
#
# Who meets it: whoever compares a converted, sharded or repaired checkpoint with its original bit by bit while it
# generates, and greedy texts that part at a tie after a file was merely written again.
# Way out: clone the weights that are mapped, on both sides, before comparing.
# Exit code 0 while this is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "numpy==2.4.6" "safetensors==0.8.0" 2>/dev/null
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import torch
from safetensors.torch import load_file, save_file

torch.manual_seed(0)
linear = torch.nn.functional.linear
weight, one, two = torch.randn(640, 640), torch.randn(1, 640), torch.randn(2, 640)
seen = {}
for note in ("", "12345678"):
    save_file({"w": weight}, "w.safetensors", metadata={"format": "pt", "note": note})
    read = load_file("w.safetensors")["w"]
    same = [torch.equal(read, weight), *(torch.equal(linear(x, read), linear(x, weight)) for x in (one, two))]
    seen[len(note)] = (read.data_ptr() % 16, *same)
    print(
        f"note of {len(note)} characters: weights equal {same[0]}, address mod 16 = {read.data_ptr() % 16}, "
        f"one row equal {same[1]}, two rows equal {same[2]}"
    )
assert seen == {0: (8, True, False, True), 8: (0, True, True, True)}
PY
