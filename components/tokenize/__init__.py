"""Turn text into fixed blocks of token ids."""
