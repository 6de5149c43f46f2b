"""One HTML page, and the same numbers as JSON, from the records that the other stages left behind."""
