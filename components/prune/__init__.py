"""One-shot Hessian-aware pruning of a decoder's linear layers, block by block."""
