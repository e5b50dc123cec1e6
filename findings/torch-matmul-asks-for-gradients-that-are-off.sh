#!/usr/bin/env bash
# torch 2.13.0 on an x86-64 CPU, float32.
#
# Guess: under `no_grad` it does not matter whether weights require gradients.
# Seen: `matmul` of a batch of matrices and one matrix multiplies either all rows at once or batch by batch. It asks the one
# matrix whether it requires gradients, whether or not gradients are on, and the two ways give other last bits. The same
# through `linear` without a bias, and through `nn.MultiheadAttention` where batches come first.
#
#     requires gradients False and True, gradients off: equal False
#
# Who meets it: whoever compares two models bit by bit of which one was frozen by `requires_grad_(False)`, as a model that
# `from_pretrained` has just read is not.
# Way out: freeze both before comparing, or neither.
# Exit code 0 while this is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "numpy==2.4.6" 2>/dev/null
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import torch

torch.manual_seed(0)
rows, weight = torch.randn(3, 2, 640).transpose(0, 1), torch.randn(640, 640)
with torch.no_grad():
    frozen, free = (rows @ weight.clone().requires_grad_(asks) for asks in (False, True))
same = torch.equal(frozen, free)
print(f"requires gradients False and True, gradients off: equal {same}")
assert not same
PY
