"""The backend `cuda`: the kernels of csrc/cuda on NVIDIA GPUs, compute capability 8.0 and later.

`fastldm.ops.cuda.register` makes them serve, one module an op.
"""
