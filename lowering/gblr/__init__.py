"""A weight of components that each see an interval of tiles of the inputs and one of the outputs."""
