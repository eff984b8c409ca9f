#!/bin/sh
# `antialias=True` of torch.nn.functional.interpolate is known to matter when a picture is made smaller. For bilinear it is
# indeed without effect when a picture is enlarged. For bicubic it is not: the flag also exchanges the kernel, a = -0.5 (as
# Pillow) with it, a = -0.75 (as OpenCV) without. So metrics that enlarge small clips to 224 pixels depend on a flag that their
# authors never meant to matter, and torchvision's Resize (antialias on by default for tensors) differs from interpolate.
# Seen with torch 2.13.0, numpy 2.4.6, pillow 13.0.0: enlarging noise in [0, 1] 8 to 16 differs by up to 0.05.
set -eu
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6 pillow==13.0.0
cat > check.py <<'PY'
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

torch.manual_seed(0)
small = torch.rand(1, 1, 8, 8)


def enlarged(mode, antialias):
    return interpolate(small, size=(16, 16), mode=mode, antialias=antialias)


def by_pillow():
    picture = Image.fromarray(small[0, 0].numpy())
    return torch.from_numpy(np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC)).copy())


linear = (enlarged("bilinear", True) - enlarged("bilinear", False)).abs().max().item()
cubic = (enlarged("bicubic", True) - enlarged("bicubic", False)).abs().max().item()
with_flag = (enlarged("bicubic", True)[0, 0] - by_pillow()).abs().max().item()
without = (enlarged("bicubic", False)[0, 0] - by_pillow()).abs().max().item()
print("torch", torch.__version__)
print(f"flag on against off, 8 to 16: bilinear {linear:.1e}, bicubic {cubic:.3f}")
print(f"bicubic against Pillow: flag on {with_flag:.1e}, flag off {without:.3f}")
assert linear < 1e-6 and with_flag < 1e-6 and cubic > 0.02 and without > 0.02, "the behaviour has changed"
PY
venv/bin/python check.py
