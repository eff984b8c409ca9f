"""Ways to compute attention, by the name that YAML and the command line use."""

from functools import cache

from longtake.attention.backends.base import Backend, Limits
from longtake.attention.backends.dense import Sdpa, SdpaMasked, Zentorch
from longtake.attention.backends.flash import Flash, Flash3, Flash4, Sage, Xformers
from longtake.attention.backends.flashinfer import Flashinfer, FlashinferVariable
from longtake.attention.backends.flex import Flex, FlexEager
from longtake.attention.backends.gather_sdpa import GatherSdpa
from longtake.attention.backends.torch_varlen import TorchVarlen
from longtake.configs.fields import choose

__all__ = ["BACKENDS", "Backend", "Limits", "find_backend"]

BACKENDS: dict[str, type[Backend]] = {
    "sdpa": Sdpa,
    "zentorch": Zentorch,
    "sdpa_masked": SdpaMasked,
    "gather_sdpa": GatherSdpa,
    "flex": Flex,
    "flex_eager": FlexEager,
    "flash": Flash,
    "flash3": Flash3,
    "flash4": Flash4,
    "torch_varlen": TorchVarlen,
    "xformers": Xformers,
    "flashinfer": Flashinfer,
    "flashinfer_variable": FlashinferVariable,
    "sage": Sage,
}


@cache
def find_backend(name: str) -> Backend:
    """The backend of a name; they hold no state.

    Raises:
        ValueError: If there is none of that name; offers the nearest.
    """
    return choose(BACKENDS, name, what="attention backend")()
