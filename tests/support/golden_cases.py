"""The project's own golden numbers: small seeded rollouts of every policy and sampler, `make golden`.

They say that the numbers did not move. Whether they are right is for the parity tests to say.
"""

import hashlib
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from longtake.pipelines import rollout_latents
from longtake.samplers import SeededNoise

FOLDER = Path(__file__).resolve().parents[1] / "golden"
FRAME_SHAPE = (4, 4, 6)
NUM_FRAMES = 21
TEXT_SHAPE = (2, 5, 8)  # batch, tokens, channels

TINY = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": FRAME_SHAPE[0],
    "out_channels": FRAME_SHAPE[0],
    "text_dim": TEXT_SHAPE[-1],
    "freq_dim": 16,
    "ffn_dim": 64,
    "num_layers": 2,
}


def seeded(name: str, shape: tuple[int, ...]) -> Tensor:
    """Gaussian numbers that depend on a name alone, float32 on the CPU."""
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(key))


def _case(policy, **settings):
    return {"cache": {"policy": policy} | settings}


def _switch(frame, event):
    return {"schedule": ((frame, seeded("next prompt", TEXT_SHAPE), event),)}


_GUIDED = {"name": "multi_step", "num_inference_steps": 6, "guidance_scale": 2.0}
_PACK = {"num_sink_frames": 3, "num_recent_frames": 3}
_SINK = {"policy": "attention_sink", "num_context_frames": 8}
_WINDOW = {"policy": "sliding_window", "num_context_frames": 12}

CASES = {
    "full": _case("full"),
    "sliding_window": _case("sliding_window", num_context_frames=7),
    "attention_sink_contiguous": _case("attention_sink", num_context_frames=9),
    "attention_sink_absolute": _case("attention_sink", num_context_frames=9, num_sink_frames=2, positions="absolute"),
    "deep_forcing": _case(
        "deep_forcing", num_context_frames=10, num_sink_frames=2, num_budget_frames=8, num_recent_frames=4
    ),
    "tempcache": _case("tempcache", num_context_frames=7, min_similarity=0.4),
    "forcing_kv": _case("forcing_kv", heads=[[], [1]]),
    "deep_sink": _case("deep_forcing", compression="none", num_context_frames=9, num_sink_frames=4),
    "longlive": _case("longlive", num_context_frames=9, num_sink_frames=2) | _switch(12, "recache"),
    "infinity_rope": _case("infinity_rope", num_context_frames=7) | _switch(12, "cut"),
    "anchor": _case("anchor", num_context_frames=12, num_sink_frames=2) | _switch(6, "recache"),
    "quantized": _case("quantized", inner=_SINK, bits=4),
    "offloaded": _case("offloaded", inner=_WINDOW),
    "commit_reads": _case("commit_reads", inner=_SINK | {"num_context_frames": 10}),
    "budget": _case("budget", inner=_WINDOW | {"num_context_frames": 21}, max_bytes="60KB"),
    "rolling_forcing": _case("rolling_forcing", num_context_frames=12, num_sink_frames=3)
    | {"sampler": {"name": "rolling_window", "timesteps": [1000, 600, 300]}},
    "dilated_window": _case("dilated_window", num_context_frames=8, num_dilated_frames=2, dilation=2),
    "ema_sink": _case("ema_sink", num_context_frames=9, alpha=0.7),
    "memrope": _case("memrope", num_context_frames=9, num_sink_frames=2, long_rate=0.1),
    "rolling_sink": _case("rolling_sink", num_context_frames=9),
    "relax": _case("relax", num_context_frames=8, num_budget_frames=18),
    "slow_fast": _case("slow_fast", num_context_frames=12, num_sink_frames=2, num_blocks_per_update=1),
    "pack": _case("pack", **_PACK, num_selected_blocks=2),
    "pack_in_full": _case("pack", **_PACK, num_selected_blocks=1, compressor="none", selection="softmax_mass"),
    "context_noise": _case("full") | {"context_timestep": 100},
    "frame_first": _case("full") | {"first_block_frames": 1, "frames_per_block": 4},
    "euler_guided": _case("sliding_window", num_context_frames=9) | {"sampler": _GUIDED | {"solver": "euler"}},
    "unipc_guided": _case("sliding_window", num_context_frames=9) | {"sampler": _GUIDED | {"solver": "unipc"}},
}


def tiny_transformer() -> WanTransformer3DModel:
    """A real transformer of two layers whose weights depend on their names alone."""
    model = WanTransformer3DModel(**TINY).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_gain = parameter.ndim == 1 and name.endswith("weight")
            spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(float(is_gain) + spread * seeded(name, tuple(parameter.shape)))
    return model


def golden_rollouts() -> dict[str, Tensor]:
    """(2, 3, 4, 4, 6) for every case: of the clean latents the first frame, the middle one and the last."""
    transformer, prompt_embeds = tiny_transformer(), seeded("prompt", TEXT_SHAPE)
    results = {}
    for name, case in CASES.items():
        blocks = rollout_latents(
            transformer,
            prompt_embeds,
            num_frames=NUM_FRAMES,
            frame_shape=FRAME_SHAPE,
            noise=SeededNoise([0, 1]),
            **case,
        )
        latents = torch.cat([block.latents for block in blocks], dim=1)
        results[name] = latents[:, [0, NUM_FRAMES // 2, NUM_FRAMES - 1]].contiguous()
    return results


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    save_file(golden_rollouts(), FOLDER / "rollouts.safetensors")
    Console().print(f"wrote {FOLDER / 'rollouts.safetensors'}")


if __name__ == "__main__":
    main()
