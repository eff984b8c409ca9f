"""``make bench-gpu`` at a size for the CPU: every figure is there; never how large."""

import json

import pytest
import torch
import typer

from benchmarks import gpu as benchmark_gpu
from benchmarks.gpu import COLUMNS
from longtake.scripts.console import run_app


@pytest.fixture
def call(capfd):
    app = typer.Typer()
    app.command()(benchmark_gpu.benchmark_gpu)

    def run(*words):
        code = run_app(app, [str(word) for word in words])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_table_has_every_figure(call, tmp_path):
    words = ("--size", "tiny", "--device", "cpu", "--seconds", "1.5", "--policies", "attention_sink,pack")
    code, _, stderr = call(*words, "--dtype", "float32", "--out", tmp_path / "bench")
    assert code == 0, stderr
    record = json.loads((tmp_path / "bench.json").read_text())
    assert list(record["policies"]) == ["attention_sink", "pack"]
    for row in record["policies"].values():
        assert all(row[key] for key in COLUMNS)
        assert row["num_blocks"] == 3 and row["seconds_of_video"] == pytest.approx(25 / 16)
        assert row["fps_transformer"] > row["fps_decoded"] > row["fps_file"] > 0
    assert record["machine"]["torch"] == torch.__version__ and record["date"]
    lines = (tmp_path / "bench.md").read_text().splitlines()
    header, _, *rows = (line for line in lines if line.startswith("|"))
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "policy",
        *(heading for heading, _ in COLUMNS.values()),
    ]
    assert all(len(row.strip("|").split("|")) == len(COLUMNS) + 1 for row in rows) and len(rows) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_needs(call):
    code, _, stderr = call()
    assert code == 2 and len(stderr.strip().splitlines()) == 1
    assert "needs a CUDA device" in stderr and "--size tiny --device cpu" in stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [(("--policies", "nosuch"), "unknown cache policy 'nosuch'"), (("--dtype", "int8"), "--dtype 'int8'")],
)
def test_bad_options_are_one_line(call, words, message):
    code, _, stderr = call("--size", "tiny", "--device", "cpu", *words)
    assert code == 2 and len(stderr.strip().splitlines()) == 1 and message in stderr
