"""Adapters through diffusers' own loader, in cached rollouts."""

import copy

import pytest
import torch
from diffusers import WanPipeline
from rollouts import make_video

from longtake.cache import KVCache, Pass, make_policy
from longtake.models import CausalTransformer, Prompt, Segment
from longtake.pipelines import LongVideoPipeline

peft = pytest.importorskip("peft")

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
SCALE = 8 / 4  # alpha over rank


def run(pipe):
    return make_video(pipe, output_type="latent")


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory):
    """A file as training writes it, and the update of each weight that it stands for."""
    torch.manual_seed(0)
    pipe = WanPipeline.from_pretrained(tiny_folder)
    pipe.transformer.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    updates = {}
    for name, module in pipe.transformer.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            torch.nn.init.normal_(module.lora_B["default"].weight, std=0.2)
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            updates[f"{name}.weight"] = SCALE * (b @ a).detach()
    layers = peft.get_peft_model_state_dict(pipe.transformer)
    metadata = {"transformer": pipe.transformer.peft_config["default"].to_dict()}
    folder = tmp_path_factory.mktemp("adapter")
    WanPipeline.save_lora_weights(
        folder, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata["transformer"]
    )
    return folder, updates


def merged(transformer, updates):
    """The transformer with the updates added to its weights."""
    transformer = copy.deepcopy(transformer)
    weights = transformer.state_dict()
    transformer.load_state_dict({name: weight + updates.get(name, 0) for name, weight in weights.items()})
    return transformer


def test_a_rollout_with_an_adapter_is_one_with_merged_weights_and_unloading_restores_it(
    tiny_pipe, tiny_folder, tiny_family, adapter
):
    folder, updates = adapter
    assert len(updates) == 2 * 10, "two layers of ten matrices"
    plain = run(tiny_pipe)
    reference = LongVideoPipeline.from_pretrained(tiny_folder, family=tiny_family)
    reference.set_progress_bar_config(disable=True)
    reference.transformer = merged(reference.transformer, updates)
    expected = run(reference)
    assert (expected - plain).abs().max() > 0.1

    tiny_pipe.load_lora_weights(folder)
    assert tiny_pipe.get_active_adapters() == ["default_0"]
    assert (run(tiny_pipe) - expected).abs().max() < 1e-4
    tiny_pipe.set_adapters("default_0", 0.5)
    half = run(tiny_pipe)
    assert min((half - expected).abs().max(), (half - plain).abs().max()) > 0.01
    tiny_pipe.unload_lora_weights()
    assert torch.equal(run(tiny_pipe), plain)

    tiny_pipe.load_lora_weights(folder)
    tiny_pipe.fuse_lora()
    tiny_pipe.unload_lora_weights()
    assert (run(tiny_pipe) - expected).abs().max() < 1e-4


def test_an_adapter_comes_and_goes_while_the_causal_processors_are_installed(tiny_pipe, adapter):
    folder, updates = adapter
    transformer = tiny_pipe.transformer
    x = torch.randn(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    segment = Segment(Pass("denoise", 0, 0, 3, 0), 750.0)

    def flow(causal):
        geometry = causal.geometry((4, 4, 4), frames_per_block=3)
        prompt = Prompt(torch.ones(1, 16, 32))
        cache = KVCache(make_policy("full"), geometry, attention=causal.attention)
        return causal.flow(x, segments=[segment], cache=cache, prompt=prompt)

    reference = CausalTransformer(merged(transformer, updates))
    with reference.installed():
        expected = flow(reference)
    causal = CausalTransformer(transformer)
    stock = {"timestep": torch.tensor([500.0]), "encoder_hidden_states": torch.ones(1, 16, 32)}
    with torch.no_grad():
        before = transformer(x.transpose(1, 2), **stock).sample
        with causal.installed():
            plain = flow(causal)
            tiny_pipe.load_lora_weights(folder)
        # Timesteps are embedded once per rollout by the condition embedder, which has no adapter.
        with causal.installed():
            assert (flow(causal) - expected).abs().max() < 1e-5
            tiny_pipe.unload_lora_weights()
            assert torch.equal(flow(causal), plain)
        assert (expected - plain).abs().max() > 1e-3
        assert torch.equal(transformer(x.transpose(1, 2), **stock).sample, before)
