"""Modules that are made of the fused ops: ordinary ones, which train, save and compile as any other."""

from structfly.nn.qrnn import QRNN, QRNNState

__all__ = ["QRNN", "QRNNState"]
