"""Perplexity of any checkpoint, quantized ones included."""
