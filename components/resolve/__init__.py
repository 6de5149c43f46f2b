"""Find the exact versions of the model and the texts without downloading them."""
