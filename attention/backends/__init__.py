"""Attention backends, by the name that YAML and the command line use."""

from functools import cache

from longtake.attention.backends.base import AttentionRequest, Backend, BackendUnavailable
from longtake.attention.backends.dense import Sdpa, SdpaMasked, Zentorch
from longtake.attention.backends.flashinfer import Flashinfer, FlashinferVariable
from longtake.attention.backends.flex import Flex, FlexEager
from longtake.attention.backends.gather_sdpa import GatherSdpa
from longtake.attention.backends.packages import Flash, Flash3, Flash4, Sage, Xformers
from longtake.configs.fields import choose

__all__ = ["BACKENDS", "AttentionRequest", "Backend", "BackendUnavailable", "find_backend"]

_CLASSES = (
    *(Sdpa, Zentorch, SdpaMasked, GatherSdpa, Flex, FlexEager),
    *(Flash, Flash3, Flash4, Xformers, Flashinfer, FlashinferVariable, Sage),
)
BACKENDS: dict[str, type[Backend]] = {cls.name: cls for cls in _CLASSES}


@cache
def find_backend(name: str) -> Backend:
    """Look a backend up by its name, or refuse it with the nearest one; backends hold no state."""
    return choose(BACKENDS, name, what="attention backend")()
