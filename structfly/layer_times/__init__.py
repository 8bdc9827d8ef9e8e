"""How long layers take on a device: measured, kept in files, and what that says of layers that were not measured.

Read in this order: ``timing`` (one measurement), ``store`` (files), ``interpolation``, ``corrections`` (of predicted
times), and ``known``, which puts them together.
"""
