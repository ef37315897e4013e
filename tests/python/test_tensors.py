"""What counts as a tensor, from which library, with which strides; and what the refusals say."""

import sys
import types

import flash_kda
import ml_dtypes
import numpy as np
import pytest
import torch
from problems import (
    BF16,
    DLPackOnly,
    Numpy,
    OldDLPackOnly,
    Torch,
    TorchLike,
    bits,
    problem,
    torch_of,
)


def fwd(arrays, out, *, q=None, **options):
    arrays = list(arrays)
    if q is not None:
        arrays[0] = q
    flash_kda.fwd(*arrays, None, out, None, None, None, **options)


WRAPPERS = {
    "torch": torch_of,
    "parameter": lambda a: torch.nn.Parameter(torch_of(a), requires_grad=a.dtype.kind != "i"),
    "torch-like": lambda a: TorchLike(torch_of(a)),
    "numpy": lambda a: a,
    "dlpack-torch": lambda a: DLPackOnly(torch_of(a)),
    "dlpack-numpy": lambda a: DLPackOnly(a),
    "dlpack-old": lambda a: OldDLPackOnly(torch_of(a)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_way_in_gives_the_same_bits(wrapper, dtype):
    if wrapper == "dlpack-numpy" and dtype == "bfloat16":
        pytest.skip("NumPy's DLPack has no bfloat16")
    p = problem(T=37, lens=[17, 0, 20], dtype=dtype)
    expected = [bits(x) for x in p.fwd(Numpy)]
    wrap = types.SimpleNamespace(of=lambda a: None if a is None else WRAPPERS[wrapper](a))
    assert [bits(x) for x in p.fwd(wrap)] == expected


def test_libraries_mix():
    p = problem(T=20)
    out = np.zeros_like(p.v)
    fwd([torch_of(p.q), p.k, DLPackOnly(torch_of(p.v)), TorchLike(torch_of(p.g)), p.beta], out)
    expected = np.zeros_like(p.v)
    fwd(p.tensors(Numpy), expected)
    assert bits(out) == bits(expected)


def sliced(array, library):
    """The same values in a view of a wider buffer, as a fused projection leaves them."""
    wide = np.full((*array.shape[:-1], array.shape[-1] + 24), 7.0, array.dtype)
    wide[..., 8 : 8 + array.shape[-1]] = array
    return library.of(wide)[..., 8 : 8 + array.shape[-1]]


def transposed(array, library):
    """The same values with heads outside tokens."""
    swapped = np.ascontiguousarray(array.swapaxes(1, 2))
    view = library.of(swapped)
    return view.transpose(1, 2) if library is Torch else view.swapaxes(1, 2)


@pytest.mark.parametrize("view", [sliced, transposed])
def test_strided_inputs_and_outputs(library, view):
    p = problem(B=2, T=35, H=2, HV=4)
    expected, _ = p.fwd(library)
    arguments = [view(x, library) for x in (p.q, p.k, p.v, p.g)]
    arguments.append(sliced(p.beta, library))
    out = view(np.full_like(p.v, np.nan), library)
    final = np.full(p.state_shape, np.nan, np.float32)
    flash_kda.fwd(
        *arguments, None, out, library.of(p.A_log), library.of(p.dt_bias), None,
        library.of(p.initial_state), library.of(final),
    )  # fmt: skip
    assert bits(out) == bits(expected)


def test_strided_out_leaves_the_gaps(library):
    p = problem(T=19)
    wide = np.full((*p.v.shape[:-1], p.v.shape[-1] + 24), 7.0, p.v.dtype)
    fwd(p.tensors(library), library.of(wide)[..., 8:-16])
    assert (wide[..., :8] == 7).all() and (wide[..., -16:] == 7).all()
    assert not (wide[..., 8:-16] == 7).any()


def test_inputs_never_change(library):
    p = problem(T=20)
    arrays = [p.q, p.k, p.v, p.g, p.beta, p.A_log, p.dt_bias, p.initial_state]
    before = [bits(a) for a in arrays]
    p.fwd(library)
    assert [bits(a) for a in arrays] == before


def test_tensors_that_require_grad():
    p = problem(T=9, dtype="float32")
    arguments = [t.requires_grad_() for t in p.tensors(Torch)]
    out = torch.full(p.v.shape, torch.nan)
    fwd(arguments, out)
    assert out.isfinite().all() and out.grad_fn is None


def test_scalar_tensors(library):
    """A_log of one head may come without dimensions."""
    p = problem(T=9, H=1)
    out, expected = np.zeros_like(p.v), np.zeros_like(p.v)
    A_log = np.array(0.25, np.float32)
    scalar = torch.tensor(0.25) if library is Torch else A_log
    flash_kda.fwd(*p.tensors(library), None, library.of(out), scalar, None, None)
    flash_kda.fwd(*p.tensors(library), None, library.of(expected), A_log.reshape(1), None, None)
    assert bits(out) == bits(expected)


def test_empty_tensors(library):
    for p in (problem(T=0), problem(B=0, T=5), problem(lens=[0, 0]), problem(lens=[])):
        out, final = p.fwd(library)
        assert out.size == 0
        assert bits(final) == bits(p.initial_state)


# ---- refusals -----------------------------------------------------------------------------------


def raises(exception, message, call):
    """The call raises exactly this exception, with a message that matches."""
    with pytest.raises(exception, match=message) as caught:
        call()
    assert caught.type is exception


def untouched(out):
    return (np.asarray(out, dtype=np.float32) == 7).all()


def test_read_only_output():
    p = problem(T=5)
    out = np.full_like(p.v, 7)
    out.flags.writeable = False
    message = "out: read-only memory, expected a writable tensor"
    raises(ValueError, message, lambda: fwd(p.tensors(Numpy), out))
    single = problem(T=5, dtype="float32")
    out = np.full_like(single.v, 7)
    out.flags.writeable = False
    raises(ValueError, message, lambda: fwd(single.tensors(Numpy), DLPackOnly(out)))
    assert untouched(out)
    state = np.zeros((1, 2, 64, 64), np.float32)
    state.flags.writeable = False
    call = lambda **o: flash_kda.decode(*[x[:, :1] for x in p.tensors(Numpy)], state, **o)
    raises(ValueError, "state: read-only", call)
    assert call(write_state=False).shape == (1, 1, 2, 64)  # then it is only read


def test_read_only_inputs_are_fine():
    p = problem(T=5)
    for x in (p.q, p.k, p.v, p.g, p.beta, p.A_log, p.dt_bias, p.initial_state):
        x.flags.writeable = False
    p.fwd(Numpy)


def test_negative_strides():
    p = problem(T=5)
    for argument in range(4):
        tensors, out = p.tensors(Numpy), np.full_like(p.v, 7)
        tensors[argument] = tensors[argument][:, ::-1]
        raises(ValueError, rf"^{'qkvg'[argument]}: .*stride", lambda: fwd(tensors, out))
        assert untouched(out)


def test_innermost_stride():
    p = problem(T=5)
    wide = np.zeros((1, 5, 2, 128), BF16)
    out = np.full_like(p.v, 7)
    raises(
        ValueError,
        "^q: strides .* expected 1 in the last dimension",
        lambda: fwd(p.tensors(Numpy), out, q=wide[..., ::2]),
    )
    raises(
        ValueError,
        "^q: strides .* expected 1 in the last dimension",
        lambda: fwd(p.tensors(Torch), torch_of(out), q=torch_of(wide)[..., ::2]),
    )
    assert untouched(out)


def test_stride_between_elements():
    p = problem(T=5, dtype="float32")
    record = np.zeros((1, 5, 2, 64), np.dtype({"names": ["x"], "formats": ["f4"], "itemsize": 6}))
    out = np.full_like(p.v, 7)
    raises(ValueError, "q: stride of .* bytes", lambda: fwd(p.tensors(Numpy), out, q=record["x"]))


def test_misaligned_memory():
    p = problem(T=5, dtype="float32")
    memory = np.zeros(p.q.nbytes + 1, np.uint8)
    q = memory[1:].view(np.float32).reshape(p.q.shape)
    out = np.full_like(p.v, 7)
    raises(
        ValueError,
        r"^q: data 0x[0-9a-f]+, expected a multiple of 4",
        lambda: fwd(p.tensors(Numpy), out, q=q),
    )


def test_byte_order():
    p = problem(T=5, dtype="float32")
    out = np.full_like(p.v, 7)
    swapped = p.q.astype(">f4")
    raises(ValueError, "q: byte-swapped", lambda: fwd(p.tensors(Numpy), out, q=swapped))


@pytest.mark.parametrize(
    "value, text",
    [
        (np.zeros((1, 5, 2, 64), np.uint8), "dtype uint8"),
        (np.zeros((1, 5, 2, 64), np.complex64), "dtype complex64"),
        (np.zeros((1, 5, 2, 64), ml_dtypes.float8_e4m3fn), "dtype float8_e4m3fn"),
        (torch.zeros((1, 5, 2, 64), dtype=torch.int16), "dtype int16"),
        (torch.zeros((1, 5, 2, 64), dtype=torch.complex64), "dtype complex64"),
        (torch.zeros((1, 5, 2, 64), dtype=torch.float8_e4m3fn), "dtype float8_e4m3fn"),
        (DLPackOnly(np.zeros((1, 5, 2, 64), np.uint16)), "dtype of another kind"),
        (np.zeros((1, 5, 2, 64), np.int64), "q: dtype int64"),
        ([[1.0]], "q: list, expected a tensor"),
        (1.0, "q: float, expected a tensor"),
        ("q", "q: str, expected a tensor"),
        (object(), "q: object, expected a tensor"),
    ],
)
def test_wrong_types(value, text):
    p = problem(T=5)
    out = np.full_like(p.v, 7)
    raises(TypeError, text, lambda: fwd(p.tensors(Numpy), out, q=value))
    assert untouched(out)


def test_missing_tensor():
    p = problem(T=5)
    tensors, out = p.tensors(Numpy), np.full_like(p.v, 7)
    tensors[1] = None
    raises(ValueError, "^k: ", lambda: fwd(tensors, out))
    raises(ValueError, "^out: ", lambda: fwd(p.tensors(Numpy), None))


def test_shape_message_is_the_librarys():
    p = problem(T=5)
    tensors, out = p.tensors(Numpy), np.full_like(p.v, 7)
    tensors[1] = np.zeros((1, 5, 2, 32), BF16)
    raises(
        ValueError,
        r"^k: shape \[1,5,2,32\], expected \[1,5,2,64\] to match q$",
        lambda: fwd(tensors, out),
    )


def test_too_many_dimensions(library):
    p = problem(T=5)
    q = library.of(p.q.reshape(1, 1, 1, 5, 2, 64))
    out = np.full_like(p.v, 7)
    raises(
        ValueError,
        "q: 6 dimensions, expected at most 5",
        lambda: fwd(p.tensors(library), library.of(out), q=q),
    )


def test_tensors_without_memory():
    p = problem(T=5)
    out = torch_of(p.v.copy())
    raises(ValueError, "^q: .*meta", lambda: fwd(p.tensors(Torch), out, q=torch_of(p.q).to("meta")))
    raises(ValueError, "^q: ", lambda: fwd(p.tensors(Torch), out, q=torch_of(p.q).to_sparse()))


def test_exceptions_of_the_tensor_keep_their_cause():
    class Broken:
        def __dlpack_device__(self):
            return (1, 0)

        def __dlpack__(self, **keywords):
            raise RuntimeError("no memory here\nmore")

    class Interrupted(Broken):
        def __dlpack__(self, **keywords):
            raise KeyboardInterrupt

    p = problem(T=5)
    out = np.full_like(p.v, 7)
    with pytest.raises(ValueError, match="^q: no memory here$") as caught:
        fwd(p.tensors(Numpy), out, q=Broken())
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(KeyboardInterrupt):
        fwd(p.tensors(Numpy), out, q=Interrupted())


@pytest.mark.parametrize(
    "options, exception, text",
    [
        (dict(gate="hard"), ValueError, "gate: 'hard', expected 'bounded', 'softplus' or 'direct'"),
        (dict(gate=1), TypeError, "gate: int, expected a str"),
        (dict(state_layout="kvv"), ValueError, "state_layout: 'kvv', expected 'vk' or 'kv'"),
        (dict(l2norm="yes"), TypeError, "l2norm: str, expected a bool"),
        (dict(l2norm=None), TypeError, "l2norm: NoneType, expected a bool"),
        (dict(batch_invariant=1.0), TypeError, "batch_invariant: float, expected a bool"),
        (dict(checkpoint_every=1.5), TypeError, "checkpoint_every: float, expected an int"),
        (dict(checkpoint_every=2**70), ValueError, "checkpoint_every: .*64-bit"),
        (dict(checkpoint_every=15), ValueError, "checkpoint_every"),
        (dict(backend=3), TypeError, "backend: int, expected a str or None"),
        (dict(backend="none-such"), ValueError, "none-such"),
    ],
)
def test_options_are_checked(options, exception, text):
    p = problem(T=5)
    out = np.full_like(p.v, 7)
    raises(exception, text, lambda: fwd(p.tensors(Numpy), out, **options))
    assert untouched(out)


@pytest.mark.parametrize(
    "scale, lower_bound, exception, text",
    [
        (0, None, ValueError, "scale: 0, expected None"),
        ("1", None, TypeError, "scale: str, expected a number or None"),
        (float("inf"), None, ValueError, "scale"),
        (None, 0.5, ValueError, "lower_bound"),
        (None, -6, ValueError, "lower_bound"),
        (None, [], TypeError, "lower_bound: list, expected a number or None"),
    ],
)
def test_numbers_are_checked(scale, lower_bound, exception, text):
    p = problem(T=5)
    out = np.full_like(p.v, 7)
    raises(
        exception,
        text,
        lambda: flash_kda.fwd(*p.tensors(Numpy), scale, out, None, None, lower_bound),
    )
    assert untouched(out)


def test_state_indices_or_the_two():
    p = problem(B=2, T=5)
    index = np.arange(2)
    pool = np.zeros((2, 2, 64, 64), np.float32)
    for other in ("initial_state_indices", "final_state_indices"):
        raises(
            ValueError,
            f"state_indices: given together with {other}",
            lambda: fwd(
                p.tensors(Numpy),
                np.zeros_like(p.v),
                initial_state=pool,
                final_state=pool,
                state_indices=index,
                **{other: index},
            ),  # fmt: skip
        )


# ---- devices ------------------------------------------------------------------------------------


class OnCuda(TorchLike):
    """Looks like a CUDA tensor, of a device that no machine has. Its memory is the host's."""

    device = torch.device("cuda", 63)


def test_devices_must_agree():
    p = problem(T=5)
    tensors, out = p.tensors(Torch), Torch.of(np.full_like(p.v, 7))
    tensors[1] = OnCuda(tensors[1])
    raises(ValueError, "k: device cuda:63, expected cpu to match q", lambda: fwd(tensors, out))


def test_mixed_devices_with_q_on_cuda(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0)
    )
    p = problem(T=5)
    tensors, out = p.tensors(Torch), Torch.of(np.full_like(p.v, 7))
    raises(
        ValueError,
        "k: device cpu, expected cuda:63 to match q",
        lambda: fwd(tensors, out, q=OnCuda(tensors[0])),
    )


def test_cuda_is_answered_in_words(monkeypatch):
    asked = []

    def current_stream(device):
        asked.append(device)
        return types.SimpleNamespace(cuda_stream=0x1234)

    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    p = problem(T=5)
    tensors = [OnCuda(t) for t in p.tensors(Torch)]
    out = np.full_like(p.v, 7)
    # This build has no CUDA kernels, or the machine no driver, or no such device.
    raises(RuntimeError, "(?i)cuda|device|driver", lambda: fwd(tensors, OnCuda(torch_of(out))))
    assert untouched(out)
    assert asked == [63]  # the stream of q's device, once a call
    supported, reason = flash_kda.supports(*tensors)
    assert torch.cuda.is_available() or not supported and reason


def test_other_devices():
    class OnTpu(TorchLike):
        device = types.SimpleNamespace(type="xla", index=0)

    p = problem(T=5)
    out = Torch.of(np.full_like(p.v, 7))
    raises(
        ValueError,
        "q: device xla, expected cpu or cuda",
        lambda: fwd(p.tensors(Torch), out, q=OnTpu(torch_of(p.q))),
    )


# ---- workspace ----------------------------------------------------------------------------------


def test_workspace(library):
    p = problem(lens=[30, 20], K=128, V=128)
    size = flash_kda.get_workspace_size(50, 2, 2)
    expected = [bits(x) for x in p.fwd(library)]
    for offset in (0, 1, 63):  # any address will do
        memory = np.full(size + offset + 64, 7, np.uint8)
        given = memory[offset : offset + size]
        assert [bits(x) for x in p.fwd(library, workspace=library.of(given))] == expected
        assert (memory[offset + size :] == 7).all() and (memory[:offset] == 7).all()


def test_workspace_size_is_enough_and_monotone():
    sizes = [
        flash_kda.get_workspace_size(T, H, N)
        for T, H, N in ((0, 1, 0), (1, 1, 1), (100, 4, 3), (5000, 8, 40))
    ]
    assert sizes == sorted(sizes)
    for K in (1, 64, 128):
        for gate in ("bounded", "softplus", "direct"):
            p = problem(B=3, T=33, H=4, K=K, gate=gate)
            p.fwd(workspace=np.zeros(flash_kda.get_workspace_size(99, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="T_total: -1"):
        flash_kda.get_workspace_size(-1, 1)
    with pytest.raises(TypeError, match="H: str, expected an int"):
        flash_kda.get_workspace_size(1, "1")


def test_workspace_refusals(library):
    p = problem(T=40)
    strided = library.of(np.zeros(4096, np.uint8))[::2]
    with pytest.raises(ValueError, match="workspace: strided"):
        p.fwd(library, workspace=strided)
    with pytest.raises(TypeError, match="workspace: bytearray"):
        p.fwd(library, workspace=bytearray(4096))
    empty = library.of(np.zeros(0, np.uint8))
    with pytest.raises(ValueError, match="workspace"):
        p.fwd(library, workspace=empty)


def test_kept_workspace_grows():
    """Small, large, small again: the thread's own workspace serves each."""
    small, large = problem(T=5, H=1), problem(T=300, H=8, K=128, V=128)
    first = bits(small.fwd()[0])
    alone = bits(large.fwd()[0])
    assert bits(large.fwd()[0]) == alone
    assert bits(small.fwd()[0]) == first


# ---- references ---------------------------------------------------------------------------------


def test_references_are_given_back():
    """Neither calls nor refused calls keep anything alive."""
    p = problem(T=5, dtype="float32")
    wrong = p.q.astype(np.int32)
    inner = torch_of(p.v)
    arguments = [p.q, torch_of(p.k), DLPackOnly(inner), TorchLike(torch_of(p.g)), p.beta]
    out = np.zeros_like(p.v)
    state = np.zeros((1, 2, 64, 64), np.float32)

    def counts():
        objects = [*arguments, wrong, out, state, inner, inner.dtype, wrong.dtype, None]
        return [sys.getrefcount(x) for x in objects[:-1]] + [inner._use_count()]

    def calls():
        fwd(arguments, out)
        flash_kda.supports(*arguments)
        flash_kda.plan(*arguments)
        flash_kda.decode(*[x[:, :1] for x in p.tensors(Numpy)], state)
        for bad in (dict(q=wrong), dict(q=3), dict(q=DLPackOnly(wrong[..., ::2])), dict(gate="x")):
            with pytest.raises((ValueError, TypeError)):
                fwd(arguments, out, **bad)
        flash_kda.supports(wrong, *arguments[1:])

    calls()
    before = counts()
    for _ in range(50):
        calls()
    after = counts()
    assert all(abs(a - b) < 10 for a, b in zip(after, before)), (before, after)
    assert after[-1] == before[-1]


def test_types_come_and_go():
    """More tensor types than are remembered, each short-lived."""
    p = problem(T=5)
    expected = None
    for i in range(40):
        kind = type(f"Kind{i}", (DLPackOnly if i % 2 else TorchLike,), {})
        out = np.zeros_like(p.v)
        fwd([kind(t) for t in p.tensors(Torch)], out)
        expected = expected or bits(out)
        assert bits(out) == expected


# ---- questions ----------------------------------------------------------------------------------


def test_supports(library):
    p = problem(lens=[3, 9])
    tensors = p.tensors(library)
    cu_seqlens = library.of(p.cu_seqlens)
    assert flash_kda.supports(*tensors, cu_seqlens=cu_seqlens) == (True, "")
    assert flash_kda.supports(*tensors, None, library.of(p.v), cu_seqlens=cu_seqlens) == (True, "")
    assert flash_kda.supports(*tensors, lower_bound=-7)[0] is False
    assert "lower_bound" in flash_kda.supports(*tensors, lower_bound=-7)[1]
    wrong = [library.of(p.q.astype(np.int32)), *tensors[1:]]
    supported, reason = flash_kda.supports(*wrong)
    assert supported is False and reason.startswith("q: dtype int32")
    supported, reason = flash_kda.supports(
        library.of(np.zeros((1, 12, 2, 300), BF16)), *tensors[1:]
    )
    assert supported is False and "300" in reason
    with pytest.raises(TypeError, match="q: int, expected a tensor"):
        flash_kda.supports(3, *tensors[1:])
    assert flash_kda.supports(*tensors[:4], library.of(p.beta.astype(np.uint8)))[0] is False


def test_supports_decode(library):
    p = problem(B=4, T=1)
    state = library.of(np.zeros((4, 2, 64, 64), np.float32))
    assert flash_kda.supports(*p.tensors(library), op="decode", state=state) == (True, "")
    long = problem(B=4, T=9)
    supported, reason = flash_kda.supports(*long.tensors(library), op="decode", state=state)
    assert not supported and "9" in reason
    with pytest.raises(TypeError, match="got 'final_state', which op='decode' does not take"):
        flash_kda.supports(*p.tensors(library), op="decode", final_state=state)
    with pytest.raises(TypeError, match="got 'state', which op='prefill' does not take"):
        flash_kda.supports(*p.tensors(library), state=state)
    with pytest.raises(
        ValueError, match="op: 'backwards', expected 'prefill', 'decode' or 'backward'"
    ):
        flash_kda.supports(*p.tensors(library), op="backwards")


def test_plan_names_the_backend(library):
    p = problem(T=64)
    available = [name for name, usable, _ in flash_kda.backends() if usable]
    assert flash_kda.backends()[-1][0] == "reference"
    for name in available:
        assert name in flash_kda.plan(*p.tensors(library), backend=name)
    text = flash_kda.plan(*p.tensors(library))
    assert all(name in text for name, _, _ in flash_kda.backends())  # each has its reason
    with pytest.raises(ValueError, match="lower_bound"):
        flash_kda.plan(*p.tensors(library), lower_bound=1.0)


def test_threads_setting():
    before = flash_kda.get_num_threads()
    try:
        flash_kda.set_num_threads(1)
        assert flash_kda.get_num_threads() == 1
        for bad in (-1, 5000, 2**40):
            with pytest.raises(ValueError):
                flash_kda.set_num_threads(bad)
        with pytest.raises(TypeError):
            flash_kda.set_num_threads("2")
    finally:
        flash_kda.set_num_threads(0)
    assert flash_kda.get_num_threads() == before
