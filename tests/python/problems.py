"""Random problems, the two tensor libraries, and the error measure. Shared by the tests."""

import dataclasses
import math
from typing import Any

import flash_kda
import ml_dtypes
import numpy as np
import pytest
import torch

BF16 = np.dtype(ml_dtypes.bfloat16)
def wrap_functions(wrap):
    """Puts wrap(kind, run) in the place of every function `run` by which chunk_kda and fused_recurrent_kda reach a
    kernel ("prefill" or "recurrent"), and returns what takes it back. q to initial_state are the first ten arguments of
    all; those of the usual call return NotImplemented where another call follows."""
    from flash_kda import _C, ops

    places = [
        (ops, "prefill", "prefill"),
        (ops, "recurrent", "recurrent"),
        (_C, "_prefill_results", "prefill"),
        (_C, "_recurrent_results", "recurrent"),
    ]
    before = [getattr(owner, name) for owner, name, _ in places]
    for (owner, name, kind), run in zip(places, before):
        setattr(owner, name, wrap(kind, run))

    def undo():
        for (owner, name, _), run in zip(places, before):
            setattr(owner, name, run)

    return undo


TOLERANCE = {"float32": 2e-5, "bfloat16": 2.5e-3, "float16": 2.5e-3}


def tolerance(dtype: str, size: int) -> float:
    """TOLERANCE, an RMS; of a few bfloat16 values each may be off by half a unit, 2**-8."""
    return 2**-8 + 2e-5 if dtype == "bfloat16" and size < 512 else TOLERANCE[dtype]


def cuda_rows() -> list[tuple[str, bool, str]]:
    return [row for row in flash_kda.backends() if not row[0].startswith(("cpu-", "reference"))]


def cuda_backends() -> list[str]:
    """What this GPU can run, in order of preference."""
    return [name for name, available, _ in cuda_rows() if available]


def why_no_cuda() -> str:
    """Why no CUDA tensor can be computed on here; empty if it can."""
    if not torch.cuda.is_available():
        return "no CUDA device for torch"
    rows = cuda_rows()
    if any(available for _, available, _ in rows):
        return ""
    return "; ".join(reason for _, _, reason in rows) or "this build has no CUDA backend"


# For tests that run on both.
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(bool(why_no_cuda()), reason=why_no_cuda())),
]


def tolerance_on(device: str) -> float:
    """Of a bfloat16 prefill; on a GPU the operands of matrix products are bfloat16 too."""
    return TOLERANCE["bfloat16"] if device == "cpu" else 5e-3


def agree(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Two calls that are to give the same: to the bit on the CPU; on a GPU they may have other plans."""
    if x.device.type == "cpu":
        return torch.equal(x, y)
    return error(x.cpu(), y.double().cpu()) <= tolerance_on("cuda")


def torch_of(array: np.ndarray) -> torch.Tensor:
    """The same memory as a torch tensor, strides kept."""
    if array.dtype == BF16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def numpy_of(tensor) -> np.ndarray:
    if isinstance(tensor, np.ndarray):
        return tensor
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.int16).numpy().view(BF16)
    return tensor.detach().numpy()


class Numpy:
    name = "numpy"

    @staticmethod
    def of(array):
        return array


class Torch:
    name = "torch"

    @staticmethod
    def of(array):
        return None if array is None else torch_of(array)


LIBRARIES = [Torch, Numpy]


def bits(tensor) -> bytes:
    return np.ascontiguousarray(numpy_of(tensor)).tobytes()


def error(result, gold) -> float:
    """RMS(result - gold) / RMS(gold), the project's measure."""
    result, gold = numpy_of(result).astype(np.float64), numpy_of(gold).astype(np.float64)
    assert result.shape == gold.shape
    scale = math.sqrt(np.mean(gold**2)) if gold.size else 0.0
    difference = math.sqrt(np.mean((result - gold) ** 2)) if gold.size else 0.0
    assert math.isfinite(difference)
    return difference / scale if scale else difference


@dataclasses.dataclass
class Problem:
    """NumPy arrays of one call. K and V, and every head, token and channel differ."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    g: np.ndarray
    beta: np.ndarray
    A_log: np.ndarray | None
    dt_bias: np.ndarray | None
    initial_state: np.ndarray | None
    cu_seqlens: np.ndarray | None
    options: dict

    @property
    def N(self):
        return self.q.shape[0] if self.cu_seqlens is None else len(self.cu_seqlens) - 1

    @property
    def state_shape(self):
        return (self.N, self.v.shape[2], self.v.shape[3], self.q.shape[3])

    def tensors(self, library):
        return [library.of(x) for x in (self.q, self.k, self.v, self.g, self.beta)]

    def fwd(self, library=Numpy, state_dtype=np.float32, io_dtype=None, **options):
        """(out, final_state) as NumPy arrays; both start as NaN."""
        io_dtype = io_dtype or self.v.dtype
        out = np.full(self.v.shape, np.nan, io_dtype)
        final = np.full(self.state_shape, np.nan, state_dtype)
        flash_kda.fwd(
            *self.tensors(library),
            None,
            library.of(out),
            library.of(self.A_log),
            library.of(self.dt_bias),
            None,
            initial_state=library.of(self.initial_state),
            final_state=library.of(final),
            cu_seqlens=library.of(self.cu_seqlens),
            **{**self.options, **options},
        )
        return out, final

    def gold(self, **options):
        """The same in double precision throughout."""
        return self.fwd(state_dtype=np.float64, io_dtype=np.float64, backend="reference", **options)


def problem(
    B=1, T=33, H=2, HV=None, K=64, V=64, dtype="bfloat16", lens=None, state=True, seed=0, **options
) -> Problem:
    rng = np.random.default_rng(seed)
    HV = HV or H
    dtype = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    cu_seqlens = None
    if lens is not None:
        cu_seqlens = np.concatenate([[0], np.cumsum(lens)]).astype(np.int64)
        B, T = 1, int(cu_seqlens[-1])
    N = B if lens is None else len(lens)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    direct = options.get("gate") == "direct"
    g = -np.abs(normal(B, T, HV, K)) if direct else normal(B, T, HV, K)
    beta = normal(B, T, HV)
    if options.get("beta_is_logit") is False:
        beta = 1 / (1 + np.exp(-beta))
    return Problem(
        q=normal(B, T, H, K).astype(dtype),
        k=normal(B, T, H, K).astype(dtype),
        v=(normal(B, T, HV, V) + np.linspace(-1, 1, V, dtype=np.float32)).astype(dtype),
        g=g.astype(dtype),
        beta=beta.astype(dtype),
        A_log=None if direct else normal(HV) * 0.5,
        dt_bias=None if direct else normal(HV, K) * 0.5,
        initial_state=normal(N, HV, V, K) if state else None,
        cu_seqlens=cu_seqlens,
        options=options,
    )


class Bare:
    """A tensor that offers nothing but the named protocol methods of `array`."""

    def __init__(self, array: Any):
        self._array = array


class DLPackOnly(Bare):
    """What JAX or CuPy look like from outside."""

    def __dlpack__(self, **keywords):
        return self._array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class OldDLPackOnly(Bare):
    """Before DLPack 1.0: __dlpack__() knows no max_version."""

    def __dlpack__(self, stream=None):
        return self._array.__dlpack__(stream=stream)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class TorchLike(Bare):
    """torch before 2.10: no exchange table on the type."""

    device = property(lambda self: self._array.device)
    dtype = property(lambda self: self._array.dtype)
    shape = property(lambda self: self._array.shape)

    def data_ptr(self):
        return self._array.data_ptr()

    def stride(self):
        return self._array.stride()

    def element_size(self):
        return self._array.element_size()

    def new_empty(self, *shape):
        return self._array.new_empty(*shape)
