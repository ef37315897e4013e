"""Derivatives of torch.ops.flash_kda.prefill, and with it of flash_kda.chunk_kda.

flash_kda.ops imports this module. It defines the operator

    backward(d_out, d_final_state, q, k, v, g, beta, ...) -> (d_q, d_k, d_v, d_g, d_beta, d_A_log, d_dt_bias,
                                                              d_initial_state)

whose results that are not wanted are empty, and what the Autograd key does with prefill. Only the inputs are
kept for the backward; states are computed again. There are no second derivatives.
"""

import torch
from torch import Tensor

from . import _C

# What a gradient may be wanted of, in the order of backward()'s results.
NAMES = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")

_SCHEMA = """backward(Tensor? d_out, Tensor? d_final_state, Tensor q, Tensor k, Tensor v, Tensor g,
    Tensor beta, *, Tensor? A_log=None, Tensor? dt_bias=None, Tensor? initial_state=None,
    Tensor? cu_seqlens=None, float? scale=None, float? lower_bound=None, str gate="bounded",
    bool l2norm=True, bool beta_is_logit=True, bool allow_neg_eigval=False, str state_layout="vk",
    bool[8] wanted, str? backend=None)
    -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"""

_OPTIONS = (
    "scale", "lower_bound", "gate", "l2norm", "beta_is_logit", "allow_neg_eigval", "state_layout",
    "backend",
)  # fmt: skip


# ---- the operator -----------------------------------------------------------------------------------


def _last_dense(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.ndim == 0 or x.stride(-1) == 1 else x.contiguous()


def _dense(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.contiguous()


def _narrowed(x: Tensor | None, *dtypes: torch.dtype) -> Tensor | None:
    return x if x is None or x.dtype in dtypes else x.to(dtypes[0])


def _has_other_rows(cu_seqlens: Tensor | None, T: int) -> bool:
    """May some token belong to no sequence? On a GPU nobody looks."""
    if cu_seqlens is None:
        return False
    return cu_seqlens.device.type != "cpu" or not len(cu_seqlens) or int(cu_seqlens[-1]) != T


def _new(x: Tensor, dtype: torch.dtype, zero: bool) -> Tensor:
    make = torch.zeros_like if zero else torch.empty_like
    return make(x, dtype=dtype, memory_format=torch.contiguous_format)


def _backward(
    d_out, d_final_state, q, k, v, g, beta, *, A_log=None, dt_bias=None, initial_state=None,
    cu_seqlens=None, wanted, **options,
):  # fmt: skip
    given = (q, k, v, g, beta, A_log, dt_bias, initial_state)
    io, wide = q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32
    K, HV = q.shape[-1], v.shape[-2]
    rows = _has_other_rows(cu_seqlens, q.shape[1])
    results = {}
    for name, x, is_wanted in zip(NAMES, given, wanted):
        if not is_wanted:
            continue
        if name == "A_log":
            results[name] = x.new_empty((HV,), dtype=wide)
        elif name == "dt_bias":
            results[name] = x.new_empty((HV, K), dtype=wide)
        elif name == "initial_state":
            results[name] = _new(x, x.dtype if x.dtype == torch.bfloat16 else wide, False)
        else:
            results[name] = _new(x, x.dtype if x.dtype == io else wide, rows)
    _C.backward(
        _last_dense(q), _last_dense(k), _last_dense(v), _last_dense(_narrowed(g, wide, io)),
        _last_dense(_narrowed(beta, wide, io)), options.pop("scale"), _last_dense(d_out),
        _dense(_narrowed(A_log, wide, torch.bfloat16)),
        _dense(_narrowed(dt_bias, wide, torch.bfloat16)), options.pop("lower_bound"),
        _last_dense(_narrowed(initial_state, wide, torch.bfloat16)), _last_dense(d_final_state),
        _dense(_narrowed(cu_seqlens, torch.int64, torch.int32)),
        **{f"d_{name}": x for name, x in results.items()}, **options,
    )  # fmt: skip
    return tuple(
        results[name].to(x.dtype).view(x.shape) if name in results else q.new_empty((0,))
        for name, x in zip(NAMES, given)
    )


def _backward_kernel(*arguments, **options):
    return _backward(*arguments, **{**dict.fromkeys(("scale", "lower_bound")), **options})


def _backward_fake(
    d_out, d_final_state, q, k, v, g, beta, *, A_log=None, dt_bias=None, initial_state=None,
    wanted, **_,
):  # fmt: skip
    given = (q, k, v, g, beta, A_log, dt_bias, initial_state)
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if is_wanted else q.new_empty(0)
        for x, is_wanted in zip(given, wanted)
    )


def _backward_autograd(*arguments, **options):
    tensors = (x for x in (*arguments, *options.values()) if isinstance(x, Tensor))
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise NotImplementedError("torch.ops.flash_kda.backward has no derivative itself")
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.flash_kda.backward.default(*arguments, **options)


# ---- prefill ----------------------------------------------------------------------------------------


class Gradients(torch.autograd.Function):
    """backward, which has no derivative."""

    @staticmethod
    def forward(
        d_out, d_final_state, q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, options
    ):  # fmt: skip
        return torch.ops.flash_kda.backward.default(
            d_out, d_final_state, q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias,
            initial_state=initial_state, cu_seqlens=cu_seqlens, **dict(options),
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "flash_kda: second derivatives are not computed (a gradient of chunk_kda was differentiated)"
        )


class Prefill(torch.autograd.Function):
    """prefill with its derivative. `options` are prefill's that are no tensors, as pairs."""

    @staticmethod
    def forward(
        q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, options
    ):  # fmt: skip
        return torch.ops.flash_kda.prefill.default(
            q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, initial_state=initial_state,
            cu_seqlens=cu_seqlens, **dict(options),
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, options = inputs
        ctx.options = dict(options)
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        absent = () if ctx.options.get("output_final_state") else (output[1],)
        ctx.mark_non_differentiable(output[2], *absent)

    @staticmethod
    def backward(ctx, d_out, d_final_state, _):
        wanted = ctx.needs_input_grad[:8]
        if d_out is None and d_final_state is None:
            return (None,) * 10
        options = {name: ctx.options[name] for name in _OPTIONS if name in ctx.options}
        arguments = (
            d_out,
            d_final_state,
            *ctx.saved_tensors,
            (*options.items(), ("wanted", wanted)),
        )
        # Gradients that could be differentiated again depend on the inputs: say so, to refuse it.
        run = Gradients.apply if torch.is_grad_enabled() else Gradients.forward
        return *(d if w else None for d, w in zip(run(*arguments), wanted)), None, None


def recorded(
    q, k, v, g, beta, *, A_log=None, dt_bias=None, initial_state=None, cu_seqlens=None, **options
):  # fmt: skip
    """prefill, recorded."""
    return Prefill.apply(
        q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, tuple(options.items())
    )


def prefill(*arguments, **options):
    """What the Autograd key does with the operator prefill."""
    tensors = (x for x in (*arguments, *options.values()) if isinstance(x, Tensor))
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return recorded(*arguments, **options)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.flash_kda.prefill.default(*arguments, **options)


def _define():
    library = torch.library.Library("flash_kda", "FRAGMENT")
    library.define(" ".join(_SCHEMA.split()), tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        library.impl("backward", _backward_kernel, device)
    library.impl("backward", _backward_autograd, "Autograd")
    torch.library.register_fake("flash_kda::backward", _backward_fake, lib=library)
    return library


_library = _define()
