"""Which samplers there are, by the name that YAML and the command line use."""

from collections.abc import Mapping
from typing import Any

from longtake.configs.fields import make
from longtake.samplers.base import Sampler
from longtake.samplers.few_step import FewStep
from longtake.samplers.multi_step import MultiStep
from longtake.samplers.rolling_window import RollingWindow

SAMPLERS: dict[str, type[Sampler]] = {
    "few_step": FewStep,
    "multi_step": MultiStep,
    "rolling_window": RollingWindow,
}


def make_sampler(settings: Sampler | Mapping[str, Any] | str) -> Sampler:
    """Make a sampler from its YAML mapping.

    Args:
        settings: ``{"name": NAME, field: value, ...}``, a name alone (all defaults), or a sampler, which is returned.

    Raises:
        ValueError: If the name or a field is unknown, with the nearest known one, or a value does not fit.
    """
    if isinstance(settings, Sampler):
        return settings
    return make(SAMPLERS, settings, key="name", what="sampler")
