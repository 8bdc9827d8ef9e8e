"""A weight of low rank, of which some rows are kept and the others are made of them."""
