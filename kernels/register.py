"""The backend `triton`: importing this registers every kernel, or raises BackendUnavailable."""

from fastldm.errors import BackendUnavailable

try:
    import triton  # noqa: F401
except ImportError as error:
    raise BackendUnavailable(f"triton cannot be imported ({error})") from error

from fastldm.kernels import attention, conv2d, geglu, group_norm_silu, guided_step, layer_norm

__all__ = ["attention", "conv2d", "geglu", "group_norm_silu", "guided_step", "layer_norm"]
