"""Linear layers under a budget: ``candidates`` (what one layer may become) and ``heads`` (what is left dense)."""
