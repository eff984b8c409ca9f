"""A session with the interface of ``VideoRollout`` whose frames depend on everything before them, without a model."""

import time
from types import SimpleNamespace

import numpy as np
import torch

from longtake.configs.loader import load_run
from longtake.pipelines.long_video import _PositionUse
from longtake.pipelines.run_folder import RunFolder, _starts_at
from longtake.pipelines.run_video import run_video

PROMPT = "a red circle bouncing"
SIZE = 32
SECONDS = 9.0


class FakeSession:
    """Blocks of 9, 12, 12, ... frames; the next block's colours follow from all earlier blocks and the prompts."""

    fps = 16
    num_start_frames = 0
    include_start = True

    def __init__(self, config, *, delay=0.0, break_at=None):
        frames = max(1, round(config.seconds * self.fps))
        self.num_frames = 1 + -(-(frames - 1) // 4) * 4
        self.num_blocks = 1 + max(0, -(-(self.num_frames - 9) // 12))
        self.next_block_index = 0
        self.memory = np.random.default_rng(config.seed).standard_normal(8)
        self.prompt = config.prompt
        self.prompt_changes = []
        self.positions = _PositionUse("fake", 21)
        self.attention_density = 1.0
        self.delay, self.break_at = delay, break_at

    @property
    def num_emitted(self):
        return 9 + 12 * (self.next_block_index - 1) if self.next_block_index else 0

    def is_due(self, at):
        return _starts_at(self.num_emitted, at=at, fps=self.fps)

    def change_prompt(self, prompt, *, event="keep", at=None):
        self.prompt = prompt
        self.prompt_changes.append({"block": self.next_block_index, "prompt": prompt, "event": event})
        return self.next_block_index

    def next_block(self):
        index = self.next_block_index
        if index >= self.num_blocks:
            return None
        if index == self.break_at:
            raise RuntimeError("broken on purpose")
        time.sleep(self.delay)
        text = sum(self.prompt.encode())
        self.memory = np.sin(self.memory * 3.7 + text + index)
        start = self.num_emitted
        count = min(12 if index else 9, self.num_frames - start)
        pixels = np.random.default_rng(np.abs(self.memory * 1e9).astype(np.uint64)).integers(
            0, 256, (1, count, SIZE, SIZE, 3), dtype=np.uint8
        )
        self.next_block_index += 1
        return SimpleNamespace(
            index=index,
            start_frame=3 * index,
            stats=SimpleNamespace(num_tokens=16 * index),
            num_cache_bytes=1000 * index,
            seconds={"denoise": 0.01, "decode": 0.01},
            is_last=self.next_block_index == self.num_blocks,
            uint8=lambda: pixels,
        )

    def state_dict(self):
        return {"memory": torch.from_numpy(self.memory)}, {
            "next": self.next_block_index,
            "prompt": self.prompt,
            "changes": self.prompt_changes,
        }

    def load_state_dict(self, tensors, numbers):
        self.memory = tensors["memory"].numpy()
        self.next_block_index, self.prompt = numbers["next"], numbers["prompt"]
        self.prompt_changes = list(numbers["changes"])


def make_config(*overrides, seconds=SECONDS, prompt=PROMPT):
    """A run that saves a state every two blocks."""
    options = {"prompt": prompt, "seconds": seconds}
    return load_run(options=options, overrides=["output.state_every_blocks=2", "output.crf=30", *overrides])


def hashes(path):
    return [entry["sha256"] for entry in RunFolder(path).blocks()]


def generate(path, *, config=None, **session):
    config = config or make_config()
    with RunFolder.create(path, config=config, record={"versions": {}}) as folder:
        return run_video(folder, FakeSession(config, **session))


def resume(path, *, delay=0.0, break_at=None, **settings):
    with RunFolder.open(path) as folder:
        return run_video(folder, FakeSession(folder.config, delay=delay, break_at=break_at), **settings)
