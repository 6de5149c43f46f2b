"""What every stage shares: checkpoint, mask, corpus and tokens, perplexity, progress, command line."""
