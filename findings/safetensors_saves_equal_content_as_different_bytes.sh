#!/bin/sh
# The order in which safetensors writes the entries of a file's metadata is drawn anew at every save. Equal tensors with equal
# metadata of three entries become files of equal length whose SHA-256 differ, between processes and within one. The tensors
# themselves keep one order. One entry (all of it as one JSON text) gives equal bytes always, which is what content-addressed
# stores, checkpoint hashes and reproducible builds of weights need.
# Seen with safetensors 0.8.0, numpy 2.4.6. A good guess would be: a format without compression or dates is reproducible.
set -eu
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
cat > check.py <<'PY'
import hashlib
import json

import numpy as np
import safetensors
from safetensors.numpy import save

tensors = {name: np.arange(4.0) for name in "abcdefgh"}
three = {"format": "pt", "seed": "0", "schema": "3"}
one = {"run": json.dumps(three, sort_keys=True)}
kinds = {}
print("safetensors", safetensors.__version__)
for metadata in (three, one):
    files = [save(tensors, metadata=metadata) for _ in range(100)]
    kinds[len(metadata)] = {hashlib.sha256(data).hexdigest() for data in files}
    print(f"{len(metadata)} entries: {len(kinds[len(metadata)])} different files, lengths {({len(data) for data in files})}")
assert len(kinds[3]) > 1 and len(kinds[1]) == 1, "the behaviour has changed"
PY
venv/bin/python check.py
