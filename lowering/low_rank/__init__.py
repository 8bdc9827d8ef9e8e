"""A weight of low rank."""
