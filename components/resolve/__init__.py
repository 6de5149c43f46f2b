"""Name the exact versions of model and text, without fetching them."""
