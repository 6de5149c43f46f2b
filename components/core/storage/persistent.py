"""A store whose requests are sent again after faults that pass, beyond what its client library does by itself."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from components.core.retry import retried
from components.core.storage.base import Held, Store


class PersistentStore:
    """See `components.core.storage.base.Store`."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def list(self) -> dict[str, Held]:
        """See `Store`."""
        return retried(self.store.list)

    def put(self, files: Mapping[str, Path]) -> None:
        """See `Store`."""
        retried(lambda: self.store.put(files))

    def get(self, files: Mapping[str, Path]) -> None:
        """See `Store`."""
        retried(lambda: self.store.get(files))

    def read(self, name: str) -> bytes:
        """See `Store`."""
        return retried(lambda: self.store.read(name))

    def write(self, name: str, data: bytes) -> None:
        """See `Store`."""
        retried(lambda: self.store.write(name, data))

    def create(self, name: str, data: bytes) -> bool:
        """See `Store`; False may mean that an earlier try has written it, so the caller compares what is there."""
        return retried(lambda: self.store.create(name, data))

    def delete(self, names: Iterable[str]) -> None:
        """See `Store`."""
        names = list(names)
        retried(lambda: self.store.delete(names))
