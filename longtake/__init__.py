"""longtake: minutes of video from causal video diffusion transformers, block by block, with a KV cache policy."""

from pathlib import Path as _Path

# In a checkout the sub-packages are the repository's top-level folders; an installed wheel has them here.
_root = _Path(__file__).resolve().parent.parent
if not (_Path(__file__).parent / "cache").exists() and (_root / "cache" / "__init__.py").exists():
    __path__.append(str(_root))

__version__ = "0.1.0"


def __getattr__(name: str):
    # diffusers and transformers take seconds to import: only what needs them pays.
    if name == "LongVideoPipeline":
        from longtake.pipelines import LongVideoPipeline

        return LongVideoPipeline
    raise AttributeError(f"module 'longtake' has no attribute {name!r}")
