"""Calls of ops that are recorded once, and replayed with far less of the host's time.

What an op launches depends on the forms of what it is called with: shapes, strides, dtypes and numbers, not on where
tensors lie or what they hold.  So the second call of a form is recorded (:mod:`~structfly.lowering.replay.recorder`):
which kernels it launched, which operations of torch it called, and for every address, how far into which tensor it is.
Later calls of the form make the same tensors, launch the same kernels at the addresses of their own, and let go of each
tensor after its last use (:mod:`~structfly.lowering.replay.recording`).  Unlike a CUDA graph, a recording holds no
memory, takes its tensors from wherever they are, and runs on the stream it is called on.
"""
