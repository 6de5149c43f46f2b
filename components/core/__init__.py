"""Code that all stages share: checkpoints, the mask, corpora and tokens, perplexity, progress, the command line."""
