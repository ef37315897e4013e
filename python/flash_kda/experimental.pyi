from typing import Any, Literal

__all__ = ["summary"]

_Tensor = Any

def summary(
    k: _Tensor,
    v: _Tensor,
    g: _Tensor,
    beta: _Tensor,
    M: _Tensor,
    b: _Tensor,
    A_log: _Tensor | None = None,
    dt_bias: _Tensor | None = None,
    lower_bound: float | None = None,
    cu_seqlens: _Tensor | None = None,
    *,
    gate: Literal["bounded", "softplus", "direct"] = "bounded",
    l2norm: bool = True,
    beta_is_logit: bool = True,
    allow_neg_eigval: bool = False,
    state_layout: Literal["vk", "kv"] = "vk",
    workspace: _Tensor | None = None,
    backend: str | None = None,
) -> None: ...
