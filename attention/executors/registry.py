"""Which ways to compute attention there are, by the name that YAML and the command line use."""

from functools import cache

from longtake.attention.executors.base import Executor
from longtake.attention.executors.dense import Sdpa, Zentorch
from longtake.attention.executors.flash import Flash, Flash3, Flash4
from longtake.attention.executors.flashinfer import Flashinfer, FlashinferVariable
from longtake.attention.executors.flex import Flex, FlexEager
from longtake.attention.executors.gather_sdpa import GatherSdpa
from longtake.attention.executors.sage import Sage
from longtake.attention.executors.sdpa_masked import SdpaMasked
from longtake.attention.executors.torch_varlen import TorchVarlen
from longtake.attention.executors.xformers import Xformers
from longtake.configs.fields import choose

EXECUTORS: dict[str, type[Executor]] = {
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
def executor(name: str) -> Executor:
    """The executor of a name; they hold no state.

    Raises:
        ValueError: If there is none of that name; offers the nearest.
    """
    return choose(EXECUTORS, name, what="attention backend")()
