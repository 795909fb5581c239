"""The training loop and its sources of groups."""
