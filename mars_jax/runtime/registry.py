"""Registries: the members of a kind, such as convergence rules, by name.

A new member is one file and one line: built-in ones are listed where the registry is made, others call `register`.
"""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Generic, Protocol, TypeVar

from mars_jax.errors import ConfigError
from mars_jax.runtime.text import short


class Named(Protocol):
    """A member of a registry."""

    @property
    def name(self) -> str:
        """Name in configs, unique within the registry."""
        ...


T = TypeVar("T", bound=Named)


class Registry(Generic[T]):
    """Members of one kind by name, in the order they were listed and registered.

    Built-in members are imported at their first use, so names can be checked without importing JAX.
    """

    def __init__(self, kind: str, built_in: Mapping[str, str]) -> None:
        """Makes a registry.

        Args:
            kind: what its members are, for messages: "convergence rule".
            built_in: name -> "module:ATTRIBUTE".
        """
        self.kind = kind
        self._members: dict[str, T | str] = dict(built_in)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all members."""
        return tuple(self._members)

    def register(self, member: T) -> T:
        """Adds a member under its name, and returns it.

        Args:
            member: the new member.

        Raises:
            ConfigError: the name is taken by another member.
        """
        known = self._members.get(member.name)
        if known is not None and known is not member:
            raise ConfigError(f"there is a {self.kind} named {member.name!r} already. Give the new one another name.")
        self._members[member.name] = member
        return member

    def check(self, name: str) -> str:
        """Returns the name if a member has it.

        Raises:
            ConfigError: there is no such member.
        """
        if name not in self._members:
            near = get_close_matches(str(name)[:60], self.names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{self.kind} is {short(name)}; allowed: {', '.join(self.names)}.{hint}")
        return name

    def __getitem__(self, name: str) -> T:
        """The member with a name.

        Raises:
            ConfigError: there is no such member.
        """
        member = self._members[self.check(name)]
        if isinstance(member, str):
            module, _, attribute = member.partition(":")
            loaded: T = getattr(import_module(module), attribute)
            self._members[name] = member = loaded
        return member

    def __iter__(self) -> Iterator[T]:
        return (self[name] for name in self.names)
