"""A stock diffusers Wan pipeline with sparse self-attention: what was computed, by what, and how far off it lands."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

from longtake import LongVideoPipeline
from longtake.models.bidirectional import sparse_wan

NUM_FRAMES = 81

# Stands in for WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers"): it runs anywhere, but it was trained
# block by block, so watch the numbers and not the video.
pipe = WanPipeline(**LongVideoPipeline.from_pretrained("mini").components)
pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
settings = {
    "prompt": "a red circle bouncing quickly over a navy striped background",
    "height": 64,
    "width": 64,
    "num_frames": NUM_FRAMES,
    "num_inference_steps": 8,
    "max_sequence_length": 32,
    "output_type": "pt",
}

dense = pipe(**settings, generator=torch.Generator().manual_seed(0)).frames
# A frame has 16 tokens here; with Wan's 1,560 leave block_size and thin_below as they are.
radial = {"policy": "radial", "block_size": 4, "thin_below": 8, "dense_steps": 2, "dense_layers": 1}
with sparse_wan(pipe, radial) as sparse:
    video = pipe(**settings, generator=torch.Generator().manual_seed(0)).frames

print(sparse)
print(f"PSNR to dense attention: {-10 * torch.log10((video - dense).square().mean()):.1f} dB")
