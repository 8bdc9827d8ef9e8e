"""Activations of structured layers, applied within the layers' own products.

In graphs without gradients, so that a layer's output is not read and written once more.  Read in this order: ``site``,
``activations`` (which nodes are activations, and what reads their values), ``menu``, and ``rule``.
"""

from structfly.patterns.layer_epilogue.rule import LayerEpilogue

__all__ = ["LayerEpilogue"]
