"""Operators: schemas, eager references, CPU and GPU lowerings, and the template engine.  Knows no graph."""
