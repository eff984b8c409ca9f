"""`longtake convert` and `longtake info FILE` as a user meets them."""

import json

import pytest
import torch
import typer
from diffusers import WanPipeline, WanTransformer3DModel
from make_checkpoint import write_family

from benchmarks import conversion as measure_conversion
from longtake.scripts.console import run_app
from longtake.scripts.main import app


@pytest.fixture
def make(tmp_path):
    """Writes a family's files; returns them."""
    return lambda family: write_family(tmp_path / family, family)


def test_convert_and_say_what_was_done(make, tmp_path, call, refused):
    (source,) = make("self_forcing")
    out = tmp_path / "out"
    words = ("convert", source, "--out", out)
    code, stdout, stderr = call(*words, "--dtype", "bfloat16", "--max-shard-size", "20KB")
    assert code == 0, stderr
    assert stdout.strip() == str(out)
    for text in ("generator_ema", "prefixes removed  model", "bfloat16 (the file: float32)", "69 tensors, 0.0 MB in",
                 "the transformer alone", "--vae, --text-encoder and --tokenizer"):  # fmt: skip
        assert text in " ".join(stderr.replace("\n", " ").split(" ")), stderr
    record = json.loads((out / "conversion.json").read_text())
    assert (record["source"], record["entry"], record["dtype"]) == ("self_forcing_dmd.pt", "generator_ema", "bfloat16")
    assert WanTransformer3DModel.from_pretrained(out, torch_dtype=torch.bfloat16).num_parameters() == 19_640
    refused(words, "exists already; nothing is overwritten")


def test_an_adapter_and_its_alpha(make, tmp_path, call, refused):
    base, lora = make("longlive")
    words = ("convert", base, "--out", tmp_path / "out", "--lora", lora)
    refused(words, "does not say its alpha", "--lora-alpha")
    code, _, stderr = call(*words, "--lora-alpha", 8)
    assert code == 0 and "20 pairs merged, rank 4, alpha / rank 2" in stderr
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())["lora"]
    assert record == {"source": "lora.pt", "entry": "generator_lora", "num_pairs": 20, "ranks": [4], "scales": [2.0]}


def test_a_pipeline_that_generates(tiny_folder, tmp_path, call):
    out = tmp_path / "model"
    words = ("--vae", tiny_folder, "--text-encoder", tiny_folder / "text_encoder", "--tokenizer", tiny_folder)
    code, _, stderr = call("convert", tiny_folder / "transformer", "--out", out, *words, "--preset", "mini")
    assert code == 0, stderr
    assert f'longtake generate "..." --model {out} model.family=mini' in stderr and "licence" in stderr
    assert WanPipeline.from_pretrained(out).scheduler.config.shift == 3.0  # the preset's
    settings = ("model.family=mini", "--seconds", 1, "--out", tmp_path / "take")
    code, _, stderr = call("generate", "a red circle", "--model", out, *settings)
    assert code == 0 and (tmp_path / "take" / "video.mp4").is_file(), stderr
    code, stdout, _ = call("info", out, "--family", "mini")
    assert code == 0 and "2 layers, 2 heads of 24" in stdout


def test_info_of_a_file(make, call):
    (source,) = make("self_forcing_training")
    code, stdout, _ = call("info", source)
    assert code == 0 and "3 entries" in stdout and "taken unasked  generator_ema" in stdout


def test_the_full_size_measurement_at_tiny_size(tmp_path, call, monkeypatch):
    def convert(*words):  # in this process, which has torch already
        assert run_app(app, list(words)) == 0
        return 1.0, 10**9

    monkeypatch.setattr(measure_conversion, "_convert", convert)
    program = typer.Typer()
    program.command()(measure_conversion.measure_conversion)
    code, stdout, stderr = call("--size", "tiny", "--folder", tmp_path, program=program)
    assert code == 0, stderr
    assert "peak resident memory" in stdout and "19,640 numbers" in stdout and "numbers equal to those made" in stdout
    assert list(tmp_path.iterdir()) == []
