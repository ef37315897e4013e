"""FlashKDA: Kimi Delta Attention for torch tensors and NumPy arrays, on libflashkda.

    fwd(q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, ...)   whole sequences, in place
    decode(q, k, v, g, beta, state, ...)                                  a few tokens, state pool
    backward(q, k, v, g, beta, scale, d_out, ...)                         gradients of fwd
    supports(...), plan(...), backends(), get_workspace_size(...)         questions
    set_num_threads(n), get_num_threads()                                 the CPU pool
    warmup(device)                                                        before a CUDA graph
    chunk_kda(...), fused_recurrent_kda(...)                              flash-linear-attention's, for torch,
                                                                          differentiable

Importing the package imports neither torch nor NumPy; the last two functions import torch when they are
first named, and the module flash_kda.ops, which defines torch.ops.flash_kda, when it is imported.
"""

import importlib

from . import experimental
from ._C import (
    __version__,
    backends,
    backward,
    decode,
    fwd,
    get_num_threads,
    get_workspace_size,
    plan,
    set_num_threads,
    supports,
    warmup,
)

__all__ = [
    "__version__",
    "backends",
    "backward",
    "decode",
    "experimental",
    "fwd",
    "get_num_threads",
    "get_workspace_size",
    "plan",
    "set_num_threads",
    "supports",
    "warmup",
]


# What wants torch: name -> module. Not in __all__, so that a star import works without torch.
_TORCH = {
    "autograd": None,
    "chunk_kda": "functional",
    "fused_recurrent_kda": "functional",
    "functional": None,
    "integrations": None,
    "ops": None,
}


def __getattr__(name):
    if name not in _TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_TORCH[name] or name}", __name__)
    value = getattr(module, name) if _TORCH[name] else module
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_TORCH})
