"""longtake: minutes of video from causal video diffusion transformers, block by block, with a KV cache policy."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a checkout the sub-packages are relative links; git writes them as small text files where it may not make links.
if (_Path(__file__).parent / "cache").is_file():
    raise ImportError(
        "longtake/cache and its neighbours are text files here, not links: allow links (Windows: developer mode), then "
        "`git config core.symlinks true` and `git checkout -- longtake`; or install a wheel."
    )


def __getattr__(name: str):
    # diffusers and transformers take seconds to import: only what needs them pays.
    if name == "LongVideoPipeline":
        from longtake.pipelines import LongVideoPipeline

        return LongVideoPipeline
    raise AttributeError(f"module 'longtake' has no attribute {name!r}")
