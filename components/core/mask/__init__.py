"""The sparsity mask: its file, its invariant, and which weights it may mask. `file` needs no torch."""
