"""Tests of structfly.restructure."""
