"""`longtake attention explain` and the benchmark of attention; never a time."""

import pytest
import torch

from benchmarks import attention as measure_attention
from longtake.attention import BACKENDS
from longtake.scripts import main
from longtake.scripts.console import run_app


@pytest.fixture
def call(capfd, monkeypatch):
    """Run the command; returns (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args):
        code = run_app(main.app, ["attention", "explain", *args])
        return code, *capfd.readouterr()

    return run


def test_every_backend_has_a_line_and_one_is_taken(call):
    code, stdout, stderr = call("--shape", "1,768,5376,4,64", "--density", "0.4")
    assert code == 0, stderr
    assert "768 queries, 5376 keys, 4 heads x 64, float32, cpu: block plan, density 0.40" in stdout
    lines = {line.split()[0]: line for line in stdout.splitlines()[2:] if line.split()}
    assert set(BACKENDS) <= set(lines)
    assert "taken by auto" in lines["gather_sdpa"] and stdout.count("taken by auto") == 1
    assert "auto takes gather_sdpa" in stdout
    assert "only when asked for by name" in lines["flex"] or "compiler" in lines["flex"]


def test_dense(call):
    _, stdout, _ = call("--shape", "1x768x5376x4x64")
    assert ": dense" in stdout and "auto takes sdpa" in stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_here(call):
    args = ["--device", "cuda", "--capability", "12.0", "--dtype", "bfloat16", "--density", "0.3", "--per-head"]
    code, stdout, _ = call(*args)
    assert code == 0
    assert "no CUDA device" in stdout and "not verified on cuda" in stdout
    assert "where there is cuda, it takes gather_sdpa" in stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--shape", "1,2,3"], "--shape='1,2,3' is not B,LQ,LK,H,D"),
        (["--shape", "1,0,3,4,64"], "five numbers above 0"),
        (["--dtype", "bfloat"], "Did you mean 'bfloat16'"),
        (["--device", "cuda", "--capability", "hopper"], "is not MAJOR.MINOR"),
        (["--kv-heads", "5"], "does not divide the 12 heads"),
    ],
)
def test_mistakes_are_one_line(call, args, message):
    code, _, stderr = call(*args)
    assert code != 0 and message in stderr and "Traceback" not in stderr


def test_the_benchmark_measures_the_plans_that_are_promised(monkeypatch):
    """Densities and sizes, on small tokens; the times are whatever they are."""
    densities = {name: case.plan().density for name, case in measure_attention.CASES.items()}
    assert densities["radial, whole video"] == pytest.approx(0.601, abs=1e-3)
    assert densities["radial, whole video, long"] == pytest.approx(0.245, abs=1e-3)
    assert densities["radial, cached"] == pytest.approx(0.52, abs=0.01)
    assert densities["radial, cached, long"] == pytest.approx(0.18, abs=0.01)
    monkeypatch.setattr(measure_attention, "GRID", (4, 4))
    small = measure_attention.Case(6, True, 1.0, 1, density=0.5)
    monkeypatch.setattr(measure_attention, "CASES", {"small": small})
    before = torch.get_num_threads()
    record = measure_attention.measure_attention()
    assert torch.get_num_threads() == before
    row = record["small"]
    assert (row["queries"], row["keys"]) == (48, 96)
    assert all(figures["speedup"] > 0 for figures in row["threads"].values()) and 1 in row["threads"]
