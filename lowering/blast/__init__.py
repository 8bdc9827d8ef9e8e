"""A weight of blocks that share their factors."""
