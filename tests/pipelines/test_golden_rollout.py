"""Rollouts equal to the numbers that the authors' own code gave."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open

from longtake.models import convert_original_state_dict
from longtake.pipelines import rollout_latents

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TOLERANCE = 2e-4


class RecordedNoise:
    """The noise of a golden file."""

    def __init__(self, noise: torch.Tensor, renoise: torch.Tensor) -> None:
        self.noise, self.after = noise, renoise

    def initial(self, block_index, start_frame, shape):
        return self.noise[:, start_frame : start_frame + shape[1]]

    def renoise(self, block_index, start_frame, step_index, shape):
        return self.after[:, start_frame : start_frame + shape[1], step_index]


def load(name: str):
    path = GOLDEN / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    model = WanTransformer3DModel(
        num_attention_heads=config["num_heads"],
        attention_head_dim=config["dim"] // config["num_heads"],
        in_channels=tensors["noise"].shape[2],
        out_channels=tensors["noise"].shape[2],
        text_dim=config["text_dim"],
        freq_dim=config["freq_dim"],
        ffn_dim=config["ffn_dim"],
        num_layers=config["num_layers"],
    ).eval()
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    model.load_state_dict(convert_original_state_dict(weights), strict=True)
    return config, tensors, model


def roll(name: str, cache, *, event=None, **changes) -> float:
    """Largest error of a rollout against a golden file."""
    config, tensors, model = load(name)
    settings = {
        "num_frames": sum(config["blocks"]),
        "frame_shape": tuple(tensors["noise"].shape[2:]),
        "frames_per_block": config["blocks"][-1],
        "cache": cache,
        "sampler": {
            "name": config.get("sampler", "few_step"),
            "timesteps": config["denoising_steps"],
            "flow_shift": config["flow_shift"],
        },
        "noise": RecordedNoise(tensors["noise"], tensors["renoise"]),
        "context_timestep": config["context_noise"],
    }
    if "event" in config:
        settings["schedule"] = [(config["switch_frame"], tensors["prompt_embeds_after"], event or config["event"])]
    settings |= changes
    blocks = list(rollout_latents(model, tensors["prompt_embeds"], **settings))
    assert [b.start_frame for b in blocks] == list(range(0, sum(config["blocks"]), config["blocks"][-1]))
    return (torch.cat([b.latents for b in blocks], dim=1) - tensors["latents"]).abs().max().item()


def window(frames: int, sinks: int = 0, positions: str = "absolute") -> dict:
    sizes = {"num_context_frames": frames, "num_sink_frames": sinks}
    return {"policy": "attention_sink", "positions": positions} | sizes


def longlive(**changes) -> dict:
    return {"policy": "longlive", "num_context_frames": 9, "num_sink_frames": 3} | changes


def deep_sink(frames: int, sinks: int) -> dict:
    sizes = {"num_context_frames": frames, "num_sink_frames": sinks}
    return {"policy": "deep_forcing", "compression": "none"} | sizes


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("sf_full", "full"),
        ("sf_full", {"policy": "sliding_window", "num_context_frames": 21}),
        ("sf_window6", {"policy": "sliding_window", "num_context_frames": 6}),
        ("sf_window6", {"policy": "sliding_window", "num_context_frames": 6, "positions": "contiguous"}),
        ("sf_window6", window(6)),
        ("infinity_rope", window(9, 1, "contiguous")),
        ("infinity_rope", {"policy": "infinity_rope", "num_context_frames": 9}),
        ("longlive_recache", longlive()),
        ("longlive_recache", window(9, 3)),
        ("deep_sink_w12_s6", deep_sink(12, 6)),
        ("deep_forcing", "deep_forcing"),
        ("ema_sink", "ema_sink"),
        ("rolling_forcing", "rolling_forcing"),
    ],
)
def test_equals_the_authors_code(name, cache):
    assert roll(name, cache) <= TOLERANCE


def test_upstream_numerics_equal_it_too():
    assert roll("sf_window6", {"policy": "sliding_window", "num_context_frames": 6}, numerics="upstream") <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("sf_window6", {"policy": "sliding_window", "num_context_frames": 5}),
        ("sf_window6", window(6, 1)),
        ("sf_window6", "full"),
        ("infinity_rope", window(9, 1, "absolute")),
        ("infinity_rope", window(9, 0, "contiguous")),
        ("infinity_rope", {"policy": "infinity_rope", "num_context_frames": 9, "placement": "paper"}),
        ("longlive_recache", longlive(global_sink=False)),
        ("longlive_recache", longlive(positions="contiguous")),
        ("longlive_recache", longlive(num_sink_frames=2)),
        ("deep_sink_w12_s6", deep_sink(12, 5)),
        ("deep_sink_w12_s6", deep_sink(12, 6) | {"positions": "contiguous"}),
        ("deep_forcing", {"policy": "deep_forcing", "num_recent_frames": 3}),
        ("rolling_forcing", {"policy": "rolling_forcing", "num_sink_frames": 2}),
        ("rolling_forcing", window(21, 3)),
        ("deep_forcing", {"policy": "deep_forcing", "unify_top": True}),
        ("ema_sink", {"policy": "ema_sink", "alpha": 0.9}),
        ("ema_sink", {"policy": "ema_sink", "num_context_frames": 12}),
        ("ema_sink", {"policy": "ema_sink", "num_sink_frames": 2}),
    ],
)
def test_a_wrong_policy_differs(name, cache):
    assert roll(name, cache) > 50 * TOLERANCE


FOUR_STEPS = {"name": "few_step", "timesteps": [1000, 750, 500, 250]}


@pytest.mark.parametrize(
    ("name", "cache", "changes"),
    [
        ("sf_window6", window(6), {"sampler": FOUR_STEPS | {"flow_shift": 8.0}}),
        ("longlive_recache", longlive(), {"event": "keep"}),
        ("longlive_recache", longlive(), {"event": "flush"}),
    ],
)
def test_a_wrong_setting_differs(name, cache, changes):
    assert roll(name, cache, **changes) > 50 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        # So few frames are left in the window of so small a model.
        ("longlive_recache", longlive(), longlive(recache="causal")),
        # In eleven blocks four commits are without sinks as released.
        ("rolling_forcing", "rolling_forcing", {"policy": "rolling_forcing", "commit": "keep_sinks"}),
        # A sink that never moves: a thousandth per block is little.
        ("ema_sink", "ema_sink", {"policy": "ema_sink", "alpha": 1.0}),
    ],
)
def test_what_hardly_differs_is_off_by_ten_times_the_error(name, right, wrong):
    assert roll(name, wrong) > 10 * roll(name, right)
