"""Presets, licences, numerics, decoders and memory options, with a random model in the place of the real ones."""

import json
from contextlib import contextmanager

import pytest
import torch
import yaml
from cli import OTHER, PROMPT, hashes
from safetensors.torch import save_file

from longtake.configs.loader import load_preset
from longtake.models import TinyVae
from longtake.models.tiny_vae import TinyLayout
from longtake.pipelines.run_folder import RunFolder
from longtake.scripts import generate as generate_module

# A tiny folder in the place of 1.3 billion numbers.
ANY = ("model.any_size=true", "height=32", "width=32", "output.state_every_blocks=2")


@pytest.fixture
def make(call, tiny_folder):
    """Makes a video of the random model as another family's."""

    def run(model, out, *words, seconds=1.5):
        options = ("--model", f"{model}={tiny_folder}", "--seconds", seconds, "--out", out)
        return call("generate", PROMPT, *options, *ANY, *words)

    return run


@pytest.mark.parametrize(
    ("model", "sampler", "cache", "licence"),
    [
        ("self_forcing", "few_step", "attention_sink", None),
        ("longlive", "few_step", "longlive", None),
        ("rolling_forcing", "rolling_window", "rolling_forcing", "terms of its own, academic use only"),
        ("causvid", "few_step", "attention_sink", "CC-BY-NC-SA-4.0, no commercial use"),
        ("causal_forcing_1step", "few_step", "attention_sink", None),
    ],
)
def test_a_preset_and_a_folder_make_a_video(make, tmp_path, model, sampler, cache, licence):
    code, stdout, stderr = make(model, tmp_path / "take")
    assert code == 0 and "video.mp4" in stdout, stderr
    config = yaml.safe_load((tmp_path / "take" / "config.yaml").read_text())
    assert (config["model"]["family"], config["sampler"]["name"]) == (model, sampler)
    assert config["cache"] == load_preset("cache", cache)
    told = [line for line in stderr.splitlines() if line.startswith("licence of")]
    assert told == ([f"licence of {model}: {licence}"] if licence else [])
    assert RunFolder(tmp_path / "take").record["video"]["num_frames"] == 25


@pytest.fixture(scope="module")
def changing(tmp_path_factory):
    """A run whose prompt changes."""
    path = tmp_path_factory.mktemp("config") / "take.yaml"
    path.write_text(yaml.safe_dump({"prompt_changes": [{"at": 1.2, "prompt": OTHER}], "negative_prompt": "plain"}))
    return path


def test_without_the_text_encoder_runs_go_on_to_the_same_frames(make, call, tmp_path, changing, monkeypatch):
    words = ("--config", changing, "sampler={name: multi_step, num_inference_steps: 2, solver: euler}")
    whole, stopped, forked = tmp_path / "whole", tmp_path / "stopped", tmp_path / "forked"
    assert make("self_forcing", whole, *words, seconds=3)[0] == 0

    @contextmanager
    def stop_after_three():
        asked = []
        yield lambda: asked.append(1) or len(asked) > 2

    with monkeypatch.context() as patch:
        patch.setattr(generate_module, "stop_requests", stop_after_three)
        code, _, stderr = make("self_forcing", stopped, *words, "--free-text-encoder", seconds=3)
    assert code == 130 and "longtake resume" in stderr
    assert 0 < len(hashes(stopped)) < len(hashes(whole))
    assert RunFolder(stopped).config.model.free_text_encoder
    assert call("resume", stopped)[0] == 0
    assert hashes(stopped) == hashes(whole)

    code, _, stderr = call("fork", stopped, "--at", "2s", "--prompt", PROMPT, "--out", forked)
    assert code == 0, stderr
    # Blocks begin at 0, 0.6, 1.3, 2.1 and 2.8 seconds.
    assert hashes(forked)[:3] == hashes(whole)[:3] and hashes(forked)[3] != hashes(whole)[3]


def test_many_prompts_are_encoded_before_the_encoder_goes(call, tiny_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n{OTHER}\n")
    model = ("--model", f"self_forcing={tiny_folder}", "--seconds", 1, *ANY)
    command = ("generate", "--prompts", tmp_path / "prompts.txt", *model)
    assert call(*command, "--out", tmp_path / "freed", "--free-text-encoder")[0] == 0
    assert call(*command, "--out", tmp_path / "plain")[0] == 0
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert len(names) == 2
    for name in names:
        assert hashes(tmp_path / "freed" / name) == hashes(tmp_path / "plain" / name)


def test_a_run_in_tiles_resumes_in_tiles(make, call, tmp_path):
    code, _, stderr = make("self_forcing", tmp_path / "take", "model.vae_tiling=true", seconds=2)
    assert code == 0, stderr
    code, _, stderr = call("fork", tmp_path / "take", "--at", "1s", "--seconds", 2.5, "--out", tmp_path / "longer")
    assert code == 0, stderr
    assert hashes(tmp_path / "longer")[:3] == hashes(tmp_path / "take")[:3]


def test_info_says_how_a_family_is_run_and_where_its_weights_are(call):
    code, stdout, _ = call("info", "longlive")
    text = " ".join(stdout.split())
    assert code == 0
    for expected in (
        "own cache policy=longlive, num_context_frames=12",
        "begins from text, video",
        "size 1.3B",
        "context timestep 0",
        "file models/longlive_base.pt, entry generator",
        "adapter models/lora.pt, entry generator_lora, alpha 256",
    ):
        assert expected in text, text
    text = " ".join(call("info", "causal_forcing_2step")[1].split())
    assert "first_block_timesteps=[1000, 750, 500, 250]" in text and "begins from text, image, video" in text
    assert "CC-BY-NC-SA-4.0, no commercial use" in " ".join(call("info", "krea_14b")[1].split())


def write_tiny_vae(path, seed=0):
    torch.manual_seed(seed)
    vae = TinyVae(TinyLayout(latent_channels=4, widths=(8, 6, 6, 4)))
    vae.decoder["22"].bias.data.fill_(0.5)
    save_file(vae.state_dict(), path)
    return path


def tiny(folder, *words):
    settings = ("model.family=mini", "model.dtype=bfloat16", "output.state_every_blocks=2", "--sampler", "few_step")
    return ("generate", PROMPT, *words, "--model", folder, "--seconds", 3, *settings)


@pytest.fixture
def fast_run(tiny_folder, tmp_path, call):
    """A finished run with both options, and its fast VAE's file."""
    file, path = write_tiny_vae(tmp_path / "it's tiny.safetensors"), tmp_path / "take"
    result = call(*tiny(tiny_folder, "--numerics", "upstream", "--fast-vae", file, "--out", path))
    assert result[0] == 0, result[2]
    return path, file


def test_record_resume_and_fork_keep_both(fast_run, tiny_folder, tmp_path, call, refused):
    path, file = fast_run
    record = json.loads((path / "run.json").read_text())
    assert record["fast_vae"]["num_bytes"] == file.stat().st_size and len(record["fast_vae"]["sha256"]) == 64
    model = RunFolder(path).config.model
    assert (model.numerics, model.fast_vae) == ("upstream", str(file))

    assert call(*tiny(tiny_folder, "--fast-vae", file, "--out", tmp_path / "native"))[0] == 0
    assert hashes(tmp_path / "native") != hashes(path)

    fork = tmp_path / "fork"
    assert call("fork", path, "--at", "2s", "--seconds", "4", "--out", fork)[0] == 0
    assert RunFolder(fork).config.model == model
    assert json.loads((fork / "run.json").read_text())["fast_vae"] == record["fast_vae"]
    assert hashes(fork)[: len(hashes(path)) - 1] == hashes(path)[:-1]

    RunFolder(path).update_record(status="running")
    assert call("resume", path)[0] == 0
    write_tiny_vae(file, seed=1)
    RunFolder(path).update_record(status="running")
    refused(("resume", path), "another fast VAE")
    file.unlink()
    refused(("resume", path), "does not exist any more")
