#!/bin/sh
# diffusers' AutoencoderKLWan takes one frame, then groups of four. encode() accepts any number of frames, and frames that do not
# fill a group are left out without a word: 6, 7 and 8 frames give the latents of 5, bit for bit, and decode returns 5. A clip
# that is given to continue from loses its newest frames, the ones that matter most. Elsewhere in diffusers (pipelines) the
# count is rounded with a warning.
# Seen with diffusers 0.42.1, torch 2.13.0, tiny random weights of the true class.
# A good guess would be: an error, or padding to a whole group.
set -eu
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --disable-pip-version-check torch==2.13.0
venv/bin/pip install -qq --disable-pip-version-check diffusers==0.42.1 numpy==2.4.6
cat > check.py <<'PY'
import diffusers
import torch
from diffusers import AutoencoderKLWan

torch.manual_seed(0)
vae = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
clip = torch.rand(1, 3, 9, 16, 16)
print("diffusers", diffusers.__version__, "torch", torch.__version__)
with torch.no_grad():
    five = vae.eval().encode(clip[:, :, :5]).latent_dist.mode()
    for frames in (5, 6, 7, 8, 9):
        latents = vae.encode(clip[:, :, :frames]).latent_dist.mode()
        decoded = vae.decode(latents).sample
        same = latents.shape == five.shape and torch.equal(latents, five)
        print(f"{frames} frames: {latents.shape[2]} latents, {decoded.shape[2]} frames back, as of 5 frames: {same}")
        assert same == (frames < 9) and decoded.shape[2] == (5 if frames < 9 else 9), "the behaviour has changed"
PY
venv/bin/python check.py
