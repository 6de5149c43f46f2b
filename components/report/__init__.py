"""One HTML page, and the same numbers as JSON, built from the records of the other stages."""
