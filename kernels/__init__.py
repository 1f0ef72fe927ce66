"""Triton kernels, one file for each op; import them as `fastldm.kernels`, never as `kernels`."""
