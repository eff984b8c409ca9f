"""``info --plan`` and the check before a video, as a user meets them."""

import re
import shlex
from dataclasses import replace

import pytest
import torch

from longtake.cache import make_policy
from longtake.configs.loader import load_run
from longtake.pipelines import memory_plan as plans
from longtake.scripts import running
from longtake.scripts.info import _plan_request, _remedies

GB = 10**9


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine have another memory."""

    def have(total, available):
        monkeypatch.setattr(running, "machine_memory", lambda kind: (total, available))

    return have


def small_request(folder, *words, **options):
    return _plan_request(str(folder), family="mini", overrides=words, options={"dtype": None, "seconds": 10} | options)


def test_a_plan_names_everything_and_says_that_it_fits(call):
    code, text, _ = call("info", "mini", "--plan", "--seconds", "20", "--memory", "8GB")
    assert code == 0
    for row in ("transformer", "text_encoder", "vae", "keys and values", "read sets", "text keys", "forward", "VAE's"):
        assert row in text
    assert all(f"peak while {phase}" in text for phase in ("text encoding", "denoising", "decoding"))
    assert "2 guidance branches" in text and "it fits" in text and "planned for 8.00 GB" in text


def test_the_model_may_be_an_option(call):
    settings = ("--cache", "pack", "--seconds", "20", "--memory", "8GB")
    assert call("info", "--plan", "--model", "mini", *settings, "cache.num_sink_frames=4") == call(
        "info", "mini", "cache.num_sink_frames=4", "--plan", *settings
    )


def test_what_does_not_fit_gets_remedies_that_change_nothing_first(call):
    words = ("--cache", "deep_forcing", "--seconds", "120", "--device", "cuda")
    code, text, _ = call("info", "self_forcing", "--plan", *words, "--memory", "9GB")
    assert code == 0 and "it does not fit" in text
    order = ["free the text encoder", "only the part at work on the GPU", "keys and values in host memory", "bfloat16"]
    places = [text.index(f"{what}: saves") for what in order]
    assert places == sorted(places)
    assert "model.dtype=bfloat16" in text and "--cache offloaded cache.inner.policy=deep_forcing" in text
    peaks = [float(size) for size in re.findall(r"saves .* GB, ([\d.]+) GB", text)]
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] <= 9.0
    code, text, _ = call("info", "self_forcing", "--plan", "--cache", "pack", "--device", "cuda", "--memory", "9GB")
    assert "--cache pack cache.archive=host" in text


@pytest.mark.parametrize(
    ("cache", "words", "device"),
    [
        ("attention_sink", ["cache.num_context_frames=15"], "cpu"),
        ("attention_sink", ["cache.num_context_frames=15"], "cuda"),
        ("pack", ["cache.num_sink_frames=4"], "cuda"),
        ("forcing_kv", ["cache.heads=[[], [0, 2], [1], [], [3], []]"], "cuda"),
    ],
)
def test_flags_of_remedies_are_the_policies_they_plan(cache, words, device):
    """The words of a remedy, read as a shell does, give the very policy that its bytes are of."""
    request = _plan_request(
        "mini", overrides=words, device=device, options={"dtype": None, "seconds": 10, "cache": cache}
    )
    large = replace(request, height=640, width=640, num_latent_frames=60)
    found = 0
    for remedy, _ in _remedies(plans.plan_memory(large), 0):
        if remedy.words[0] == "--cache":
            _, name, *overrides = shlex.split(shlex.join(remedy.words))
            options = {"prompt": "plan", "model": "mini", "cache": name}
            assert make_policy(load_run(options=options, overrides=overrides).cache) == remedy.request.policy
            found += 1
    assert found


def run_of(folder):
    model = {"family": "mini", "path": str(folder), "device": "cpu"}
    return load_run(options={"prompt": "a red circle", "model": model, "seconds": 10})


def test_a_run_that_needs_more_than_is_free_is_warned_of_with_a_command_for_a_shell(
    machine, tmp_path, tiny_folder, capfd
):
    machine(64 * GB, 32 * GB)
    running.check_settings(run_of(tiny_folder))
    assert capfd.readouterr().err == ""
    machine(8 * GB, GB // 10)
    folder = tmp_path / "it's mine"
    folder.symlink_to(tiny_folder, target_is_directory=True)
    running.check_settings(run_of(folder))
    (line,) = capfd.readouterr().err.strip().splitlines()
    command = re.search(r"0.10 GB are free: (.*) shows why", line)[1]
    assert shlex.split(command) == ["longtake", "info", str(folder), "--plan"]


def test_a_run_that_no_such_machine_holds_is_refused_before_loading(
    tiny_folder, machine, monkeypatch, refused, tmp_path
):
    machine(GB // 10, GB // 10)
    monkeypatch.setattr("longtake.scripts.running.load_pipeline", lambda model: pytest.fail("loaded"))
    words = ("a red circle", "--model", tiny_folder, "--seconds", 2, "model.family=mini", "--out", tmp_path / "x")
    refused(("generate", *words), "0.10 GB in all", "--plan")


def test_options_reach_the_plan(tiny_folder):
    request = small_request(tiny_folder, "sampler.guidance_scale=1.0", dtype="bfloat16", height=96, width=128)
    assert (request.dtype, request.height, request.width) == (torch.bfloat16, 96, 128)
    assert request.num_branches == 1 and request.num_latent_frames == 41
