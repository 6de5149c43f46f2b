"""Stores on loopback."""

from tests.stores import connect, servers

__all__ = ["connect", "servers"]
