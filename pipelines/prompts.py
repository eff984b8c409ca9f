"""Changes of prompt: when they take effect, and what they do to the cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from longtake.cache import POLICIES, CachePolicy, Event

EVENTS: tuple[Event, ...] = get_args(Event)
"""From the weakest to the strongest."""


@dataclass(frozen=True)
class PromptSwitch:
    """A change of prompt.

    Attributes:
        start_frame: It takes effect at the first block that starts here or later.
        prompt_embeds: (batch, text_len, text_dim).
        event: What happens to the cache: ``keep`` leaves it as it is; the policy says which others it knows. At the
            very first block there is nothing to act on.
    """

    start_frame: int
    prompt_embeds: Tensor
    event: Event = "keep"


def check_event(policy: CachePolicy, event: str) -> None:
    """Refuse an event that does not exist or that the policy does not know.

    Raises:
        ValueError: Names the policy's events, or the policies that know this one.
    """
    if event not in EVENTS:
        raise ValueError(f"unknown prompt event {event!r}; known: {', '.join(EVENTS)}.")
    if event not in policy.events and event != "keep":
        known = [
            name for name, kind in POLICIES.items() if isinstance(kind.events, frozenset) and event in kind.events
        ]
        others = f", or a policy that does: {', '.join(known)}" if known else ""
        own = ", ".join(repr(name) for name in EVENTS if name == "keep" or name in policy.events)
        raise ValueError(
            f"cache policy {policy.name!r} does not support the prompt event {event!r}: use {own}{others}."
        )


def strongest(events: Sequence[Event]) -> Event:
    """Of several switches before one block: the last prompt counts, and the event that does most to the cache.

    What one of them asked to leave behind stays behind, whatever the others ask for.
    """
    return max(events, key=EVENTS.index)
