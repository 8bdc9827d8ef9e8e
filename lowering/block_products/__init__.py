"""Products with matrices made of blocks, generated for GPUs: sums over blocks, and the blocks' gradients."""
