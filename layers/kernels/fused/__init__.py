"""Triton kernels. An exported model does not carry them: it takes them from this package where that is installed."""
