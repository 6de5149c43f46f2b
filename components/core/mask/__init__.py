"""The sparsity mask: its file, its invariant, and which weights it may mask. `file` does not need torch."""
