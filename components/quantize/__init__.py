"""Quantize the linear layers of a checkpoint to INT8 or FP8."""
