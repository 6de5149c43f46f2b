"""Stages of the compression pipeline, one folder a stage; `core` holds what they share."""
