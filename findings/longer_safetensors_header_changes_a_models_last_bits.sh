#!/bin/sh
# safetensors reads tensors in place from a mapped file, and pads the file's header to 8 bytes only. One more line of metadata,
# or one more small tensor at the front, therefore moves all weights from a 16-byte boundary to an 8-byte one. On the CPU
# PyTorch's float32 linear layer of one row (a timestep's embedding at batch 1) then sums in another order: the same tensors,
# read by from_pretrained, give other last bits. Frame hashes of two copies of one model differ though every weight is equal.
# Weights copied into a module's own memory (load_state_dict without assign) always give the same bits.
# Seen with diffusers 0.42.1, safetensors 0.8.0, torch 2.13.0 (x86-64). A good guess would be: equal tensors, equal output.
set -eu
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --disable-pip-version-check torch==2.13.0
venv/bin/pip install -qq --disable-pip-version-check diffusers==0.42.1 numpy==2.4.6 safetensors==0.8.0 accelerate==1.15.0
cat > check.py <<'PY'
import os

import diffusers
import safetensors
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

torch.set_num_threads(1)
torch.manual_seed(0)
sizes = dict(num_attention_heads=2, attention_head_dim=64, text_dim=64, freq_dim=64, ffn_dim=256, num_layers=2)
model = WanTransformer3DModel(patch_size=(1, 2, 2), rope_max_seq_len=64, **sizes).eval()
weights = {name: value.contiguous() for name, value in model.state_dict().items()}
inputs = torch.randn(1, 16, 1, 8, 8), torch.tensor([500]), torch.randn(1, 8, 64)


def output(network):
    with torch.no_grad():
        return network(*inputs).sample


mapped, copied = [], []
print("diffusers", diffusers.__version__, "safetensors", safetensors.__version__, "torch", torch.__version__)
for note in ("", "x" * 8):
    folder = f"model{len(note)}"
    os.makedirs(folder)
    model.save_config(folder)
    save_file(weights, f"{folder}/diffusion_pytorch_model.safetensors", metadata={"format": "pt", "note": note})
    loaded = WanTransformer3DModel.from_pretrained(folder).eval()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    mapped.append(output(loaded))
    own = WanTransformer3DModel.from_config(model.config).eval()
    own.load_state_dict(loaded.state_dict())
    copied.append(output(own))
    boundaries = sorted({value.data_ptr() % 16 for value in loaded.state_dict().values()})
    print(f"note of {len(note)} bytes: weights equal, addresses modulo 16: {boundaries}")
print("largest difference, weights read in place:", (mapped[0] - mapped[1]).abs().max().item())
print("largest difference, weights copied:       ", (copied[0] - copied[1]).abs().max().item())
assert torch.equal(*copied) and not torch.equal(*mapped), "the behaviour has changed"
PY
venv/bin/python check.py
