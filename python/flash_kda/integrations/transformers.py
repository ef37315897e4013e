"""transformers' own Kimi-Linear models on this library: enable() and disable().

    import flash_kda.integrations.transformers
    flash_kda.integrations.transformers.enable()

serves the native models `kimi_linear` and `glm5_next` of transformers 5.17 and newer, before or after their
import, with or without flash-linear-attention installed. In the modules that define these models it
replaces what a linear attention layer calls:

    chunk_kimi_delta_attention      by the prefill kernels, packed sequences included
    recurrent_kimi_delta_attention  by the decode kernel, on the cache's states in place
    causal_conv1d_fn                only for packed sequences, where no convolution kernel is installed
    the forget gate's forward       so that the gate is activated inside of the kernels

What the kernels do not compute runs as it did before: gradients that the device refuses,
torch.export, devices other than CPU and CUDA, dtypes that a device refuses. On the CPU it is then
transformers' PyTorch function, even where flash-linear-attention is installed, because its Triton kernels
need a GPU.
"""

import functools
import importlib
import importlib.util
import inspect
import logging
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C, functional, ops

__all__ = ["disable", "enable", "is_enabled"]

logger = logging.getLogger(__name__)

# model type: the layer and the forget gate that its modeling module defines
_MODELS = {
    "kimi_linear": ("KimiLinearDeltaAttention", "KimiLinearForgetGate"),
    "glm5_next": ("Glm5NextTextLinearAttention", "Glm5NextTextForgetGate"),
}
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.7
_IN_PLACE = (
    "flash_kda_in_place"  # keyword by which a layer allows its cache's state to be overwritten
)

_replaced: list[
    tuple[object, str, object, object]
] = []  # owner, name, what was there, what is there


def enable(*, fused_gate: bool = True) -> list[str]:
    """Makes transformers' native Kimi-Linear models use this library; returns their model types.

    fused_gate=False leaves the forget gate to transformers, whose module then returns activated gates as
    ever, for code that looks at them; the kernels take these in float32.

    Acts on the whole process, on models that exist already too. Calling it again changes nothing but
    fused_gate. Raises ImportError where transformers is missing or has none of the models.
    """
    disable()
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("transformers: not installed, expected 5.17 or newer")
    enabled = []
    for model, names in _MODELS.items():
        name = f"transformers.models.{model}"
        if importlib.util.find_spec(name) is not None:
            _replace_in(importlib.import_module(f"{name}.modeling_{model}"), *names, fused_gate)
            enabled.append(model)
    if not enabled:
        import transformers

        raise ImportError(
            f"transformers: version {transformers.__version__} has none of {', '.join(_MODELS)}, "
            "expected 5.17 or newer"
        )
    logger.info("enabled for %s", ", ".join(enabled))
    return enabled


def disable() -> None:
    """Undoes enable(). What others have replaced since stays as they made it."""
    while _replaced:
        owner, name, before, ours = _replaced.pop()
        if getattr(owner, name) is ours:
            setattr(owner, name, before)


def is_enabled() -> bool:
    """Whether enable() is in force."""
    return bool(_replaced)


def _replace_in(module, layer: str, gate: str, fused_gate: bool) -> None:
    _replace(module, "chunk_kimi_delta_attention", _chunk)
    _replace(module, "recurrent_kimi_delta_attention", _recurrent)
    _replace(module, "causal_conv1d_fn", _causal_conv1d)
    _replace(getattr(module, layer), "forward", _layer_forward)
    if fused_gate:
        _replace(getattr(module, gate), "forward", _gate_forward)


def _replace(owner, name: str, make) -> None:
    stock = getattr(owner, name)
    ours = functools.wraps(stock, updated=())(make(stock))
    setattr(owner, name, ours)
    _replaced.append((owner, name, stock, ours))


# ---- who computes -----------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def _refusal(*key) -> str:
    """As _find_refusal(), which torch.compile need not see."""
    return _find_refusal(*key)


@functools.cache
def _find_refusal(device, dtype, g_dtype, beta_dtype, heads, K, V, gate, lower_bound, grad) -> str:
    """Why the kernels do not take tensors like these, or have no gradients of them; empty if they do."""
    if device.type not in ("cpu", "cuda"):
        return f"tensors on {device}"

    def tensor(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device=device)

    tokens = (
        tensor(1, 1, heads, K, dtype=dtype),
        tensor(1, 1, heads, K, dtype=dtype),
        tensor(1, 1, heads, V, dtype=dtype),
        tensor(1, 1, heads, K, dtype=g_dtype),
        tensor(1, 1, heads, dtype=beta_dtype),
    )
    try:
        good, reason = _C.supports(
            *tokens, lower_bound=lower_bound, gate=gate, beta_is_logit=False, state_layout="kv"
        )
    except (TypeError, ValueError) as error:
        good, reason = False, str(error)
    if not good:
        logger.warning("transformers' own functions run on %s: %s", device, reason)
    elif grad:
        good, reason = ops.supports_gradients(*tokens, None, None, None, lower_bound, gate, None)
        if not good:
            logger.info("transformers' own functions train on %s: %s", device, reason)
    return "" if good else reason


def _needs_grad(*tensors) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(x, Tensor) and x.requires_grad for x in tensors
    )


def _tensors_of(g) -> tuple:
    """Of a gate: a tensor or a _RawGate."""
    return tuple(g) if isinstance(g, _RawGate) else (g,)


def _declines(q: Tensor, k: Tensor, v: Tensor, g, beta: Tensor, state: Tensor | None) -> bool:
    """Whether a call is left to transformers. g is a tensor or a _RawGate."""
    raw = isinstance(g, _RawGate)
    return _is_exporting() or bool(
        _refusal(
            q.device,
            q.dtype,
            (g.raw if raw else g).dtype,
            beta.dtype,
            q.shape[2],
            q.shape[3],
            v.shape[3],
            g.kind if raw else "direct",
            g.lower_bound if raw else None,
            _needs_grad(q, k, v, beta, state, *_tensors_of(g)),
        )  # fmt: skip
    )


def reference(stock):
    """transformers' PyTorch function beneath its wrappers; None if there is none."""
    if isinstance(stock, torch.nn.Module):  # what the package `kernels` makes of a function
        stock = inspect.getclosurevars(type(stock).forward).nonlocals.get("func")
    return getattr(stock, "__wrapped__", None)


def _stock(stock, packed: bool, q: Tensor):
    """What runs instead of ours: `stock`, or on the CPU the PyTorch function that it wraps."""
    pytorch = reference(stock) if q.device.type == "cpu" else None
    if pytorch is None:
        return stock
    if packed:
        raise ValueError(
            "cu_seqlens: transformers' PyTorch functions, which this call is left to, cannot keep "
            "packed sequences apart"
        )
    return pytorch


# ---- the gate ---------------------------------------------------------------------------------------


class _RawGate(NamedTuple):
    """What our forget gate hands to our functions through the layer, in place of activated gates."""

    raw: Tensor  # [B, T, H, K]
    A_log: Tensor
    dt_bias: Tensor
    lower_bound: float | None

    @property
    def kind(self) -> str:
        return "softplus" if self.lower_bound is None else "bounded"

    def activated(self) -> Tensor:
        """Equation (2) of docs/math.md, for transformers' functions: float32 [B, T, H, K]."""
        heads, K = self.raw.shape[2:]
        g = self.raw.float() + self.dt_bias.float().view(heads, K)
        A = self.A_log.float().exp().view(heads, 1)
        return (
            -A * F.softplus(g) if self.lower_bound is None else self.lower_bound * (A * g).sigmoid()
        )


def _gate_forward(stock):
    def forward(self, hidden_states):
        lower_bound = getattr(self, "safe_gate_lower_bound", None)
        device, dtype = hidden_states.device, hidden_states.dtype  # what the projections will give
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        if _is_exporting() or _refusal(
            device, dtype, dtype, dtype, self.num_heads, self.head_dim, self.head_dim,
            "softplus" if lower_bound is None else "bounded", lower_bound,
            _needs_grad(hidden_states, *self.parameters()),
        ):  # fmt: skip
            return stock(self, hidden_states)
        raw = self.f_b_proj(self.f_a_proj(hidden_states))
        raw = raw.view(*hidden_states.shape[:2], -1, self.head_dim)
        return _RawGate(raw, self.A_log, self.dt_bias, lower_bound)

    return forward


# ---- the layer's functions --------------------------------------------------------------------------


def _cu_seqlens(keywords: dict) -> Tensor | None:
    """By FLA's name, or by the name that transformers' padding-free collator uses."""
    given = keywords.get("cu_seqlens")
    return keywords.get("cu_seq_lens_q") if given is None else given


def _gate_options(g) -> tuple[Tensor, dict]:
    """g, and the options that go with it as FLA's functions name them."""
    if not isinstance(g, _RawGate):
        return g, dict(use_gate_in_kernel=False)
    return g.raw, dict(
        use_gate_in_kernel=True, A_log=g.A_log, dt_bias=g.dt_bias, lower_bound=g.lower_bound
    )


def _chunk(stock):
    def chunk_kimi_delta_attention(
        query, key, value, g, beta, chunk_size=64, initial_state=None, output_final_state=False,
        use_qk_l2norm_in_kernel=False, **kwargs,
    ):  # fmt: skip
        kwargs.pop(_IN_PLACE, None)
        cu_seqlens = _cu_seqlens(kwargs)
        if _declines(query, key, value, g, beta, initial_state):
            return _stock(stock, cu_seqlens is not None, query)(
                query, key, value,
                g=g.activated() if isinstance(g, _RawGate) else g,
                beta=beta,
                chunk_size=chunk_size,
                initial_state=initial_state,
                output_final_state=output_final_state,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
                **kwargs,
            )  # fmt: skip
        g, options = _gate_options(g)
        return functional.chunk_kda(
            query, key, value, g, beta,
            initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            cu_seqlens=cu_seqlens,
            **options,
        )  # fmt: skip

    return chunk_kimi_delta_attention


def _recurrent(stock):
    def recurrent_kimi_delta_attention(
        query, key, value, g, beta, initial_state, output_final_state,
        use_qk_l2norm_in_kernel=False, **kwargs,
    ):  # fmt: skip
        in_place = kwargs.pop(_IN_PLACE, False)
        cu_seqlens = _cu_seqlens(kwargs)
        if _declines(query, key, value, g, beta, initial_state):
            return _stock(stock, cu_seqlens is not None, query)(
                query, key, value,
                g=g.activated() if isinstance(g, _RawGate) else g,
                beta=beta,
                initial_state=initial_state,
                output_final_state=output_final_state,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
                **kwargs,
            )  # fmt: skip
        if (
            in_place
            and output_final_state
            and initial_state is not None
            and initial_state.dtype == torch.float32
            and not _needs_grad(query, key, value, beta, *_tensors_of(g))
        ):
            return _decode(query, key, value, g, beta, initial_state, use_qk_l2norm_in_kernel)
        g, options = _gate_options(g)
        return functional.fused_recurrent_kda(
            query, key, value, g, beta,
            initial_state=initial_state,
            output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            cu_seqlens=cu_seqlens,
            **options,
        )  # fmt: skip

    return recurrent_kimi_delta_attention


def _decode(q, k, v, g, beta, state, l2norm):
    """(out, state), the state overwritten."""
    kind = g.kind if isinstance(g, _RawGate) else "direct"
    g, options = _gate_options(g)
    del options["use_gate_in_kernel"]
    run = ops.decode if ops._direct(q, k, v, g, beta, state) else torch.ops.flash_kda.decode
    out = run(
        q, k, v, g, beta, state, gate=kind, l2norm=l2norm, beta_is_logit=False, state_layout="kv",
        **options,
    )  # fmt: skip
    return out, state


def _layer_forward(stock):
    def forward(self, hidden_states, cache_params=None, attention_mask=None, **kwargs):
        T = hidden_states.shape[1]
        cu_seqlens = _cu_seqlens(kwargs)
        if cu_seqlens is not None:
            kwargs["cu_seqlens"] = cu_seqlens
            if kwargs.get("seq_idx") is None:
                kwargs["seq_idx"] = _sequence_of_tokens(cu_seqlens, T)
        elif kwargs.get("seq_idx") is not None:
            raise ValueError(
                "seq_idx: given without cu_seqlens, expected both or cu_seqlens alone; the state "
                "would run from one sequence into the next"
            )
        elif T == 1 and cache_params is not None:
            # The layer stores what comes back where it took the state from: nobody sees the old one.
            kwargs[_IN_PLACE] = True
        return stock(
            self, hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs
        )

    return forward


# ---- the convolution before it ----------------------------------------------------------------------


def _sequence_of_tokens(cu_seqlens: Tensor, T: int) -> Tensor:
    """[1, T] int32: the index of each token's sequence."""
    tokens = torch.arange(T, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:], tokens, right=True, out_int32=True)[None]


@functools.cache
def _has_convolution_kernel() -> bool:
    return importlib.util.find_spec("causal_conv1d") is not None


def _causal_conv1d(stock):
    def causal_conv1d_fn(hidden_states, weight, bias=None, activation=None, **kwargs):
        kwargs.pop(_IN_PLACE, None)
        seq_idx = kwargs.get("seq_idx")
        if seq_idx is None and (cu_seqlens := _cu_seqlens(kwargs)) is not None:
            seq_idx = kwargs["seq_idx"] = _sequence_of_tokens(cu_seqlens, hidden_states.shape[2])
        if seq_idx is None or (hidden_states.is_cuda and _has_convolution_kernel()):
            return stock(hidden_states, weight=weight, bias=bias, activation=activation, **kwargs)
        return _packed_conv1d(hidden_states, weight, bias, activation, seq_idx)

    return causal_conv1d_fn


def _packed_conv1d(x, weight, bias, activation, seq_idx):
    """y[b,c,t] = act(sum_j weight[c,w-1-j] x[b,c,t-j] + bias[c]) over those j for which t-j is in t's sequence.

    x [B,C,S]; weight [C,w]; seq_idx [B,T] or [1,T], T <= S: earlier columns of x, a cache's last inputs,
    belong to the first sequence.
    """
    from transformers.activations import ACT2FN

    S, width = x.shape[2], weight.shape[1]
    before = seq_idx[:, :1].expand(-1, S - seq_idx.shape[1])
    sequence = torch.cat([before, seq_idx], dim=1)[:, None]  # [B,1,S]
    inputs, taps = x.float(), weight.float()[:, :, None]
    y = inputs * taps[:, width - 1]
    for j in range(1, min(width, S)):
        same = sequence[..., j:] == sequence[..., :-j]
        y[..., j:] += inputs[..., :-j] * taps[:, width - 1 - j] * same
    if bias is not None:
        y = y + bias.float()[:, None]
    y = y.to(weight.dtype)
    return (y if activation is None else ACT2FN[activation](y)).to(x.dtype)
