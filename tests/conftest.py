"""Fixtures shared by all tests: tiny but real components with random weights."""

import pytest
import torch

SMALL = {"num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4}
SMALL |= {"text_dim": 16, "freq_dim": 32, "ffn_dim": 64, "num_layers": 2}


def build_tiny_pipeline(folder, *, seed: int = 0):
    """Write a complete diffusers Wan folder of a few MB with random weights."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    words = ["a", "red", "blue", "circle", "square", "moving", "left", "right", "over", "navy", "plain", "background"]
    words += ["then"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -3.0) for word in words)]
    pieces += [("▁", -8.0), *((letter, -8.0) for letter in "abcdefghijklmnopqrstuvwxyz")]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    config = UMT5Config(
        vocab_size=len(pieces), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, is_encoder_decoder=False
    )
    transformer = WanTransformer3DModel(**SMALL | {"text_dim": 32, "ffn_dim": 96})
    vae = AutoencoderKLWan(
        base_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        z_dim=4,
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(config).eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=True),
        transformer=transformer.eval(),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_transformer():
    """Makes a real transformer with random weights: two layers, two heads of 24, 4 latent and 16 text channels."""
    from diffusers import WanTransformer3DModel

    def make(**changes):
        torch.manual_seed(0)
        return WanTransformer3DModel(**SMALL | changes).eval()

    return make


@pytest.fixture(scope="module")
def transformer(make_transformer):
    """Two layers of it, the same weights in every module."""
    return make_transformer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A diffusers Wan folder with random weights: 8x8x4 compression, patch (1, 2, 2)."""
    return build_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_family():
    """Family of the tiny folder: 32x32 pixels, blocks of 3, two steps."""
    from longtake.configs.families import ModelFamily

    return ModelFamily(
        height=32, width=32, sampler={"name": "few_step", "timesteps": [1000, 500]}, max_sequence_length=16
    )


@pytest.fixture
def tiny_pipe(tiny_folder, tiny_family):
    """A freshly loaded pipeline of the tiny folder."""
    from longtake.pipelines import LongVideoPipeline

    pipe = LongVideoPipeline.from_pretrained(tiny_folder, family=tiny_family)
    pipe.set_progress_bar_config(disable=True)
    return pipe
