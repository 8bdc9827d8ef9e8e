"""Weights that are products of Kronecker-sparse factors: Monarch, lattices, block butterflies."""
