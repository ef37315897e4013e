"""fwd and decode against the double-precision reference, and the promises that are bitwise."""

import flash_kda
import numpy as np
import pytest
import torch
from problems import BF16, TOLERANCE, Numpy, Torch, bits, error, numpy_of, problem

SHAPES = [
    dict(T=1, H=1),
    dict(T=64, H=2, K=128, V=128),
    dict(B=2, T=33, H=2, HV=4, K=64, V=128),
    dict(lens=[0, 17, 1, 0, 64, 30, 0], H=3, K=128, V=64),
    dict(T=21, H=1, K=5, V=7),
]
OPTIONS = [
    dict(),
    dict(gate="softplus"),
    dict(gate="direct"),
    dict(l2norm=True, beta_is_logit=False),
    dict(allow_neg_eigval=True),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_prefill(library, shape, options, dtype):
    p = problem(**shape, **options, dtype=dtype)
    out, final = p.fwd(library)
    gold_out, gold_final = p.gold()
    assert error(out, gold_out) <= TOLERANCE[dtype]
    assert error(final, gold_final) <= TOLERANCE[dtype]


def test_activated_gates_in_float32(library):
    """What transformers and FLA pass: io in bfloat16, g and beta activated in float32."""
    p = problem(T=50, gate="direct", beta_is_logit=False)
    p.g, p.beta = p.g.astype(np.float32), p.beta.astype(np.float32)
    out, final = p.fwd(library)
    gold_out, gold_final = p.gold()
    assert error(out, gold_out) <= TOLERANCE["bfloat16"]
    assert error(final, gold_final) <= TOLERANCE["bfloat16"]


def test_shapes_that_fla_passes(library):
    """A_log as [1,1,H,1] in bfloat16, dt_bias as [HV,K] or flat: the same function."""
    p = problem(T=20)
    p.A_log = p.A_log.astype(BF16)
    expected = bits(p.fwd(library)[0])
    p.A_log = p.A_log.reshape(1, 1, 2, 1)
    p.dt_bias = p.dt_bias.reshape(-1)
    assert bits(p.fwd(library)[0]) == expected


def test_state_layouts(library):
    p = problem(lens=[20, 7], K=64, V=128)
    out, final = p.fwd(library)
    p.initial_state = np.ascontiguousarray(p.initial_state.swapaxes(2, 3))
    turned = np.full((2, 2, 64, 128), np.nan, np.float32)
    again = np.full_like(p.v, np.nan)
    flash_kda.fwd(
        *p.tensors(library), None, library.of(again), library.of(p.A_log), library.of(p.dt_bias),
        None, library.of(p.initial_state), library.of(turned), library.of(p.cu_seqlens),
        state_layout="kv",
    )  # fmt: skip
    assert error(again, out.astype(np.float64)) <= TOLERANCE["bfloat16"]
    assert error(turned.swapaxes(2, 3), final.astype(np.float64)) <= TOLERANCE["float32"]


def test_state_pool(library):
    """Slots in any order, in place; -1 skips; has_initial_state=False ignores a poisoned slot."""
    p = problem(lens=[20, 33, 5, 16])
    _, final = p.fwd(library)
    pool = np.full((7, 2, 64, 64), np.nan, np.float32)
    slots = np.array([4, 0, -1, 6], np.int32)
    pool[[4, 0]] = p.initial_state[:2]  # slot 6 stays NaN: sequence 3 starts from zero
    begin = pool.copy()
    has = np.array([True, True, True, False])
    out = np.full_like(p.v, 7)
    flash_kda.fwd(
        *p.tensors(library), None, library.of(out), library.of(p.A_log), library.of(p.dt_bias),
        None, library.of(pool), library.of(pool), library.of(p.cu_seqlens),
        state_indices=library.of(slots), has_initial_state=library.of(has),
    )  # fmt: skip
    assert bits(pool[[4, 0]]) == bits(final[:2])
    assert np.isfinite(pool[6]).all()
    assert bits(pool[[1, 2, 3, 5]]) == bits(begin[[1, 2, 3, 5]])
    assert (out[:, 53:58] == 7).all() and not (out[:, :53] == 7).all()


def test_split_anywhere_a_chunk_ends(library):
    """Two calls that carry the float32 state are one call, bit for bit."""
    whole = problem(T=96, K=128, V=128)
    out, final = whole.fwd(library)
    for at in (64, 80) if "chunk 16" in flash_kda.plan(*whole.tensors(library)) else (64,):
        middle = np.empty_like(final)
        halves = np.empty_like(whole.v)
        common = (library.of(whole.A_log), library.of(whole.dt_bias), None)
        for part, start, end in (
            (slice(0, at), whole.initial_state, middle),
            (slice(at, None), middle, end_state := np.empty_like(final)),
        ):
            flash_kda.fwd(
                *[library.of(np.ascontiguousarray(x[:, part])) for x in whole.tensors(Numpy)],
                None, library.of(halves[:, part]), *common, library.of(start), library.of(end),
            )  # fmt: skip
        assert bits(halves) == bits(out) and bits(end_state) == bits(final)


def test_checkpoints(library):
    p = problem(lens=[40, 16, 70])
    _, final = p.fwd(library)
    rows = 3 + 1 + 5
    after = np.full((rows, 2, 64, 64), np.nan, np.float32)
    p.fwd(library, checkpoint_state=library.of(after), checkpoint_every=16)
    assert bits(after[[2, 3, 8]]) == bits(final)  # the last row of each sequence
    before = np.full_like(after, np.nan)
    p.fwd(library, checkpoint_state=library.of(before), checkpoint_every=16, checkpoint_before=True)
    assert bits(before[[0, 3, 4]]) == bits(p.initial_state)
    assert bits(before[[1, 2, 5, 6, 7, 8]]) == bits(after[[0, 1, 4, 5, 6, 7]])
    offsets = np.array([[16, -1], [16, 0], [64, 32]], np.int64)
    some = np.full((3, 2, 2, 64, 64), 7, np.float32)
    p.fwd(library, checkpoint_state=library.of(some), checkpoint_offsets=library.of(offsets))
    assert bits(some[0, 0]) == bits(after[0]) and (some[0, 1] == 7).all()
    assert bits(some[1, 0]) == bits(final[1]) and bits(some[1, 1]) == bits(p.initial_state[1])
    assert bits(some[2, 0]) == bits(after[7]) and bits(some[2, 1]) == bits(after[5])
    packed = np.full((2, 2, 64, 64), np.nan, np.float32)
    p.fwd(
        library,
        checkpoint_state=library.of(packed),
        checkpoint_offsets=library.of(np.array([16, 32], np.int32)),
        checkpoint_indptr=library.of(np.array([0, 1, 1, 2], np.int32)),
    )
    assert bits(packed) == bits(after[[0, 5]])
    pool = np.full((4, 2, 64, 64), 7, np.float32)
    p.fwd(
        library,
        checkpoint_state=library.of(pool),
        checkpoint_offsets=library.of(np.array([16, 32], np.int32)),
        checkpoint_indptr=library.of(np.array([0, 1, 1, 2], np.int32)),
        checkpoint_state_indices=library.of(np.array([3, -1], np.int32)),
    )
    assert bits(pool[3]) == bits(after[0]) and (pool[:3] == 7).all()


def test_batch_invariant(library):
    p = problem(lens=[20, 33, 5], batch_invariant=True)
    out, final = p.fwd(library)
    for n, (begin, end) in enumerate(zip(p.cu_seqlens[:-1], p.cu_seqlens[1:])):
        alone = np.empty_like(p.v[:, begin:end])
        state = np.empty_like(final[:1])
        flash_kda.fwd(
            *[library.of(np.ascontiguousarray(x[:, begin:end])) for x in p.tensors(Numpy)],
            None, library.of(alone), library.of(p.A_log), library.of(p.dt_bias), None,
            library.of(p.initial_state[n : n + 1].copy()), library.of(state), batch_invariant=True,
        )  # fmt: skip
        assert bits(alone) == bits(out[:, begin:end]) and bits(state[0]) == bits(final[n])


def test_every_backend_agrees():
    p = problem(lens=[50, 1, 33], K=128, V=128, dtype="float32")
    gold_out, gold_final = p.gold()
    for name, available, reason in flash_kda.backends():
        if not available:
            assert reason
            continue
        out, final = p.fwd(backend=name)
        assert error(out, gold_out) <= TOLERANCE["float32"], name
        assert error(final, gold_final) <= TOLERANCE["float32"], name


def test_sums_of_the_equations():
    """Equations (1)-(7) written out in NumPy, independent of the C code."""
    p = problem(T=12, H=1, HV=2, K=6, V=5, dtype="float32")
    out, final = p.fwd()
    q, k, v, g, beta = (x[0].astype(np.float64) for x in p.tensors(Numpy))
    q = q / np.sqrt((q * q).sum(-1, keepdims=True) + 1e-6)
    k = k / np.sqrt((k * k).sum(-1, keepdims=True) + 1e-6)
    g = -5 / (1 + np.exp(-np.exp(p.A_log.astype(np.float64))[:, None] * (g + p.dt_bias)))
    beta = 1 / (1 + np.exp(-beta))
    for h in range(2):
        S = p.initial_state[0, h].astype(np.float64)
        for t in range(12):
            S = S * np.exp(g[t, h])
            u = beta[t, h] * (v[t, h] - S @ k[t, 0])
            S = S + np.outer(u, k[t, 0])
            assert error(out[0, t, h], S @ q[t, 0] * 6**-0.5) <= 2e-5
        assert error(final[0, h], S) <= 2e-5


# ---- decode -------------------------------------------------------------------------------------


def decode_problem(**shape):
    p = problem(**{"B": 3, "T": 1, "H": 2, "HV": 4, "K": 64, "V": 128, **shape})
    return p, p.initial_state.copy()


@pytest.mark.parametrize("T", [1, 2, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_decode(library, T, dtype):
    p, state = decode_problem(T=T, dtype=dtype)
    gold_out, gold_state = p.gold()
    out = flash_kda.decode(
        *p.tensors(library),
        library.of(state),
        A_log=library.of(p.A_log),
        dt_bias=library.of(p.dt_bias),
    )
    assert type(out) is type(library.of(p.v)) and out.dtype == library.of(p.v).dtype
    assert error(out, gold_out) <= TOLERANCE[dtype]
    assert error(state, gold_state) <= TOLERANCE["float32"] * 2


def test_decode_into_out(library):
    p, state = decode_problem()
    out = library.of(np.full_like(p.v, np.nan))
    assert flash_kda.decode(*p.tensors(library), library.of(state.copy()), out) is out
    again = flash_kda.decode(*p.tensors(library), library.of(state.copy()))
    assert bits(again) == bits(out)
    keyword = library.of(np.full_like(p.v, np.nan))
    assert flash_kda.decode(*p.tensors(library), library.of(state.copy()), out=keyword) is keyword


def test_decode_allocates_contiguous(library):
    p, state = decode_problem(T=2)
    v = library.of(np.ascontiguousarray(p.v.swapaxes(1, 2)))
    v = v.transpose(1, 2) if library is Torch else v.swapaxes(1, 2)
    out = flash_kda.decode(*p.tensors(library)[:2], v, *p.tensors(library)[3:], library.of(state))
    assert out.is_contiguous() if library is Torch else out.flags.c_contiguous
    assert tuple(out.shape) == p.v.shape


def test_decode_write_state(library):
    p, state = decode_problem()
    before = bits(state)
    one = flash_kda.decode(*p.tensors(library), library.of(state), write_state=False)
    assert bits(state) == before
    two = flash_kda.decode(*p.tensors(library), library.of(state))
    assert bits(state) != before and bits(one) == bits(two)


def test_decode_pool(library):
    p, _ = decode_problem()
    pool = np.zeros((6, 4, 128, 64), np.float32)
    pool[[5, 2]] = p.initial_state[:2]
    before = pool.copy()
    out = np.full_like(p.v, 7)
    flash_kda.decode(
        *p.tensors(library), library.of(pool), library.of(out),
        state_indices=library.of(np.array([5, 2, -1])),
    )  # fmt: skip
    state = p.initial_state.copy()
    expected = flash_kda.decode(*p.tensors(library), library.of(state))
    assert bits(pool[[5, 2]]) == bits(state[:2])
    assert bits(pool[[0, 1, 3, 4]]) == bits(before[[0, 1, 3, 4]])
    assert bits(out[:2]) == bits(numpy_of(expected)[:2]) and (out[2] == 7).all()


def test_speculative_decode(library):
    """Two tokens accepted of the last four: start from slot [1], leave a state after every token."""
    p, _ = decode_problem(T=3)
    pool = np.random.default_rng(1).standard_normal((12, 4, 128, 64)).astype(np.float32)
    table = np.array([[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]], np.int32)
    start = pool[[1, 4, 10]].copy()
    accepted = np.array([2, 1, 3], np.int32)
    out = flash_kda.decode(
        *p.tensors(library), library.of(pool), state_indices=library.of(table),
        num_accepted_tokens=library.of(accepted),
    )  # fmt: skip
    state = start.copy()
    outs = []
    for t in range(3):
        step = [library.of(np.ascontiguousarray(x[:, t : t + 1])) for x in p.tensors(Numpy)]
        outs.append(numpy_of(flash_kda.decode(*step, library.of(state))))
        assert error(pool[table[:, t]], state) <= 1e-6
    assert error(out, np.concatenate(outs, 1).astype(np.float64)) <= TOLERANCE["bfloat16"]


def test_decode_continues_prefill(library):
    p = problem(B=2, T=20)
    out, final = p.fwd(library)
    head = [np.ascontiguousarray(x[:, :19]) for x in p.tensors(Numpy)]
    tail = [np.ascontiguousarray(x[:, 19:]) for x in p.tensors(Numpy)]
    state = np.empty_like(final)
    common = dict(A_log=library.of(p.A_log), dt_bias=library.of(p.dt_bias))
    flash_kda.fwd(
        *map(library.of, head), None, library.of(np.empty_like(head[2])), **common, lower_bound=None,
        initial_state=library.of(p.initial_state), final_state=library.of(state),
    )  # fmt: skip
    last = flash_kda.decode(*map(library.of, tail), library.of(state), **common)
    assert error(last, out[:, 19:].astype(np.float64)) <= 2 * TOLERANCE["bfloat16"]
    assert error(state, final.astype(np.float64)) <= 2 * TOLERANCE["float32"]


def test_decode_needs_something_to_allocate():
    p, state = decode_problem()
    from problems import DLPackOnly

    tensors = p.tensors(Torch)
    tensors[2] = DLPackOnly(tensors[2])
    with pytest.raises(TypeError, match="out: None, expected a tensor"):
        flash_kda.decode(*tensors, state)


# ---- summary ------------------------------------------------------------------------------------


def test_summary_is_the_affine_map(library):
    p = problem(lens=[20, 0, 9], K=16, V=24, dtype="float32")
    gold_out, gold_final = p.gold()
    M = np.full((3, 2, 16, 16), np.nan, np.float32)
    b = np.full((3, 2, 24, 16), np.nan, np.float32)
    flash_kda.experimental.summary(
        *p.tensors(library)[1:], library.of(M), library.of(b), library.of(p.A_log),
        library.of(p.dt_bias), cu_seqlens=library.of(p.cu_seqlens),
    )  # fmt: skip
    assert error(p.initial_state.astype(np.float64) @ M + b, gold_final) <= 2e-5


def test_torch_default_device_and_dtype_do_not_matter():
    p = problem(T=10)
    expected = bits(p.fwd(Torch)[0])
    with torch.device("meta"):
        torch.set_default_dtype(torch.float64)
        try:
            assert bits(p.fwd(Torch)[0]) == expected
        finally:
            torch.set_default_dtype(torch.float32)
