"""The packed formats: pruned and quantized weights in the space that they need. README.md here specifies the layout."""
