"""Checkpoints read and renamed without the code under test."""

import pytest
import torch
from checkpoint_layouts import SIZES
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file

from longtake.models.checkpoints.files import Checkpoint

WRAPPERS = ("_fsdp_wrapped_module.", "model.")


@pytest.fixture(scope="session")
def header_only(tmp_path_factory):
    """Names and shapes without a file."""

    def make(entries):
        path = tmp_path_factory.mktemp("header") / "weights.pth"
        return Checkpoint(path=path, files=[path], container="pickle", entries=entries, read=pytest.fail)

    return make


@pytest.fixture(scope="session")
def read_by_hand():
    """A file's entry as float32 under stripped names, by torch and safetensors alone."""

    def read(path, entry=""):
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
        found = found[entry] if entry else found
        tensors = {name: value.float() for name, value in found.items() if isinstance(value, torch.Tensor)}
        for wrapper in WRAPPERS:
            tensors = {name.replace(wrapper, ""): value for name, value in tensors.items()}
        return tensors

    return read


@pytest.fixture(scope="session")
def build_reference():
    """The model with these weights, loaded strictly, renamed by diffusers' own rules."""

    def build(tensors, config=SIZES["tiny"]):
        if any(name.startswith("text_embedding") for name in tensors):
            tensors = convert_wan_transformer_to_diffusers(dict(tensors))
        model = WanTransformer3DModel(**config)
        model.load_state_dict(tensors, strict=True)
        return model.eval()

    return build
