"""Plays the calls of a rollout on a cache, with keys and values that depend on nothing but where they belong."""

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from longtake.attention import sdpa
from longtake.cache import BlockTrace, Geometry, KVCache, Pass, make_policy

HEADS, HEAD_DIM = 2, 16
# Channels of a mark: digits from 0 to 7 and a 7 to go by, so that eight and four bits keep them.
REFERENCE, FRAME, TOKEN, SAMPLE, HEAD, KIND, SUMMARY = 0, 1, 6, 8, 9, 10, 11
NUM_FRAME_DIGITS, NUM_TOKEN_DIGITS = 5, 2
PLAIN, POOLED = 0, 1
MAX_FRAMES = 10_300


def make_geometry(block, *, grid=(1, 2), batch=1, layers=2, **changes):
    shape = {"num_heads": HEADS, "head_dim": HEAD_DIM, "num_rows": grid[0], "num_columns": grid[1]}
    return Geometry(**({"num_layers": layers, "frames_per_block": block, "batch_size": batch} | shape | changes))


def wan_geometry(block=3, **changes):
    """Wan2.1-T2V-1.3B at 832x480, sizes only."""
    shape = {"num_layers": 30, "num_heads": 12, "head_dim": 128, "num_rows": 30, "num_columns": 52}
    settings = {"frames_per_block": block, "dtype": torch.bfloat16, "device": torch.device("meta")}
    return Geometry(**(shape | settings | changes))


def _digits(numbers, count):
    return torch.stack([numbers // 8**i % 8 for i in range(count)], dim=-1)


@lru_cache
def _table(size, summary):
    """Marks of all keys that a test may see: (MAX_FRAMES, size, heads, channels)."""
    marks = torch.zeros(MAX_FRAMES, size, HEADS, HEAD_DIM)
    marks[..., REFERENCE] = 7
    marks[..., FRAME : FRAME + NUM_FRAME_DIGITS] = _digits(torch.arange(MAX_FRAMES), NUM_FRAME_DIGITS)[:, None, None]
    marks[..., TOKEN : TOKEN + NUM_TOKEN_DIGITS] = _digits(torch.arange(size), NUM_TOKEN_DIGITS)[None, :, None]
    marks[..., HEAD] = torch.arange(HEADS)
    marks[..., KIND] = 1
    marks[..., SUMMARY] = summary
    return marks


def marked(layer, pass_, geometry, samples):
    """Queries, keys and values that say which token they are: (batch, tokens, heads, channels) each."""
    size = pass_.grid[0] * pass_.grid[1] if pass_.grid else geometry.tokens_per_frame
    return _marks(size, POOLED if pass_.grid else PLAIN, pass_.start_frame, pass_.num_frames, len(samples))


@lru_cache(maxsize=4)  # the same in all layers, and in a block's denoising and its commit
def _marks(size, summary, start_frame, num_frames, num_samples):
    table = _table(size, summary)[start_frame : start_frame + num_frames]
    keys = table.flatten(0, 1).repeat(num_samples, 1, 1, 1)
    keys[..., SAMPLE] = torch.arange(num_samples)[:, None, None]
    values = keys.clone()
    values[..., KIND] = 2
    return keys, keys, values


def read_marks(tensor):
    """(..., channels) to (..., 6) whole numbers: frame, token, sample, head, kind, summary."""
    places = torch.tensor([8**i for i in range(NUM_FRAME_DIGITS)])
    rounded = tensor.round().long()
    assert (tensor - rounded).abs().max() < 0.2, "a stored token has changed"
    frame = (rounded[..., FRAME : FRAME + NUM_FRAME_DIGITS] * places).sum(-1)
    token = (rounded[..., TOKEN : TOKEN + NUM_TOKEN_DIGITS] * places[:NUM_TOKEN_DIGITS]).sum(-1)
    return torch.stack([frame, token, *(rounded[..., i] for i in (SAMPLE, HEAD, KIND, SUMMARY))], dim=-1)


def random(layer, pass_, geometry, samples):
    """Queries, keys and values of a Gaussian that depends on the pass, the layer and the sample alone."""
    size = pass_.grid[0] * pass_.grid[1] if pass_.grid else geometry.tokens_per_frame
    parts = []
    for sample in samples:
        name = f"{pass_.kind} {pass_.label} {pass_.start_frame} {pass_.step_index} {layer} {sample}".encode()
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(name, digest_size=7).digest()))
        parts.append(torch.randn(3, pass_.num_frames * size, HEADS, HEAD_DIM, generator=generator))
    return torch.stack(parts, dim=1).unbind(0)


@dataclass(frozen=True)
class Span:
    index: int
    start: int
    count: int


def spans(num_blocks, block, *, first=None):
    first = first or block
    return [Span(i, first + (i - 1) * block if i else 0, block if i else first) for i in range(num_blocks)]


class Player:
    """A cache and the calls that a rollout makes.

    ``content`` is ``marked`` or ``random``, ``samples`` are the batch's videos, ``watch`` is called with (layer, pass,
    context) for every read set; without ``attends`` passes only select and commit.
    """

    def __init__(self, settings, geometry, *, content=random, samples=(0,), watch=None, attends=True):
        self.geometry = replace(geometry, batch_size=len(samples))
        self.cache = KVCache(make_policy(settings), self.geometry, attention=sdpa)
        self.content, self.samples, self.watch, self.attends = content, samples, watch, attends
        self.layers = range(geometry.num_layers)
        self._asked = {}

    def one(self, layer, pass_):
        q, k, v = (x.to(self.geometry.device) for x in self.content(layer, pass_, self.geometry, self.samples))
        if self.attends:
            return self.cache.attend(layer, q, k, v, pass_)
        if not self._holds(layer, pass_):
            context = self.cache.state.select(layer, pass_, q)
            self._asked[layer] = (pass_.block_index, pass_.kind, context.holds)
            if self.watch is not None:
                self.watch(layer, pass_, context)
        if pass_.kind != "denoise":
            self.cache.state.commit(layer, pass_, q, k, v)
        return None

    def _holds(self, layer, pass_):
        index, kind, holds = self._asked.get(layer, (-1, "", "pass"))
        if pass_.kind == "encode" or kind == "encode":
            return False
        return index == pass_.block_index and (holds == "block" or (holds == "kind" and kind == pass_.kind))

    def denoise(self, span, *, steps=2):
        """All denoising passes of a block; outputs of the last."""
        for step in range(steps):
            outputs = self._pass("denoise", span, step)
        return outputs

    def commit(self, span, event="keep"):
        outputs = self._pass("commit", span)
        self.end(span, event)
        return outputs

    def _pass(self, kind, span, step=0):
        pass_ = Pass(kind, span.index, span.start, span.count, step)
        return [self.one(layer, pass_) for layer in self.layers]

    def commit_with(self, span, following):
        """The commit pass and the next block's first denoising pass, layer by layer; outputs of the second."""
        commit = Pass("commit", span.index, span.start, span.count)
        denoise = Pass("denoise", following.index, following.start, following.count)
        outputs = []
        for layer in self.layers:
            self.one(layer, commit)
            outputs.append(self.one(layer, denoise))
        self.end(span)
        return outputs

    def end(self, span, event="keep"):
        g = self.geometry
        shape = (len(self.samples), span.count, 4, 2 * g.num_rows, 2 * g.num_columns)
        latents = torch.stack([self._latents(span, sample, shape[1:]) for sample in self.samples]).to(g.device)
        for job in self.cache.end_block(BlockTrace(span.index, span.start, latents, event)):
            count, grid = job.latents.shape[1], None
            if job.pooling is not None:
                count = max(1, count // job.pooling[0])
                grid = (g.num_rows // job.pooling[1], g.num_columns // job.pooling[2])
            if job.tokens is not None:
                count, grid = job.tokens.shape[2], tuple(job.tokens.shape[3:])
            pass_ = Pass("encode", span.index, job.start_frame, count, label=job.label, grid=grid)
            for layer in self.layers:
                self.one(layer, pass_)

    def block(self, span, *, steps=2, event="keep"):
        return self.denoise(span, steps=steps) + self.commit(span, event)

    @staticmethod
    def _latents(span, sample, shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * span.index + sample))
