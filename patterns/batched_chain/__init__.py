"""Chains of batched products with views between them, such as Monarch's pairs: one op with Kronecker-sparse factors.

Read in this order: ``axes`` (what views do to axes, exactly), ``products`` (how a batched product is written),
``factors`` (which chains are Kronecker-sparse), ``reader`` (from a node to a chain), ``site``, ``menu``, ``rewrite``,
and ``rule``, which puts them together.
"""

from structfly.patterns.batched_chain.rule import BatchedChain

__all__ = ["BatchedChain"]
