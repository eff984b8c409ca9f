"""A tiny transformer, its names written out by hand, and a conversion that shares nothing with the one under test."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file

from longtake.models.checkpoints.files import Checkpoint

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
}
BLOCK = ["modulation", "norm3.weight", "norm3.bias"]
BLOCK += [f"ffn.{i}.{x}" for i in (0, 2) for x in ("weight", "bias")]
for part in ("self_attn", "cross_attn"):
    BLOCK += [f"{part}.{i}.{x}" for i in "qkvo" for x in ("weight", "bias")]
    BLOCK += [f"{part}.norm_{i}.weight" for i in "qk"]
OUTSIDE = ["head.modulation"] + [
    f"{part}.{x}"
    for part in (
        "patch_embedding",
        "text_embedding.0",
        "text_embedding.2",
        "time_embedding.0",
        "time_embedding.2",
        "time_projection.1",
        "head.head",
    )
    for x in ("weight", "bias")
]
WRAPPERS = ("_fsdp_wrapped_module.", "model.")


@pytest.fixture(scope="session")
def header_only(tmp_path_factory):
    """Names and shapes without a file."""

    def make(entries):
        path = tmp_path_factory.mktemp("header") / "weights.pth"
        return Checkpoint(path=path, files=[path], container="pickle", entries=entries, reader=pytest.fail)

    return make


@pytest.fixture(scope="session")
def original_names():
    def names(num_layers):
        return OUTSIDE + [f"blocks.{i}.{name}" for i in range(num_layers) for name in BLOCK]

    return names


@pytest.fixture(scope="session")
def read_by_hand():
    """A file's entry as float32 under stripped names, by torch and safetensors alone."""

    def read(path, entry=None):
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        found = found if entry is None else found[entry]
        tensors = {name: value.float() for name, value in found.items() if isinstance(value, torch.Tensor)}
        for wrapper in WRAPPERS:
            tensors = {name.replace(wrapper, ""): value for name, value in tensors.items()}
        return tensors

    return read


@pytest.fixture(scope="session")
def build_reference():
    """The model with these weights, loaded strictly, renamed by diffusers' own rules."""

    def build(tensors, config=TINY):
        if any(name.startswith("text_embedding") for name in tensors):
            tensors = convert_wan_transformer_to_diffusers(dict(tensors))
        model = WanTransformer3DModel(**config)
        model.load_state_dict(tensors, strict=True)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def forward():
    """One pass over two frames of random numbers, float32."""

    def run(model):
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            return model(
                torch.randn(1, model.config.in_channels, 2, 4, 6, generator=generator),
                torch.tensor([500.0]),
                torch.randn(1, 5, model.config.text_dim, generator=generator),
                return_dict=False,
            )[0]

    return run


@pytest.fixture(scope="session")
def tiny_config():
    return TINY
