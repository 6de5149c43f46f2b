"""The stages of the compression pipeline, one folder per stage; `core` holds the code that they share."""
