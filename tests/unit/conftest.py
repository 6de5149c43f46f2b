"""Stores on loopback."""

from tests.stores import connect

__all__ = ["connect"]
