"""``info --plan`` and the check before a video, as a user meets them."""

import re
import shlex
from dataclasses import replace

import pytest
import torch
from cli import assert_one_line, call

from longtake.cache import make_policy
from longtake.configs.loader import load_run
from longtake.pipelines import memory_plan as plans
from longtake.scripts import running
from longtake.scripts.info import _parse_memory, _plan_request, _remedies

GB = 10**9


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine have another memory."""

    def have(total, available):
        monkeypatch.setattr(running, "machine_memory", lambda kind: (total, available))

    return have


def small_request(folder, *words, **options):
    return _plan_request(str(folder), family="mini", overrides=words, options={"dtype": None, "seconds": 10} | options)


def test_a_plan_names_everything_and_says_that_it_fits(capfd):
    code, text, _ = call(capfd, "info", "mini", "--plan", "--seconds", "20", "--memory", "8GB")
    assert code == 0
    for row in ("transformer", "text_encoder", "vae", "keys and values", "read sets", "text keys", "forward", "VAE's"):
        assert row in text
    assert all(f"peak while {phase}" in text for phase in ("text encoding", "denoising", "decoding"))
    assert "2 guidance branches" in text and "it fits" in text and "planned for 8.00 GB" in text


def test_the_model_may_be_an_option(capfd):
    settings = ("--cache", "pack", "--seconds", "20", "--memory", "8GB")
    assert call(capfd, "info", "--plan", "--model", "mini", *settings, "cache.num_sink_frames=4") == call(
        capfd, "info", "mini", "cache.num_sink_frames=4", "--plan", *settings
    )
    assert_one_line(call(capfd, "info", "--plan"), "no model is named")


def test_what_does_not_fit_gets_remedies_that_change_nothing_first(capfd):
    words = ("--cache", "deep_forcing", "--seconds", "120", "--device", "cuda")
    code, text, _ = call(capfd, "info", "self_forcing", "--plan", *words, "--memory", "9GB")
    assert code == 0 and "it does not fit" in text
    order = ["free the text encoder", "only the part at work on the GPU", "keys and values in host memory", "bfloat16"]
    places = [text.index(f"{what}: saves") for what in order]
    assert places == sorted(places)
    assert "model.dtype=bfloat16" in text and "--cache offloaded cache.inner.policy=deep_forcing" in text
    peaks = [float(size) for size in re.findall(r"saves .* GB, ([\d.]+) GB", text)]
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] <= 9.0
    code, text, _ = call(
        capfd, "info", "self_forcing", "--plan", "--cache", "pack", "--device", "cuda", "--memory", "9GB"
    )
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


def test_commands_are_for_a_shell(machine, tmp_path, tiny_folder, capfd):
    machine(8 * GB, GB // 10)
    folder = tmp_path / "it's mine"
    folder.symlink_to(tiny_folder, target_is_directory=True)
    running.check_settings(run_of(folder))
    command = re.search(r"free: (.*) shows why", capfd.readouterr().err)[1]
    assert shlex.split(command) == ["longtake", "info", str(folder), "--plan"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nosuch", "--plan"), "unknown model family or folder 'nosuch'"),
        (("mini", "--plan", "--memory", "8X"), "--memory '8X' is no size"),
        (("mini", "--plan", "--memory", "0GB"), "is no size"),
        (("mini", "--plan", "--batch", "0"), "--batch 0"),
        (("mini", "--plan", "--device", "tpu"), "--device 'tpu'"),
        (("mini", "--plan", "cache.num_sink_frame=3"), "Did you mean 'num_sink_frames'"),
        (("mini", "--plan", "--height", "65"), "height=65"),
        (("mini", "cache.num_sink_frames=3"), "settings are for --plan"),
    ],
)
def test_bad_words_are_one_line(capfd, words, message):
    assert_one_line(call(capfd, "info", *words), message)


def test_sizes_are_read_with_their_units():
    assert _parse_memory("8GB") == 8 * GB
    assert _parse_memory(" 1.5 GiB") == 3 * 2**29
    assert _parse_memory("1000") == 1000


def run_of(folder):
    model = {"family": "mini", "path": str(folder), "device": "cpu"}
    return load_run(options={"prompt": "a red circle", "model": model, "seconds": 10})


def test_a_run_that_fits_is_not_spoken_of(tiny_folder, machine, capfd):
    machine(64 * GB, 32 * GB)
    running.check_settings(run_of(tiny_folder))
    assert capfd.readouterr().err == ""


def test_a_run_that_needs_more_than_is_free_is_warned_of(tiny_folder, machine, capfd):
    machine(8 * GB, GB // 10)
    running.check_settings(run_of(tiny_folder))
    text = capfd.readouterr().err
    assert len(text.strip().splitlines()) == 1 and "0.10 GB are free" in text and "--plan" in text


def test_a_run_that_no_such_machine_holds_is_refused_before_loading(
    tiny_folder, machine, monkeypatch, capfd, tmp_path
):
    machine(GB // 10, GB // 10)
    monkeypatch.setattr("longtake.scripts.running.load_pipeline", lambda model: pytest.fail("loaded"))
    words = ("a red circle", "--model", tiny_folder, "--seconds", 2, "model.family=mini", "--out", tmp_path / "x")
    assert_one_line(call(capfd, "generate", *words), "0.10 GB in all", "--plan")


def test_options_reach_the_plan(tiny_folder):
    request = small_request(tiny_folder, "sampler.guidance_scale=1.0", dtype="bfloat16", height=96, width=128)
    assert (request.dtype, request.height, request.width) == (torch.bfloat16, 96, 128)
    assert request.num_branches == 1 and request.num_latent_frames == 41
