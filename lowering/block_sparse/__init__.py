"""A weight of dense blocks, most of them left out."""
