"""Running a model step by step; models come as callables."""

from fastldm.runtime.batcher import Batcher

__all__ = ["Batcher"]
