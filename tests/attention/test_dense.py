"""Dense attention backends against a float64 softmax written out, and which one is taken."""

import re
import subprocess
import sys

import pytest
import torch

from longtake.attention import fastest, sdpa, zentorch
from longtake.attention.backends import dense
from longtake.attention.backends.dense import zentorch_fault

CPU = torch.device("cpu")
SHAPES = [(1, 48, 336, 6, 32), (2, 48, 337, 2, 24), (1, 130, 1561, 3, 64), (1, 300, 2000, 2, 128), (1, 1, 1, 1, 6)]


def written_out(q, k, v):
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2)


def relative_error(attention, q, k, v):
    expected = written_out(q, k, v)
    return ((attention(q, k, v).double() - expected).norm() / expected.norm()).item()


def example(shape, dtype, *, seed=0):
    batch, queries, keys, heads, head_dim = shape
    generator = torch.Generator().manual_seed(seed)

    def random(length):
        return (2 * torch.randn(batch, length, heads, head_dim, generator=generator)).to(dtype)

    return random(queries), random(keys), random(keys)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sdpa_equals_a_float64_softmax(shape):
    assert relative_error(sdpa, *example(shape, torch.float32)) < 2e-6


@pytest.mark.skipif(zentorch_fault() is not None, reason=str(zentorch_fault()))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_zentorch_is_as_exact_as_sdpa_in_bfloat16(shape):
    q, k, v = example(shape, torch.bfloat16)
    assert relative_error(zentorch, q, k, v) < 1.05 * relative_error(sdpa, q, k, v) + 1e-6
    head_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    assert torch.equal(zentorch(q, *head_major), zentorch(q, k, v))


def test_scores_that_are_scaled_wrongly_are_noticed():
    q, k, v = example(SHAPES[0], torch.float32)
    assert relative_error(lambda q, k, v: sdpa(q * 1.01, k, v), q, k, v) > 1e-3


@pytest.mark.parametrize(
    ("capabilities", "reason", "dtype", "expected"),
    [
        ({"avx512_bf16": True}, None, torch.bfloat16, zentorch),
        ({"avx512_bf16": True}, None, torch.float32, sdpa),
        ({"avx512_bf16": True, "amx_bf16": True}, None, torch.bfloat16, sdpa),
        ({"avx512_bf16": True}, "not installed", torch.bfloat16, sdpa),
    ],
)
def test_the_fastest_is_taken(capabilities, reason, dtype, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(dense, "zentorch_fault", lambda: reason)
    assert fastest(CPU, dtype) is expected
    assert fastest(torch.device("cuda"), dtype) is sdpa


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ("torch.cpu.get_capabilities = lambda: {}", "this one has not got it: Use 'sdpa'"),
        (
            "torch.cpu.get_capabilities = lambda: {'avx512_bf16': True}; sys.modules['zentorch'] = None",
            "not installed: pip install 'longtake\\[zentorch\\]'",
        ),
    ],
)
def test_a_missing_backend_says_what_to_do(patch, message):
    code = (
        f"import sys, torch; {patch}\nfrom longtake.attention import zentorch\n"
        "x = torch.zeros(1, 1, 1, 6, dtype=torch.bfloat16)\nzentorch(x, x, x)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert re.search(message, result.stderr), result.stderr
