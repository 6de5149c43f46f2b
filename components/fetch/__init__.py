"""Fetch the dense model as a checkpoint folder."""
