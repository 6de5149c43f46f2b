"""Distillation on many nodes: a launcher creates a Kubeflow job, watches it and fetches its result."""
