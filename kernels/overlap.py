"""Programmatic dependent launch, from compute capability 9.0 on: a kernel starts while the one in front of it
runs out. (CUDA C++ programming guide, "Programmatic Dependent Launch and Synchronization")
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def after_the_kernel_in_front(PDL: tl.constexpr):
    """Stands before the first access to memory: what the kernel in front has read and written is final
    behind it. The next kernel may start from here on; it waits in the same place.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
