"""Less memory: offloaded weights, a VAE in tiles, no text encoder. The frames stay what they were."""

import gc
import weakref

import accelerate
import pytest
import torch
from diffusers import WanPipeline
from rollouts import OTHER, PROMPT, SINK, joined, joined_frames
from rollouts import make_video as run

from longtake.models import TiledDecoder
from longtake.models.wan import execution_device, offload_hooks

SETTINGS = {"num_frames": 33, "cache": SINK, "seed": 3}


def model_offload(pipe, tmp_path):
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe, tmp_path):
    """Do as ``enable_sequential_cpu_offload`` to each component; the text encoder's tied weights fail on a CPU."""
    accelerate.cpu_offload(pipe.transformer, "cpu")
    accelerate.cpu_offload(pipe.vae, "cpu")


def disk_offload(pipe, tmp_path):
    accelerate.disk_offload(pipe.transformer, tmp_path / "weights", execution_device="cpu")


def group_offload(pipe, tmp_path):
    """Weights of a block leave memory for the disk between its turns, so that missing ones are noticed."""
    cpu, kind = torch.device("cpu"), {"offload_type": "block_level", "num_blocks_per_group": 1}
    settings = {"onload_device": cpu, "offload_device": cpu, "offload_to_disk_path": str(tmp_path)}
    pipe.transformer.enable_group_offload(**settings, **kind)


def leaf_offload(pipe, tmp_path):
    """Without the text encoder: its tied weights come back wrong from the disk, in diffusers by itself."""
    cpu = torch.device("cpu")
    settings = {"onload_device": cpu, "offload_device": cpu, "offload_to_disk_path": str(tmp_path)}
    pipe.enable_group_offload(**settings, offload_type="leaf_level", exclude_modules=["text_encoder"])


@pytest.mark.parametrize("offload", [model_offload, sequential_offload, disk_offload, group_offload, leaf_offload])
def test_offloaded_weights_give_the_same_frames_and_stay_offloaded(tiny_pipe, tmp_path, offload):
    expected = run(tiny_pipe)
    offload(tiny_pipe, tmp_path)
    assert execution_device(tiny_pipe.transformer).type == "cpu"
    for _ in range(2):
        # Weights that were read again lie elsewhere in memory, and sums over them may begin at another place.
        assert (run(tiny_pipe) - expected).abs().max() < 1e-5
    block = tiny_pipe.transformer.blocks[1]
    assert bool(offload_hooks(block)) == (offload is not model_offload)
    assert block.scale_shift_table.is_meta == (offload in (sequential_offload, disk_offload))


@pytest.mark.parametrize("offload", [disk_offload, group_offload])
def test_a_block_whose_weights_nobody_brings_is_noticed(tiny_pipe, tmp_path, monkeypatch, offload):
    expected = run(tiny_pipe)
    offload(tiny_pipe, tmp_path)
    monkeypatch.setattr("longtake.models.numerics.offload_hooks", lambda module: [])
    if offload is disk_offload:
        with pytest.raises(RuntimeError):
            run(tiny_pipe)
    else:
        assert not (run(tiny_pipe) - expected).abs().max() < 1e-5


def test_layers_stored_in_another_type_are_cast_for_their_turn(tiny_pipe):
    expected = run(tiny_pipe)
    tiny_pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert tiny_pipe.transformer.blocks[0].ffn.net[2].weight.dtype == torch.bfloat16
    assert 0 < (run(tiny_pipe) - expected).abs().max() < 0.1


def test_a_video_decoded_in_tiles_is_diffusers_tiled_decode_and_continues(tiny_pipe):
    whole = run(tiny_pipe)
    sizes = {"min_height": 16, "min_width": 24, "stride_height": 8, "stride_width": 16}
    tiny_pipe.enable_vae_tiling(**{f"tile_sample_{name}": size for name, size in sizes.items()})
    session = tiny_pipe.start(PROMPT, **SETTINGS)
    chunks = [session.next_block()]
    tensors, numbers = session.state_dict()
    tensors = {key: value.clone() for key, value in tensors.items()}
    assert {key.split(".")[1] for key in tensors if key.startswith("decoder.")} >= {"tile_0_0", "tile_3_1"}
    chunks += list(session)
    with torch.no_grad():
        offline = tiny_pipe.vae.decode(joined(chunks).transpose(1, 2)).sample.mul(0.5).add(0.5).transpose(1, 2)
    video = joined_frames(chunks)
    assert (video - offline).abs().max() < 1e-6
    assert not torch.equal(video, whole)

    again = tiny_pipe.start(PROMPT, **SETTINGS)
    again.load_state_dict(tensors, numbers)
    assert torch.equal(joined_frames(again), video[:, 9:])

    tiny_pipe.disable_vae_tiling()
    assert torch.equal(run(tiny_pipe), whole)
    with pytest.raises(ValueError, match="VAE stream state"):
        tiny_pipe.start(PROMPT, **SETTINGS).load_state_dict(tensors, numbers)


def test_diffusers_own_switch_turns_tiles_on_and_off(tiny_pipe):
    tiny_pipe.vae.enable_tiling()
    assert isinstance(tiny_pipe.start(PROMPT, **SETTINGS)._decoder, TiledDecoder)
    video = run(tiny_pipe)
    tiny_pipe.vae.disable_tiling()
    assert torch.equal(video, run(tiny_pipe)), "one tile of 256 pixels holds the whole frame"


def test_the_text_encoder_goes_and_its_prompts_stay(tiny_pipe):
    guided = {"sampler": {"name": "multi_step", "num_inference_steps": 2}}
    schedule = [(0.6, OTHER)]
    expected = run(tiny_pipe, schedule=schedule), run(tiny_pipe, **guided)
    encoder = weakref.ref(tiny_pipe.text_encoder)
    tiny_pipe.free_text_encoder([PROMPT, OTHER])
    gc.collect()
    assert encoder() is None and tiny_pipe.text_encoder is None
    assert torch.equal(run(tiny_pipe, schedule=schedule), expected[0])
    assert torch.equal(run(tiny_pipe, **guided), expected[1]), "the empty negative prompt is known too"
    for refused in (
        lambda: run(tiny_pipe, "a red square"),
        lambda: run(tiny_pipe, schedule=[(0.6, "a red square")]),
        lambda: tiny_pipe.free_text_encoder(["a red square"]),
        lambda: run(tiny_pipe, negative_prompt="a red square", **guided),
    ):
        with pytest.raises(ValueError, match="is freed and never read the prompt 'a red square'"):
            refused()
    tiny_pipe.free_text_encoder([PROMPT])
    assert torch.equal(run(tiny_pipe, schedule=schedule), expected[0]), "what was known stays known"


def test_offloading_lets_a_freed_text_encoder_go(tiny_pipe, tmp_path):
    expected = run(tiny_pipe)
    model_offload(tiny_pipe, tmp_path)
    encoder = weakref.ref(tiny_pipe.text_encoder)
    tiny_pipe.free_text_encoder([PROMPT])
    gc.collect()
    assert encoder() is None
    assert torch.equal(run(tiny_pipe), expected)


def test_a_folder_is_not_written_without_its_text_encoder(tiny_pipe, tmp_path):
    tiny_pipe.free_text_encoder()
    with pytest.raises(ValueError, match="text encoder is freed"):
        tiny_pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    assert isinstance(tiny_pipe, WanPipeline)
