"""The pipelines and what compiles and runs them."""
