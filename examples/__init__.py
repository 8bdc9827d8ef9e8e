"""Runnable examples; start them from the top of the repository, as in ``python -m examples.train_gpt``."""
