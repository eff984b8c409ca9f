#!/bin/sh
# WanTransformer3DModel.fuse_qkv_projections() stacks the weights of to_q, to_k and to_v. With an active LoRA these are peft's
# wrapped layers, and only their base weights are stacked: the adapter's part in every fused projection is gone, without error or
# warning, and the adapter is still listed as active. The output is then neither the adapter's nor the base model's, because
# projections that are not fused (queries of cross-attention) keep theirs.
# Seen with diffusers 0.42.1, peft 0.21.2, torch 2.13.0, tiny random weights. Remedy: merge the adapter first (fuse_lora).
# A good guess would be: fusing is an optimisation and leaves the output as it is, which holds without an adapter.
set -eu
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT; cd "$folder"
python3 -m venv venv
venv/bin/pip install -qq --disable-pip-version-check torch==2.13.0
venv/bin/pip install -qq --disable-pip-version-check diffusers==0.42.1 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cat > check.py <<'PY'
import diffusers
import peft
import torch
from diffusers import WanTransformer3DModel

torch.manual_seed(0)
model = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=16, text_dim=8, freq_dim=16, ffn_dim=32, num_layers=2).eval()
inputs = torch.randn(1, 16, 2, 8, 8), torch.tensor([500.0]), torch.randn(1, 4, 8)


def output():
    with torch.no_grad():
        return model(*inputs).sample


def gap(a, b):
    return (a - b).abs().max().item()


base = output()
model.fuse_qkv_projections()
fused_base = output()
model.unfuse_qkv_projections()
model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
adapted = output()
model.fuse_qkv_projections()
fused = output()
print("diffusers", diffusers.__version__, "peft", peft.__version__)
print(f"without adapter: fused against not fused {gap(fused_base, base):.1e}")
print(f"adapter's effect {gap(adapted, base):.3f}; with it, fused against not fused {gap(fused, adapted):.3f}")
print("active adapters after fusing:", model.active_adapters())
assert gap(fused_base, base) < 1e-4 and gap(fused, adapted) > 0.5 * gap(adapted, base), "the behaviour has changed"
PY
venv/bin/python check.py
