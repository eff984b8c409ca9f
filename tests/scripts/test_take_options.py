"""``--numerics`` and ``--fast-vae``: into the run's record, through resume and fork, refused in one line."""

import json

import pytest
import torch
from safetensors.torch import save_file

from longtake.configs.loader import load_run
from longtake.models import TinyVae
from longtake.models.tiny_vae import TinyLayout
from longtake.pipelines.run_folder import RunFolder
from longtake.scripts.console import run_app
from longtake.scripts.main import app

PROMPT = "a red circle moving left"


def write(path, seed=0, channels=4):
    torch.manual_seed(seed)
    vae = TinyVae(TinyLayout(latent_channels=channels, widths=(8, 6, 6, 4)))
    vae.decoder["22"].bias.data.fill_(0.5)
    save_file(vae.state_dict(), path)
    return path


def call(capfd, *words):
    code = run_app(app, [str(word) for word in words])
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def tiny(folder, *words):
    settings = ("model.family=mini", "model.dtype=bfloat16", "output.state_every_blocks=2", "--sampler", "few_step")
    return ("generate", PROMPT, *words, "--model", folder, "--seconds", 3, *settings)


def hashes(path):
    return [entry["sha256"] for entry in RunFolder(path).blocks()]


@pytest.fixture
def fast_run(tiny_folder, tmp_path, capfd):
    """A finished run with both options, and its fast VAE's file."""
    file, path = write(tmp_path / "it's tiny.safetensors"), tmp_path / "take"
    result = call(capfd, *tiny(tiny_folder, "--numerics", "upstream", "--fast-vae", file, "--out", path))
    assert result[0] == 0, result[2]
    return path, file


def test_record_resume_and_fork_keep_both(fast_run, tiny_folder, tmp_path, capfd):
    path, file = fast_run
    record = json.loads((path / "run.json").read_text())
    assert record["fast_vae"]["num_bytes"] == file.stat().st_size and len(record["fast_vae"]["sha256"]) == 64
    model = RunFolder(path).config.model
    assert (model.numerics, model.fast_vae) == ("upstream", str(file))

    assert call(capfd, *tiny(tiny_folder, "--fast-vae", file, "--out", tmp_path / "native"))[0] == 0
    assert hashes(tmp_path / "native") != hashes(path)

    fork = tmp_path / "fork"
    assert call(capfd, "fork", path, "--at", "2s", "--seconds", "4", "--out", fork)[0] == 0
    assert RunFolder(fork).config.model == model
    assert json.loads((fork / "run.json").read_text())["fast_vae"] == record["fast_vae"]
    assert hashes(fork)[: len(hashes(path)) - 1] == hashes(path)[:-1]

    RunFolder(path).update_record(status="running")
    assert call(capfd, "resume", path)[0] == 0
    write(file, seed=1)
    RunFolder(path).update_record(status="running")
    code, _, stderr = call(capfd, "resume", path)
    assert code == 2 and "another fast VAE" in stderr and stderr.strip().count("\n") == 0
    file.unlink()
    code, _, stderr = call(capfd, "resume", path)
    assert code == 2 and "does not exist any more" in stderr


def test_what_does_not_fit_is_one_line(tmp_path, capfd):
    wan = write(tmp_path / "wan.safetensors", channels=16)
    out = ("--out", tmp_path / "out", "--seconds", 1)
    for words, said in (
        (("--fast-vae", wan), "16 channels in a latent, this model has 12"),
        (("--fast-vae", tmp_path / "none.pth"), "does not exist"),
        (("--numerics", "exact"), "numerics"),
        (("--numerics", "upstream", "--sampler", "multi_step"), "few_step, rolling_window"),
    ):
        code, _, stderr = call(capfd, "generate", PROMPT, *words, *out)
        assert code == 2 and said in stderr and len(stderr.strip().splitlines()) == 1, stderr
    assert not (tmp_path / "out").exists()


def test_configuration_has_both(tmp_path):
    run = load_run(overrides=["prompt=x", "model.numerics=upstream", "model.fast_vae=tiny.pth"])
    assert (run.model.numerics, run.model.fast_vae) == ("upstream", "tiny.pth")
    assert load_run(overrides=["prompt=x"]).model.numerics == "native"
    with pytest.raises(ValueError, match="numerics"):
        load_run(overrides=["prompt=x", "model.numerics=exact"])
