"""A model's weights put where a run wants them, and let go of when it needs them no more."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from longtake.configs.run import ModelConfig, RunConfig

if TYPE_CHECKING:
    from longtake.pipelines import LongVideoPipeline


def check_placing(model: ModelConfig, device: str) -> None:
    """Refuse offloading without a device to compute on, before any weight is loaded.

    Args:
        model: How it is to run.
        device: What ``model.device`` came to.

    Raises:
        ValueError: With the remedy.
    """
    if model.offload != "none" and device == "cpu":
        raise ValueError(
            f"model.offload={model.offload!r}: weights wait on the CPU for another device, and this run has none: use "
            "'none'"
        )


def place(pipe: "LongVideoPipeline", model: ModelConfig, device: str) -> "LongVideoPipeline":
    """Bring a pipeline to its device, whole or as its run wants it offloaded, and turn tiling on.

    Args:
        pipe: As loaded, on the CPU.
        model: How it is to run.
        device: What ``model.device`` came to.
    """
    if model.vae_tiling:
        pipe.enable_vae_tiling()
    if model.offload == "none":
        return pipe.to(device)
    (pipe.enable_model_cpu_offload if model.offload == "model" else pipe.enable_sequential_cpu_offload)(device=device)
    return pipe


def encode_and_free(pipe: "LongVideoPipeline", runs: Sequence[RunConfig]) -> None:
    """Let the text encoder go, if a run asks for it, once it has read the prompts of all; once is enough.

    Args:
        pipe: The model.
        runs: All that it is loaded for.
    """
    if pipe.text_encoder is None or not any(run.model.free_text_encoder for run in runs):
        return
    changes = [change.prompt for run in runs for change in run.prompt_changes]
    pipe.free_text_encoder([text for run in runs for text in (run.prompt, run.negative_prompt) if text] + changes)
