"""Registries: classes by the name that YAML and the command line use, imported when they are asked for.

A module that nothing asks for is not imported, and another package adds a class by an entry point, without a line
here.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

T = TypeVar("T")

POLICY_GROUP = "longtake.policies"  # entry-point group of cache policies


@cache
def external(group: str) -> Mapping[str, EntryPoint]:
    """Entry points of other packages in a group, by name."""
    return {entry.name: entry for entry in entry_points(group=group)}


class Registry(MutableMapping[str, type[T]], Generic[T]):
    """A mapping from names to classes.

    Args:
        base: What every class is a subclass of.
        places: ``module:Class`` by name; modules relative to ``longtake``.
        group: Entry points in which other packages name classes of theirs.
    """

    def __init__(self, base: type[T], places: Mapping[str, str], *, group: str | None = None) -> None:
        self.base, self.group = base, group
        self._places: dict[str, str | EntryPoint] = dict(places)
        self._classes: dict[str, type[T]] = {}
        self._is_complete = group is None

    def __getitem__(self, name: str) -> type[T]:
        """Import a class."""
        if name not in self._classes:
            place = self._places[name] if name in self._places else self._all()[name]
            self._classes[name] = self._loaded(name, place)
        return self._classes[name]

    def __setitem__(self, name: str, value: type[T]) -> None:
        self._classes[name] = value

    def __delitem__(self, name: str) -> None:
        del self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._all(), **self._classes})

    def __len__(self) -> int:
        return len({**self._all(), **self._classes})

    def _all(self) -> Mapping[str, str | EntryPoint]:
        if self.group is not None and not self._is_complete:
            for name, entry in external(self.group).items():
                if name in self._places:
                    raise ValueError(
                        f"the package {_package(entry)} names a class {name!r} in {self.group}, a name that longtake "
                        "has itself: rename it there or uninstall the package."
                    )
                self._places[name] = entry
            self._is_complete = True
        return self._places

    def _loaded(self, name: str, place: str | EntryPoint) -> type[T]:
        if isinstance(place, str):
            module, _, attribute = place.partition(":")
            return getattr(import_module(f"longtake.{module}"), attribute)
        try:
            found = place.load()
        except Exception as error:  # whatever another package raises when it is imported
            raise ValueError(f"{name!r} of the package {_package(place)} cannot be imported: {error}") from error
        if not (isinstance(found, type) and issubclass(found, self.base)):
            raise ValueError(
                f"{name!r} of the package {_package(place)} is {found!r}: it must be a {self.base.__name__}."
            )
        return found


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value
