"""Random problems and deliberately wrong arguments (hypothesis).

A call either does what it says or raises one of the documented exceptions, names an argument and has
written nothing. It never crashes the interpreter.
"""

import re

import flash_kda
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from problems import BF16, TOLERANCE, Numpy, Torch, bits, error, problem, tolerance, torch_of

common = settings(
    deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)

shapes = st.fixed_dictionaries(
    {
        "H": st.integers(1, 3),
        "HV": st.sampled_from([1, 2]),
        "K": st.sampled_from([1, 3, 16, 31, 64, 128, 200]),
        "V": st.sampled_from([1, 5, 16, 64, 100, 128]),
        "lens": st.none() | st.lists(st.integers(0, 40), max_size=5),
        "B": st.integers(0, 3),
        "T": st.integers(0, 40),
        "dtype": st.sampled_from(["bfloat16", "float32", "float16"]),
        "gate": st.sampled_from(["bounded", "softplus", "direct"]),
        "l2norm": st.just(True),
        "beta_is_logit": st.booleans(),
        "allow_neg_eigval": st.booleans(),
        "state": st.booleans(),
        "seed": st.integers(0, 10),
    }
)


def built(shape):
    shape = dict(shape)
    shape["HV"] *= shape["H"]
    return problem(**shape)


@common
@given(shapes, st.sampled_from([Torch, Numpy]))
def test_random_problems(shape, library):
    p = built(shape)
    # Doubled beta on keys of one channel overshoots: legitimate, and too ill-conditioned to compare.
    assume(not (shape["allow_neg_eigval"] and shape["K"] < 16))
    out, final = p.fwd(library)
    gold_out, gold_final = p.gold()
    assert error(out, gold_out) <= tolerance(shape["dtype"], out.size)
    assert error(final, gold_final) <= TOLERANCE[shape["dtype"]]
    assert flash_kda.supports(
        *p.tensors(library), cu_seqlens=library.of(p.cu_seqlens), **p.options
    ) == (True, "")


def weird_arrays(like):
    """Arrays that have something wrong, or at least unusual, about them."""
    dtypes = [np.float32, np.float64, np.float16, BF16, np.int32, np.int64, np.uint8, np.bool_,
              np.complex64, ml_dtypes.float8_e5m2, ">f4"]  # fmt: skip
    dims = st.sampled_from([0, 1, 2, 3, 5, 17, 64, 300])
    fresh = st.builds(
        lambda shape, dtype: np.zeros(shape, dtype),
        st.lists(dims, max_size=6).filter(lambda s: np.prod(s, dtype=float) < 1e5),
        st.sampled_from(dtypes),
    )
    if not isinstance(like, np.ndarray):
        return fresh
    variants = [
        like[..., ::-1],
        like[::-1],
        like[..., ::2],
        like[..., :-1],
        like[..., None],
        like[None],
        like.astype(np.float64),
        like.astype(np.int32),
        like.T,
        like.reshape(-1),
        like.view(np.uint8),
        np.broadcast_to(like[..., :1], like.shape),
        np.broadcast_to(like[:1], (2, *like.shape[1:])),
        np.lib.stride_tricks.as_strided(like, like.shape, [0] * like.ndim),
    ]
    return st.sampled_from(variants) | fresh


scalars = st.none() | st.integers(-3, 300) | st.floats() | st.text(max_size=3) | st.just(object())
argument_names = [
    "q", "k", "v", "g", "beta", "out", "A_log", "dt_bias", "initial_state", "final_state",
    "cu_seqlens", "state_indices", "initial_state_indices", "final_state_indices",
    "has_initial_state", "checkpoint_state", "checkpoint_offsets", "checkpoint_indptr",
    "checkpoint_state_indices", "workspace",
]  # fmt: skip
option_names = [
    "scale", "lower_bound", "gate", "l2norm", "beta_is_logit", "allow_neg_eigval", "state_layout",
    "checkpoint_every", "checkpoint_before", "batch_invariant", "backend",
]  # fmt: skip
OUTPUTS = ("out", "final_state", "checkpoint_state", "workspace", "state")


def as_torch(value):
    try:
        return torch_of(value) if isinstance(value, np.ndarray) else value
    except (TypeError, ValueError):  # negative strides, dtypes that torch lacks
        return value


def attempt(function, arguments, originals):
    """Calls; on an error checks its kind, its words, and that no output was touched."""
    before = {n: bits(originals[n]) for n in OUTPUTS if isinstance(originals.get(n), np.ndarray)}
    try:
        function(**arguments)
    except (ValueError, TypeError, RuntimeError) as e:
        text = str(e)
        assert re.match(r"\w+(\(\))?[: ]", text), text
        assert any(re.search(rf"\b{n}\b", text) for n in [*arguments, "backend"]), text
        after = {n: bits(originals[n]) for n in before}
        assert after == before, text


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@common
@given(st.data(), st.booleans(), st.sampled_from([None, [5, 0, 20]]))
def test_weird_prefill(data, use_torch, lens):
    p = problem(T=20, K=64, V=64, lens=lens)
    arguments = {
        "q": p.q, "k": p.k, "v": p.v, "g": p.g, "beta": p.beta, "scale": None,
        "out": np.full_like(p.v, 7), "A_log": p.A_log, "dt_bias": p.dt_bias, "lower_bound": None,
        "initial_state": p.initial_state, "final_state": np.full_like(p.initial_state, 7),
        "cu_seqlens": p.cu_seqlens,
    }  # fmt: skip
    for name in data.draw(st.lists(st.sampled_from(argument_names), max_size=2, unique=True)):
        arguments[name] = data.draw(weird_arrays(arguments.get(name)) | scalars, label=name)
    for name in data.draw(st.lists(st.sampled_from(option_names), max_size=1)):
        arguments[name] = data.draw(scalars, label=name)
    passed = {n: as_torch(a) if use_torch else a for n, a in arguments.items()}
    attempt(flash_kda.fwd, passed, arguments)
    question = {n: a for n, a in passed.items()}
    try:
        supported, reason = flash_kda.supports(**question)
        assert supported == (reason == "")
    except (ValueError, TypeError):
        pass


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@common
@given(st.data(), st.booleans())
def test_weird_decode(data, use_torch):
    p = problem(B=3, T=2, K=64, V=64)
    arguments = {
        "q": p.q, "k": p.k, "v": p.v, "g": p.g, "beta": p.beta,
        "state": p.initial_state.copy(), "out": np.full_like(p.v, 7),
    }  # fmt: skip
    names = [*arguments, "state_indices", "initial_state_indices", "final_state_indices",
             "num_accepted_tokens", "has_initial_state", "A_log", "dt_bias", "workspace"]  # fmt: skip
    for name in data.draw(st.lists(st.sampled_from(names), max_size=2, unique=True)):
        arguments[name] = data.draw(weird_arrays(arguments.get(name)) | scalars, label=name)
    passed = {n: as_torch(a) if use_torch else a for n, a in arguments.items()}
    attempt(flash_kda.decode, passed, arguments)


@common
@given(
    st.lists(st.integers(-2, 50), min_size=1, max_size=6),
    st.sampled_from([np.int32, np.int64, np.float32]),
)
def test_weird_cu_seqlens(values, dtype):
    p = problem(T=40, state=False)
    out = np.full_like(p.v, 7)
    cu_seqlens = np.array(values, dtype)
    valid = dtype != np.float32 and values[0] == 0 and values == sorted(values) and values[-1] <= 40
    call = lambda: flash_kda.fwd(
        *p.tensors(Numpy), None, out, None, None, None, cu_seqlens=cu_seqlens
    )
    if valid:
        call()
        assert (out[:, values[-1] :] == 7).all()  # rows of no sequence
    else:
        with pytest.raises((ValueError, TypeError), match="cu_seqlens"):
            call()
        assert (out == 7).all()


@common
@given(st.lists(st.integers(-3, 8), min_size=3, max_size=3))
def test_weird_slots(slots):
    assume(len({s for s in slots if s >= 0}) == len([s for s in slots if s >= 0]))
    p = problem(B=3, T=1, state=False)
    pool = np.random.default_rng(0).standard_normal((6, 2, 64, 64)).astype(np.float32)
    before = pool.copy()
    index = np.array(slots, np.int64)
    call = lambda: flash_kda.decode(*p.tensors(Numpy), pool, state_indices=index)
    if all(-1 <= s < 6 for s in slots):
        call()
        others = [s for s in range(6) if s not in slots]
        assert bits(pool[others]) == bits(before[others])
    else:
        with pytest.raises(ValueError, match="state_indices"):
            call()
        assert bits(pool) == bits(before)


@common
@given(st.text(min_size=1, max_size=30))
def test_unknown_keywords(name):
    p = problem(T=2)
    known = {"out", "scale", *argument_names, *option_names}
    assume(name not in known)
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        flash_kda.fwd(*p.tensors(Numpy), None, p.v.copy(), None, None, None, **{name: 1})


@pytest.mark.filterwarnings("ignore")  # torch calls some of them experimental, others outdated
def test_torch_tensors_of_unusual_kinds():
    p = problem(T=4, dtype="float32")
    out = torch.full(p.v.shape, 7.0)
    rest = [None, out, None, None, None]
    tensors = p.tensors(Torch)
    for strange in (
        tensors[0].to("meta"),
        tensors[0].to_sparse(),
        tensors[0].expand(2, -1, -1, -1),
        torch.zeros(1, 4, 2, 64, dtype=torch.complex64).conj(),
        torch.quantize_per_tensor(tensors[0], 0.1, 0, torch.qint8),
        torch.nested.nested_tensor([tensors[0][0]]),
    ):
        with pytest.raises((ValueError, TypeError)):
            flash_kda.fwd(strange, *tensors[1:], *rest)
        assert (out == 7).all()
