"""How generated products are cut into tiles: which products there are, what the kernels support, and what was measured.

A choice is made by :func:`~structfly.lowering.tuning.choice.tiles_for` from a product's class alone, never from its
data, and stays the same as long as the process lives.
"""
