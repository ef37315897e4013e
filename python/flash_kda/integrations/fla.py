"""flash-linear-attention (fla-core 0.5.0 to 0.6.0) on this library.

Without any call, FLA uses flash_kda.fwd for what its own FlashKDA backend accepts: no gradients, bfloat16,
K = V = 128, HV = H, gate, norms and sigmoid in the kernel, a lower bound, V-first states.

    import flash_kda.integrations.fla
    flash_kda.integrations.fla.register()

makes it use flash_kda.chunk_kda and flash_kda.fused_recurrent_kda for everything that these support; the
rest, context parallelism included, stays where it was. FLA_FLASH_KDA=0 switches both off.
"""

import functools
import inspect
import logging
import os

import torch

from .. import functional, ops
from . import _rebind

logger = logging.getLogger(__name__)

BACKEND_TYPE = "libflashkda"
_PRIORITY = 1  # FLA's own FlashKDA backend has 3; lower goes first
_SWITCH = "FLA_FLASH_KDA"  # FLA's switch for its FlashKDA backend
_FUNCTIONS = {
    "chunk_kda": functional.chunk_kda,
    "fused_recurrent_kda": functional.fused_recurrent_kda,
}

_registered = False
_backend = None  # our class in FLA's registries, made once
_rebound: dict[str, _rebind.Rebinding] = {}


def _enabled() -> bool:
    return _registered and os.environ.get(_SWITCH, "1") != "0"


# ---- what is accepted ---------------------------------------------------------------------------------


@functools.cache
def _parameters(function) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _why_not(function, arguments: dict) -> str | None:
    """Why `function` of this package cannot take FLA's call; None if it can."""
    for name in arguments.keys() - _parameters(function):
        return f"unknown argument {name}"
    get = arguments.get
    q, k, v, g, beta = (arguments[name] for name in ("q", "k", "v", "g", "beta"))
    A_log, dt_bias, initial_state = get("A_log"), get("dt_bias"), get("initial_state")
    needs_grad = functional.needs_grad(q, k, v, g, beta, A_log, dt_bias, initial_state)
    if get("cp_context") is not None:
        return "context parallelism"
    v_first = get("transpose_state_layout") or get("state_v_first", False)
    gate, A_log, dt_bias, lower_bound = functional.gate_of(
        get("use_gate_in_kernel", False), get("lower_bound"), A_log, dt_bias
    )
    supported, reason = ops.supports(
        q, k, v, g, beta, get("scale"), A_log, dt_bias, lower_bound, initial_state,
        get("cu_seqlens"), gate, "vk" if v_first else "kv",
    )  # fmt: skip
    if supported and needs_grad:
        supported, reason = ops.supports_gradients(
            q, k, v, g, beta, get("scale"), A_log, dt_bias, lower_bound, gate, None
        )
    return None if supported else reason


def _verify(function, arguments: dict) -> tuple[bool, str | None]:
    try:
        reason = _why_not(function, arguments)
    except (TypeError, ValueError, KeyError) as problem:  # FLA has its own words for it
        reason = str(problem)
    return reason is None, reason


def supports(name: str, **arguments) -> tuple[bool, str]:
    """(True, '') if a call of FLA's function `name` with these arguments would run on this library once
    register() has been called, else (False, reason)."""
    supported, reason = _verify(_FUNCTIONS[name], arguments)
    return supported, reason or ""


def _run(function, arguments: dict):
    if "transpose_state_layout" in arguments:  # how 0.5.0 calls it, and no reason for a warning
        arguments["state_v_first"] = arguments.pop("transpose_state_layout") or arguments.get(
            "state_v_first", False
        )
    return function(**arguments)


# ---- through FLA's registries -------------------------------------------------------------------------


class _Asked(BaseException):
    """Raised by the verifier during the probe: FLA's dispatcher has reached us."""


def _make_backend(base, kda):
    """A subclass of FLA's backend class that serves both generations of the registry."""
    names = {
        name: [
            p.name
            for p in inspect.signature(getattr(kda, name)).parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        for name in _FUNCTIONS
    }

    def bound(name, args, kwargs):
        return {**dict(zip(names[name], args)), **kwargs}

    class Backend(base):
        backend_type = BACKEND_TYPE
        package_name = "flash_kda"
        env_var = _SWITCH
        priority = _PRIORITY
        probing = False

        @classmethod
        def is_available(cls):
            return True

        @classmethod
        def is_enabled(cls):
            return cls.probing or _enabled()

        def chunk_kda_verifier(self, *args, **kwargs):
            if self.probing:
                raise _Asked
            return _verify(functional.chunk_kda, bound("chunk_kda", args, kwargs))

        def chunk_kda(self, *args, **kwargs):
            return _run(functional.chunk_kda, bound("chunk_kda", args, kwargs))

        # 0.6.0 dispatches this function inside fused_recurrent_kda, by keyword.

        def fused_recurrent_kda_fwd_verifier(self, *args, **kwargs):
            if self.probing:
                raise _Asked
            if args:
                return False, "positional arguments"
            for name in ("ssm_state_indices", "num_accepted_tokens", "out"):
                if kwargs.pop(name, None) is not None:
                    return False, name
            if kwargs.pop("inplace_final_state", True):
                return False, "inplace_final_state"
            return _verify(functional.fused_recurrent_kda, kwargs)

        def fused_recurrent_kda_fwd(self, **kwargs):
            for name in ("ssm_state_indices", "num_accepted_tokens", "out", "inplace_final_state"):
                kwargs.pop(name, None)
            return _run(functional.fused_recurrent_kda, kwargs)

    return Backend


def _into_registries(kda):
    """Enters our backend wherever this version of FLA has a registry for it."""
    global _backend
    try:
        from fla.backends import BaseBackend, register
    except ImportError:
        from fla.ops.backends import BaseBackend
        from fla.ops.kda.backends import kda_registry

        _backend = _make_backend(BaseBackend, kda)
        kda_registry.register(_backend())
    else:
        _backend = _make_backend(BaseBackend, kda)
        register(kda.chunk_kda)(_backend)
        register("kda")(_backend)


def _fires(function) -> bool:
    """Whether a call of FLA's `function` asks our backend. Some versions wrap their dispatcher so that it
    never runs on older versions of torch; the call then fails on its arguments, before any kernel."""
    _backend.probing = True
    try:
        function(None, None, None, None, None, scale=1.0)
    except _Asked:
        return True
    except Exception:
        return False
    finally:
        _backend.probing = False
    return False


# ---- by rebinding ---------------------------------------------------------------------------------------


def _replacement(name, original):
    function = _FUNCTIONS[name]
    positional = list(inspect.signature(original).parameters)
    logged = set()

    # Without __dict__: older versions of torch follow what torch.compiler.disable left there, past us.
    @functools.wraps(original, updated=())
    def call(*args, **kwargs):
        if _enabled():
            arguments = {**dict(zip(positional, args)), **kwargs}
            accepted, reason = _verify(function, arguments)
            if accepted not in logged:
                logged.add(accepted)
                logger.info("%s -> %s", name, "flash_kda" if accepted else f"fla: {reason}")
            if accepted:
                return _run(function, arguments)
        return original(*args, **kwargs)

    return torch.compiler.disable(call)


def register() -> dict[str, str]:
    """Makes FLA use this library for every call of chunk_kda and fused_recurrent_kda that it supports.

    Goes through FLA's registry of backends where FLA's dispatcher looks into it ('registry'); otherwise
    replaces the function in every module that has imported it ('rebound'). Returns which it was for each
    function. Calling it again changes nothing. With FLA_DISABLE_BACKEND_DISPATCH=1 nothing is done ('off').

    Raises ImportError where fla-core, or the triton that it imports, is missing.
    """
    global _registered
    import fla.ops.kda as kda

    if os.environ.get("FLA_DISABLE_BACKEND_DISPATCH") == "1":
        return dict.fromkeys(_FUNCTIONS, "off")
    if _backend is None:
        _into_registries(kda)
    _registered = True
    how = {}
    for name in _FUNCTIONS:
        if name not in _rebound and _fires(getattr(kda, name)):
            how[name] = "registry"
            continue
        if name not in _rebound:
            original = getattr(kda, name)
            _rebound[name] = _rebind.Rebinding(original, _replacement(name, original))
        how[name] = "rebound"
    return how


def unregister() -> None:
    """Undoes register()."""
    global _registered
    _registered = False
    for rebinding in _rebound.values():
        rebinding.undo()
    _rebound.clear()
