"""Triton kernels. An exported model does not carry them: it takes them from this package where that is installed."""

import torch
from triton import knobs

# ptxas 12.8, with which Triton 3.6 compiles for Hopper, has descriptors of products of 16 columns overwritten before
# they are read: garbage, or illegal addresses. The 12.9 that Triton brings for later architectures has not.
if torch.version.cuda and knobs.nvidia.ptxas.version == "12.8":
    knobs.nvidia.ptxas = knobs.nvidia.ptxas_blackwell.path
