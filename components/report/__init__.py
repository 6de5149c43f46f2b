"""One HTML page, and the same numbers as JSON, built from the histories of compressed models."""
