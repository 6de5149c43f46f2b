"""The pipelines, and the commands that compile, run and schedule them."""
