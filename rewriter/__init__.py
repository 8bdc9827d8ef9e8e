"""Graphs, costs and budgets: reads FX graphs, runs rules over them and solves for the best plan.  Knows no pattern."""
