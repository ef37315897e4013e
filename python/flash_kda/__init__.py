"""FlashKDA: Kimi Delta Attention for torch tensors and NumPy arrays, on libflashkda.

    fwd(q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, ...)   whole sequences, in place
    decode(q, k, v, g, beta, state, ...)                                  a few tokens, state pool
    supports(...), plan(...), backends(), get_workspace_size(...)         questions
    set_num_threads(n), get_num_threads()                                 the CPU pool
    warmup(device)                                                        before a CUDA graph

Importing the package imports neither torch nor NumPy.
"""

from . import experimental
from ._C import (
    __version__,
    backends,
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
