"""How much memory there is."""

from __future__ import annotations

import os

import torch


def available_bytes(device: torch.device) -> int:
    """Bytes that new work may take on the device now; what the system counts as available, cached files
    included.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
