"""Distillation from the dense teacher into the sparse student, under its mask."""
