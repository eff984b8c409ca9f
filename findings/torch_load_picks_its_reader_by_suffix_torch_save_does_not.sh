#!/bin/sh
# torch.load opens a file named *.safetensors with the safetensors reader. torch.save writes its zip archive of a pickle under any
# name, this one too. So torch.load cannot read what torch.save has just written, and says that the header is too large, which
# sounds like a damaged file; the same bytes under another name load.
# Seen with torch 2.13.0, safetensors 0.8.0.
# A good guess would be: the content decides, as it does between torch's own old and new formats.
set -eu
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --disable-pip-version-check torch==2.13.0 safetensors==0.8.0 numpy==2.4.6
cat > check.py <<'PY'
import shutil
import safetensors
import torch

torch.save({"weight": torch.ones(2)}, "model.safetensors")
shutil.copy("model.safetensors", "model.pt")
print("torch", torch.__version__, "safetensors", safetensors.__version__)
print("as model.pt:", torch.load("model.pt", weights_only=True))
try:
    loaded = torch.load("model.safetensors", weights_only=True)
except Exception as error:
    print("as model.safetensors:", type(error).__name__, error)
else:
    raise SystemExit(f"the behaviour has changed: {loaded}")
PY
venv/bin/python check.py
