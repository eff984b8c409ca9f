"""The rollout without text and pixels: any Wan transformer, any checkpoint naming, your own noise."""

import torch
from diffusers import WanTransformer3DModel

from longtake.models import convert_original_state_dict
from longtake.pipelines import rollout_latents
from longtake.samplers import SeededNoise

NUM_FRAMES = 30

torch.manual_seed(0)
transformer = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=24, text_dim=32, freq_dim=64, ffn_dim=96, num_layers=2
)
# A real checkpoint: torch.load("self_forcing_dmd.pt", weights_only=True)["generator_ema"]. Wrapper prefixes go away,
# names in diffusers' naming stay, and anything unknown, doubled or missing is an error.
weights = {f"model._fsdp_wrapped_module.{name}": value for name, value in transformer.state_dict().items()}
transformer.load_state_dict(convert_original_state_dict(weights), strict=True)

for block in rollout_latents(
    transformer,
    torch.randn(1, 12, 32),  # prompt embeddings: (batch, text_len, text_dim)
    num_frames=NUM_FRAMES,
    frame_shape=(16, 8, 12),  # channels, height, width of a latent frame
    cache={"policy": "attention_sink", "num_context_frames": 9, "num_sink_frames": 3},
    sampler={"name": "few_step", "timesteps": [1000, 750, 500, 250], "flow_shift": 5.0},
    noise=SeededNoise([0]),
):
    last = block.start_frame + block.latents.shape[1] - 1
    print(f"frames {block.start_frame}-{last}: std {block.latents.std():.2f}")
