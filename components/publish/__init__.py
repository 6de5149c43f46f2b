"""Publish quantized models and their report under an immutable version, if they pass a quality gate."""
