"""Walk through a decoder block by block: only one block's weights are in memory, and a killed walk goes on where it was."""
