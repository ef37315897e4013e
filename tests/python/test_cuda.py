"""The CUDA backends through torch tensors: gold, graphs, streams, threads, large tensors, odd memory.

Gold is the same call in double precision on the CPU (backend "reference"). Every test runs with the plan's
choice of backends, named by the first that this GPU can run, and once more for each of the others, forced.
"""

import re
import subprocess
import threading

import flash_kda
import numpy as np
import pytest
import test_cases as table
import test_serving
import torch
from problems import (
    DLPackOnly,
    Numpy,
    TorchLike,
    cuda_backends,
    error,
    numpy_of,
    problem,
    torch_of,
    why_no_cuda,
)

TOLERANCE = 5e-3  # bf16 operands in matrix products
DECODE_TOLERANCE = 2.5e-3  # fp32 arithmetic, bf16 output
COLLINEAR_TOLERANCE = 1.5e-2
REASON = why_no_cuda()
BACKENDS = [] if REASON else cuda_backends()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)


@pytest.fixture(autouse=True, params=BACKENDS or [""])
def backend(request, monkeypatch):
    if request.param and request.param != BACKENDS[0]:
        monkeypatch.setenv("FLASHKDA_BACKEND", request.param)
    return request.param


def on_device(array, device="cuda"):
    return None if array is None else torch_of(array).to(device)


def raw(tensor):
    """The tensor's bits, for comparisons that NaN does not disturb."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def same_bits(x, y):
    return torch.equal(raw(x), raw(y))


class Call:
    """A prefill on the device that can be made again and again; `p` is its problem."""

    def __init__(self, p, device="cuda", **options):
        self.p = p
        self.options = {**p.options, **options}
        self.inputs = [on_device(x, device) for x in (p.q, p.k, p.v, p.g, p.beta)]
        self.A_log, self.dt_bias = on_device(p.A_log, device), on_device(p.dt_bias, device)
        self.initial = on_device(p.initial_state, device)
        self.cu_seqlens = on_device(p.cu_seqlens, device)
        self.out = torch.full_like(self.inputs[2], torch.nan)
        self.final = torch.full(p.state_shape, torch.nan, device=device)

    def ask(self, function, **options):
        return function(
            *self.inputs, None, self.out, self.A_log, self.dt_bias, None,
            initial_state=self.initial, final_state=self.final, cu_seqlens=self.cu_seqlens,
            **{**self.options, **options},
        )  # fmt: skip

    def run(self, **options):
        self.ask(flash_kda.fwd, **options)
        return self

    def backend(self):
        """Which one runs it."""
        return re.search(r"^backend: (\S+)", self.ask(flash_kda.plan), re.M)[1]

    def poison(self):
        self.out.fill_(torch.nan)
        self.final.fill_(torch.nan)
        return self

    def results(self):
        torch.cuda.synchronize()
        return self.out.clone(), self.final.clone()


def matches(call, expected):
    return same_bits(call.out, expected[0]) and same_bits(call.final, expected[1])


GRADIENTS = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")


def gradient_tolerance(x):
    """A few sums may be off by more than many are in root mean square."""
    return TOLERANCE if x.numel() >= 512 else 2 * TOLERANCE


class Gradients(Call):
    """A backward on the device that can be made again and again; `p` is the problem of its prefill."""

    def __init__(self, p, device="cuda", wanted=GRADIENTS, **options):
        super().__init__(p, device, **options)
        rng = np.random.default_rng(17)
        self.host_d_out = rng.standard_normal(p.v.shape, dtype=np.float32).astype(p.v.dtype)
        self.host_d_final = rng.standard_normal(p.state_shape, dtype=np.float32)
        self.d_out = on_device(self.host_d_out, device)
        self.d_final = on_device(self.host_d_final, device)
        self.wanted = [n for n in wanted if n == "initial_state" or getattr(p, n) is not None]
        self.d = {n: on_device(x, device) for n, x in self.like(np.float32).items()}
        for n, x in self.d.items():
            if n in GRADIENTS[:5]:
                self.d[n] = x.to(self.inputs[0].dtype)

    def like(self, dtype):
        shapes = {
            n: self.p.state_shape if n == "initial_state" else getattr(self.p, n).shape
            for n in self.wanted
        }
        return {n: np.full(shape, np.nan, dtype) for n, shape in shapes.items()}

    def run(self, **options):
        flash_kda.backward(
            *self.inputs, None, self.d_out, self.A_log, self.dt_bias, None, self.initial,
            self.d_final, self.cu_seqlens, **{f"d_{n}": x for n, x in self.d.items()},
            **{**self.options, **options},
        )  # fmt: skip
        return self

    def backend(self):
        named = dict(
            zip(GRADIENTS, self.inputs), scale=None, A_log=self.A_log, dt_bias=self.dt_bias
        )
        named |= dict(initial_state=self.initial, cu_seqlens=self.cu_seqlens, op="backward")
        return re.search(r"^backend: (\S+)", flash_kda.plan(**named, **self.options), re.M)[1]

    def poison(self):
        for x in self.d.values():
            x.fill_(torch.nan)
        return self

    def results(self):
        torch.cuda.synchronize()
        return {n: x.clone() for n, x in self.d.items()}

    def matches(self, expected):
        return all(same_bits(x, expected[n]) for n, x in self.d.items())

    def gold(self):
        p, gold = self.p, self.like(np.float64)
        flash_kda.backward(
            p.q, p.k, p.v, p.g, p.beta, None, self.host_d_out, p.A_log, p.dt_bias, None,
            p.initial_state, self.host_d_final, p.cu_seqlens, backend="reference",
            **{f"d_{n}": x for n, x in gold.items()}, **self.options,
        )  # fmt: skip
        return gold

    def check(self):
        gold = self.gold()
        for n, x in self.results().items():
            assert error(x.cpu(), gold[n]) <= gradient_tolerance(x), n


# ---- against gold -------------------------------------------------------------------------------


def test_plan_and_support(backend):
    call = Call(problem(K=128, V=128))
    assert call.backend() == backend and Gradients(call.p).backend() == backend
    assert ("sm90" in BACKENDS) == (torch.cuda.get_device_capability() == (9, 0))
    names = dict(zip("qkvg", call.inputs), beta=call.inputs[4])
    assert flash_kda.supports(**names) == (True, "")
    half = {name: x.half() for name, x in names.items()}
    good, reason = flash_kda.supports(**half)
    assert not good and "float16" in reason and "bfloat16" in reason
    narrow = {n: x[..., :48].contiguous() if x.ndim == 4 else x for n, x in names.items()}
    good, reason = flash_kda.supports(**narrow)
    assert not good and "48" in reason


@pytest.mark.parametrize(
    "shape",
    [
        dict(T=1, K=128, V=128),
        dict(B=3, T=67, H=2, HV=4, K=128, V=128, gate="softplus"),
        dict(B=2, T=130, H=3, K=64, V=128, gate="direct"),
        dict(T=300, H=4, K=128, V=64, allow_neg_eigval=True),
        dict(lens=[0, 33, 16, 0, 100, 1, 0], H=2, HV=8, K=128, V=128, state=False),
        dict(lens=[40, 7], H=2, K=64, V=64, beta_is_logit=False),
        dict(T=2000, H=2, K=128, V=128),
    ],
    ids=str,
)
def test_prefill_against_gold(shape):
    p = problem(**shape)
    before = [x.copy() for x in (p.q, p.k, p.v, p.g, p.beta)]
    call = Call(p).run()
    out, final = call.results()
    gold_out, gold_final = p.gold()
    assert error(out.cpu(), gold_out) <= TOLERANCE
    assert error(final.cpu(), gold_final) <= TOLERANCE
    for x, y in zip(before, call.inputs):
        assert numpy_of(y.cpu()).tobytes() == x.tobytes()


@pytest.mark.parametrize(
    "shape",
    [
        dict(T=1, K=128, V=128),
        dict(B=3, T=67, H=2, HV=4, K=128, V=128, gate="softplus"),
        dict(B=2, T=130, H=3, K=64, V=128, gate="direct"),
        dict(T=300, H=4, K=128, V=64, allow_neg_eigval=True),
        dict(lens=[0, 33, 16, 0, 100, 1, 0], H=2, HV=8, K=128, V=128, state=False),
        dict(lens=[40, 7], H=2, K=64, V=64, beta_is_logit=False, state_layout="kv"),
        dict(T=2000, H=2, K=128, V=128),
    ],
    ids=str,
)
def test_backward_against_gold(shape):
    if shape.get("state_layout") == "kv":
        p = problem(**shape, state=False)
        p.initial_state = np.random.default_rng(3).standard_normal((2, 2, 64, 64), np.float32)
    else:
        p = problem(**shape)
    before = [x.copy() for x in (p.q, p.k, p.v, p.g, p.beta)]
    Gradients(p).run().check()
    for x, y in zip(before, (p.q, p.k, p.v, p.g, p.beta)):
        assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("name", GRADIENTS)
def test_backward_of_one_input(name):
    """The bits that it has where all are computed."""
    p = problem(lens=[70, 0, 90], H=2, HV=4, K=128, V=128)
    every = Gradients(p).run().results()
    one = Gradients(p, wanted=[name]).run()
    assert list(one.results()) == [name] and one.matches(every)


def equal_keys(p, head):
    """U telescopes (docs/kernels/backward_portable.md): the row sm90 leaves such a head to portable's kernels."""
    group = p.v.shape[2] // p.k.shape[2]
    heads = slice(group * head, group * (head + 1))
    p.k[:, :, head] = p.k[:, :1, head]
    if p.options.get("gate") == "direct":
        p.g[:, :, heads] = 0
    else:
        p.g[:, :, heads] -= 12
    p.beta[:, :, heads] += 4
    return heads


@pytest.mark.parametrize("gate", ["bounded", "direct"])
def test_backward_of_heads_of_equal_keys(gate):
    """Among others, which they do not disturb; whichever row does them, with the same bits."""
    p = problem(lens=[70, 0, 130, 33], H=3, HV=6, K=128, V=128, gate=gate)
    before = Gradients(p).run().results()
    heads = equal_keys(p, 1)
    call = Gradients(p).run()
    found = call.results()
    gold = call.gold()
    for n, x in found.items():
        assert error(x.cpu(), gold[n]) <= COLLINEAR_TOLERANCE, n
    portable = Gradients(p).run(backend="portable").results()
    assert same_bits(found["initial_state"][:, heads], portable["initial_state"][:, heads])
    for n in ("v", "g", "beta"):
        assert same_bits(found[n][:, :, heads], portable[n][:, :, heads]), n
        assert not same_bits(found[n][:, :, heads], before[n][:, :, heads]), n
        for others in (slice(0, heads.start), slice(heads.stop, None)):
            assert same_bits(found[n][:, :, others], before[n][:, :, others]), n


class OnDevice:
    """A tensor library for table.run(): NumPy arrays go to the device, and come back with fetch()."""

    def __init__(self):
        self.pairs = []

    def of(self, array):
        tensor = on_device(array)
        self.pairs.append((array, tensor))
        return tensor

    def fetch(self):
        """Copies back; the arrays that changed."""
        changed = []
        for array, tensor in self.pairs:
            after = numpy_of(tensor.cpu())
            if after.tobytes() != array.tobytes():
                changed.append(array)
                array[...] = after
        return changed


def supported(case):
    dtypes = case["dtypes"]
    return (
        dtypes.get("v") == "bfloat16"
        and case["K"] in (64, 128)
        and case["V"] in (64, 128)
        and case["op"] != "summary"
        and dtypes.get("checkpoint_state") != "float16"
        and not table.refused(case["name"])
        and not table.left_to_c(case["name"])
        and sum(case.get("lens") or [case.get("T", 0)]) <= 1000
    )


# The NaN cases are left to `flashkda check`: a chunk is computed as a whole on the GPU, so tokens before a
# NaN in its own chunk and head may be NaN too, which the gold in a file cannot say.
SAMPLE = (
    []
    if REASON
    else [n for n, c in table.CASES.items() if supported(c) and not n.startswith("nan/")][::4]
)


def operand_limits(tensors, metadata, keys):
    """Of each gradient: four times the error of double precision from operands rounded to bf16, as in
    tests/cases/verify.c; `keys`: of q and k too."""
    rounded = {"v", "d_out", "initial_state", "d_final_state", *(("q", "k") if keys else ())}
    gold = {n[5:]: x for n, x in tensors.items() if n.startswith("gold.")}
    rng, sums, draws = np.random.default_rng(0), dict.fromkeys(gold, 0.0), 4
    for _ in range(draws):
        wide = {n: x if x.dtype.kind == "i" else x.astype(np.float64) for n, x in tensors.items()}
        for n in rounded & wide.keys():
            wide[n] *= 1 + 2**-9 * rng.uniform(-1, 1, wide[n].shape)
        result = table.run(Numpy, wide, metadata, backend="reference")
        for n, (_, x) in result.items():
            good = np.isfinite(gold[n]) & np.isfinite(x)
            power = float((gold[n][good] ** 2).sum())
            sums[n] += float(((x - gold[n])[good] ** 2).sum()) / power if power else 0.0
    return {n: 4 * (x / draws) ** 0.5 for n, x in sums.items()}


@pytest.mark.skipif(not table.TOOL, reason="set FLASHKDA_TOOL to the command line `flashkda`")
@pytest.mark.parametrize("name", SAMPLE)
def test_case(name, tmp_path):
    path = tmp_path / "case.safetensors"
    subprocess.run(
        [table.TOOL, "check", "--case", name, "--save", path], capture_output=True, check=True
    )
    tensors, metadata = table.read(path)
    path.unlink()
    library = OnDevice()
    result = table.run(library, tensors, metadata)
    outputs = [after for _, after in result.values()]
    for array in library.fetch():
        assert any(array is x for x in outputs), "an input changed"
    limit = DECODE_TOLERANCE if metadata["op"] == "decode" else TOLERANCE
    collinear = 2 in table.CASES[name]["numbers"][:1]
    if collinear:
        limit = COLLINEAR_TOLERANCE
    limits = operand_limits(tensors, metadata, not collinear) if "d_out" in tensors else {}
    for field, (before, after) in result.items():
        most = max(limit, limits.get(field, 0))
        table.judge(field, before, after, tensors[f"gold.{field}"], tensors["v"].dtype, limit=most)


# ---- memory: strided, misaligned, pools, untrusted contents -----------------------------------------


def test_strided_and_misaligned_inputs_give_the_same_bits(backend):
    """The bits of contiguous inputs on the same backend: what the first cannot reach goes to another."""
    p = problem(B=2, T=77, H=3, HV=6, K=128, V=64)
    expected = {name: Call(p).run(backend=name).results() for name in BACKENDS}

    def check(call, *backends):
        assert call.backend() in backends
        call.run().results()
        assert matches(call, expected[call.backend()])

    fused = Call(p)
    q, k, v, g, beta = fused.inputs
    B, T = q.shape[:2]
    rows = [x.reshape(B, T, -1) for x in (q, k, v, g)]
    gaps = torch.full((B, T, 24), torch.nan, device="cuda", dtype=torch.bfloat16)
    projection = torch.cat([*rows, gaps], dim=-1)
    slices = torch.split(projection, [x.shape[-1] for x in rows] + [24], dim=-1)[:4]
    wide = torch.full((B, T, 6288), torch.nan, device="cuda", dtype=torch.bfloat16)
    wide[..., :6] = beta
    fused.inputs = [s.view(x.shape) for s, x in zip(slices, (q, k, v, g))] + [wide[..., :6]]
    assert not fused.inputs[0].is_contiguous()
    check(fused, backend)

    def shifted(x):
        flat = torch.full((x.numel() + 1,), torch.nan, device="cuda", dtype=x.dtype)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)

    odd = Call(p)  # all but rows of channels
    odd.inputs[4] = shifted(odd.inputs[4])
    odd.initial, odd.A_log, odd.dt_bias = (
        shifted(x) for x in (odd.initial, odd.A_log, odd.dt_bias)
    )
    odd.final = shifted(odd.final)
    check(odd, backend)
    odd.inputs = [shifted(x) for x in odd.inputs]
    odd.out = shifted(odd.out)
    assert odd.inputs[0].data_ptr() % 16
    check(odd, "portable")

    for major in (0, 1):  # [H, T, D] in memory; then [T, B, ...]
        call = Call(p)
        a, b = (1, 2) if major == 0 else (0, 1)
        call.inputs[:4] = [x.transpose(a, b).contiguous().transpose(a, b) for x in call.inputs[:4]]
        call.out = call.out.transpose(a, b).contiguous().transpose(a, b)
        check(call, backend)


def test_backward_of_strided_and_misaligned_tensors(backend):
    """The bits of contiguous ones on the same backend; gaps and rows around them stay as they are."""
    p = problem(B=2, T=77, H=3, HV=6, K=128, V=64)
    expected = {name: Gradients(p).run(backend=name).results() for name in BACKENDS}

    def check(call, *backends):
        assert call.backend() in backends
        call.run()
        torch.cuda.synchronize()
        assert call.matches(expected[call.backend()])

    def shifted(x):
        flat = torch.full((x.numel() + 1,), torch.nan, device="cuda", dtype=x.dtype)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)

    def padded(x):
        """Gaps behind every head and token."""
        shape = (x.shape[0], x.shape[1] + 2, x.shape[2] + 1, *(n + 8 for n in x.shape[3:]))
        wide = torch.full(shape, torch.nan, device="cuda", dtype=x.dtype)
        view = wide[tuple(slice(n) for n in x.shape)]
        view.copy_(x)
        return view

    odd = Gradients(p)
    odd.inputs = [shifted(x) for x in odd.inputs]
    for name in ("d_out", "d_final", "initial", "A_log", "dt_bias"):
        setattr(odd, name, shifted(getattr(odd, name)))
    odd.d = {n: shifted(x) for n, x in odd.d.items()}
    assert odd.inputs[0].data_ptr() % 16
    check(odd, "portable")
    gaps = Gradients(p)
    gaps.inputs, gaps.d_out = [padded(x) for x in gaps.inputs], padded(gaps.d_out)
    gaps.d = {n: padded(x) if n in GRADIENTS[:5] else x for n, x in gaps.d.items()}
    check(gaps, backend)
    for n, x in gaps.d.items():
        if n in GRADIENTS[:5]:
            assert int(torch.isnan(x._base).sum()) == x._base.numel() - x.numel(), n
    major = Gradients(p)  # [B, H, T, D] in memory

    def turn(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim == 4 else x

    major.inputs, major.d_out = [turn(x) for x in major.inputs], turn(major.d_out)
    major.d = {n: turn(x) if n in GRADIENTS[:5] else x for n, x in major.d.items()}
    check(major, backend)


def test_backward_workspace():
    """Of exactly the size asked for, whatever it holds; a byte less is refused, and nothing written."""
    p = problem(lens=[70, 0, 130], H=2, K=128, V=128)
    call = Gradients(p)
    expected = call.run().results()
    named = dict(zip(GRADIENTS, call.inputs), A_log=call.A_log, dt_bias=call.dt_bias)
    named |= dict(initial_state=call.initial, cu_seqlens=call.cu_seqlens)
    size = int(re.search(r"workspace (\d+) bytes", flash_kda.plan(**named, op="backward"))[1])
    guard = 4096
    for value in (0, 0xFF, 0x7F):
        memory = torch.full((size + 2 * guard,), value, dtype=torch.uint8, device="cuda")
        call.poison().run(workspace=memory[guard:-guard])
        torch.cuda.synchronize()
        assert call.matches(expected)
        assert (memory[:guard] == value).all() and (memory[-guard:] == value).all()
    call.poison()
    with pytest.raises(ValueError, match=rf"workspace: {size - 1} bytes, expected at least {size}"):
        call.run(workspace=memory[guard : guard + size - 1])
    torch.cuda.synchronize()
    assert all(torch.isnan(x).all() for x in call.d.values())


def test_decode_pool_in_place():
    """Some sequences skipped; slots that belong to none, and theirs, stay as they are."""
    N, T, HV, P = 9, 2, 4, 16
    p = problem(B=N, T=T, H=2, HV=HV, K=128, V=128, state=False)
    rng = np.random.default_rng(1)
    slots = rng.permutation(P)[:N].astype(np.int64)
    slots[2] = slots[5] = -1
    slots[7] = P + 3  # out of range: skipped
    kept = [n for n in range(N) if 0 <= slots[n] < P]
    start = rng.standard_normal((P, HV, 128, 128)).astype(np.float32)
    unused = sorted(set(range(P)) - {int(slots[n]) for n in kept})
    start[unused] = np.nan
    for index in (torch.int32, torch.int64):
        for dtype in (torch.float32, torch.bfloat16):
            pool = torch.from_numpy(start).cuda().to(dtype)
            before = pool.clone()
            call = Call(p)
            flash_kda.decode(
                *call.inputs, pool, call.out, A_log=call.A_log, dt_bias=call.dt_bias,
                state_indices=torch.from_numpy(slots).cuda().to(index),
            )  # fmt: skip
            torch.cuda.synchronize()
            assert same_bits(pool[unused], before[unused])
            assert torch.isnan(call.out[[2, 5, 7]]).all()
            gold_pool = before.double().cpu().numpy()
            gold_out = np.full(p.v.shape, np.nan)
            skipped = np.where((slots < 0) | (slots >= P), -1, slots)
            flash_kda.decode(
                p.q, p.k, p.v, p.g, p.beta, gold_pool, gold_out, A_log=p.A_log,
                dt_bias=p.dt_bias, state_indices=skipped, backend="reference",
            )  # fmt: skip
            used = slots[kept]
            assert error(call.out[kept].cpu(), gold_out[kept]) <= DECODE_TOLERANCE
            assert error(pool[used.tolist()].float().cpu(), gold_pool[used]) <= DECODE_TOLERANCE


def test_prefill_pool_skips_and_prefix_restore():
    lens = [33, 0, 64, 17, 5]
    p = problem(lens=lens, H=2, K=128, V=128)
    P = 12
    pool = torch.full((P, 2, 128, 128), torch.nan, device="cuda")
    reads = torch.tensor([3, 1, -1, 7, 0], device="cuda")
    writes = torch.tensor([4, 2, 9, -1, 0], device="cuda")
    start = on_device(p.initial_state)
    for n, slot in enumerate([3, 1, None, 7, 0]):
        if slot is not None:
            pool[slot] = start[n]
    before = pool.clone()
    expected_out, expected_final = Call(p).run().results()
    call = Call(p)
    call.initial = call.final = pool
    call.run(initial_state_indices=reads, final_state_indices=writes).results()
    bounds = np.cumsum([0, *lens])
    for n in (0, 1, 4):
        rows = slice(int(bounds[n]), int(bounds[n + 1]))
        assert same_bits(call.out[:, rows], expected_out[:, rows])
        assert same_bits(pool[int(writes[n])], expected_final[n])
    for n in (2, 3):
        assert torch.isnan(call.out[:, bounds[n] : bounds[n + 1]]).all()
    rest = [s for s in range(P) if s not in (4, 2, 0)]
    assert same_bits(pool[rest], before[rest])


def test_cu_seqlens_are_clamped():
    """Nonsense in device memory is not followed out of bounds; sound sequences are not disturbed."""
    p = problem(lens=[40, 24, 36], H=2, K=64, V=64, state=False)
    expected, _ = Call(p).run().results()
    call = Call(p)
    guard = 4096
    memory = torch.full((call.out.numel() + 2 * guard,), torch.nan, device="cuda").bfloat16()
    call.out = memory[guard:-guard].view(call.out.shape)
    for nonsense in ([0, 40, 2**40, -7], [0, 40, -5, -(2**62)], [0, 40, 40, 10**6]):
        memory.fill_(torch.nan)
        call.cu_seqlens = torch.tensor(nonsense, device="cuda")
        call.run().results()
        assert same_bits(call.out[:, :40], expected[:, :40])
        assert torch.isnan(memory[:guard]).all() and torch.isnan(memory[-guard:]).all()


def test_cu_seqlens_of_a_backward_are_clamped():
    p = problem(lens=[40, 24, 36], H=2, K=64, V=64)
    expected = Gradients(p, wanted=GRADIENTS[:5]).run().results()
    call = Gradients(p, wanted=GRADIENTS[:5])
    guard = 4096
    memory = {
        n: torch.full((x.numel() + 2 * guard,), torch.nan, device="cuda", dtype=x.dtype)
        for n, x in call.d.items()
    }
    call.d = {n: memory[n][guard:-guard].view(x.shape) for n, x in call.d.items()}
    for nonsense in ([0, 40, 2**40, -7], [0, 40, -5, -(2**62)], [0, 40, 40, 10**6]):
        for x in memory.values():
            x.fill_(torch.nan)
        call.cu_seqlens = torch.tensor(nonsense, device="cuda")
        call.run().results()
        for n, x in memory.items():
            assert same_bits(call.d[n][:, :40], expected[n][:, :40]), n
            assert torch.isnan(x[:guard]).all() and torch.isnan(x[-guard:]).all()


@pytest.mark.parametrize("wrapper", [DLPackOnly, TorchLike], ids=lambda w: w.__name__)
def test_other_producers(wrapper):
    p = problem(T=50, K=128, V=128)
    expected = Call(p).run().results()
    call = Call(p)
    plain = call.inputs, call.out, call.final
    call.inputs = [wrapper(x) for x in call.inputs]
    call.out, call.final, call.initial = map(wrapper, (call.out, call.final, call.initial))
    call.run()
    call.inputs, call.out, call.final = plain
    torch.cuda.synchronize()
    assert matches(call, expected)


def test_cupy_arrays():
    cupy = pytest.importorskip("cupy")
    p = problem(T=50, K=128, V=128)
    p.g, p.beta = p.g.astype(np.float32), p.beta.astype(np.float32)
    expected = Call(p).run().results()
    call = Call(p)
    call.inputs[3:] = [cupy.asarray(p.g), cupy.asarray(p.beta)]
    call.initial = cupy.asarray(p.initial_state)
    final = cupy.full(p.state_shape, cupy.nan, cupy.float32)
    call.final = final
    cupy.cuda.Device().synchronize()
    call.run()
    torch.cuda.synchronize()
    call.final = torch.from_dlpack(final)
    assert matches(call, expected)


# ---- refusals -----------------------------------------------------------------------------------------


def test_refusals_name_the_argument():
    p = problem(K=64, V=64)
    call = Call(p)
    call.inputs[1] = call.inputs[1].cpu()
    with pytest.raises(ValueError, match=r"k: device cpu, expected cuda:0 to match q"):
        call.run()
    with pytest.raises(RuntimeError, match="reference"):
        Call(p).run(backend="reference")
    call = Call(p)
    call.inputs = [x.half() for x in call.inputs]
    call.out = call.out.half()
    with pytest.raises(RuntimeError, match="bfloat16"):
        call.run()
    assert torch.isnan(call.out).all()


def test_warmup_arguments():
    flash_kda.warmup("cuda")
    flash_kda.warmup("cuda:0")
    flash_kda.warmup(torch.device("cuda", 0))
    flash_kda.warmup("cpu")
    with pytest.raises(RuntimeError, match="device_id: 1000"):
        flash_kda.warmup("cuda:1000")
    for bad in ("tpu", "cuda:", "cuda:x", "cuda:-1", None):
        with pytest.raises(ValueError, match="device: "):
            flash_kda.warmup(bad)


# ---- graphs -------------------------------------------------------------------------------------------

COLD_CAPTURE = """
import torch, flash_kda
x = torch.zeros(1, 16, 1, 64, device="cuda", dtype=torch.bfloat16)
beta = torch.zeros(1, 16, 1, device="cuda", dtype=torch.bfloat16)
def call(): flash_kda.fwd(x, x, x, x, beta, None, torch.empty_like(x), None, None, None)
message = "no error"
y = torch.zeros(1, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y += 1
    try:
        call()
    except RuntimeError as problem:
        message = str(problem)
print(message)
flash_kda.warmup("cuda")
with torch.cuda.graph(torch.cuda.CUDAGraph()):
    call()
print("warm")
"""


def test_capture_without_warmup_says_so(run_python):
    message, warm = run_python(COLD_CAPTURE).splitlines()
    assert "captur" in message and "warm" in message, message
    assert warm == "warm"


def test_graph_replay_with_other_data_and_lengths():
    flash_kda.warmup("cuda")
    T, N = 256, 8
    p = problem(lens=[T] + [0] * (N - 1), H=4, K=128, V=128)
    call = Call(p)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.run()
    for round, lens in enumerate(
        (
            [256] + [0] * 7,
            [1] * 8,
            [32, 0, 64, 16, 100, 0, 0, 0],
            [0] * 8,
            [0, 200, 0, 0, 0, 0, 0, 56],
        )
    ):
        other = problem(lens=lens + [T - sum(lens)], H=4, K=128, V=128, seed=round + 1)
        source = Call(other)
        for to, x in zip(call.inputs, source.inputs):
            to.copy_(x)
        call.A_log.copy_(source.A_log)
        call.dt_bias.copy_(source.dt_bias)
        call.initial.copy_(source.initial[:N])
        call.cu_seqlens.copy_(source.cu_seqlens[: N + 1])
        call.poison()
        graph.replay()
        replayed = call.results()
        call.poison().run()
        torch.cuda.synchronize()
        assert matches(call, replayed)
        used = sum(lens)
        assert not torch.isnan(call.out[:, :used]).any()
        assert torch.isnan(call.out[:, used:]).all()
        gold_out, gold_final = other.gold()
        assert not used or error(call.out[:, :used].cpu(), gold_out[:, :used]) <= TOLERANCE
        assert error(call.final.cpu(), gold_final[:N]) <= TOLERANCE


def test_graph_of_a_backward():
    """Captured once, workspace included, replayed with other data and lengths."""
    flash_kda.warmup("cuda")
    T, N = 256, 6
    lengths = (
        [256, 0, 0, 0, 0, 0],
        [1] * 6,
        [32, 0, 64, 16, 100, 0],
        [0] * 6,
        [0, 200, 0, 0, 0, 56],
    )
    p = problem(lens=[T] + [0] * (N - 1), H=2, HV=4, K=128, V=128)
    call = Gradients(p)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call.run()
    for round, lens in enumerate(lengths):
        other = problem(lens=lens + [T - sum(lens)], H=2, HV=4, K=128, V=128, seed=round + 1)
        source = Call(other)
        for to, x in zip(call.inputs, source.inputs):
            to.copy_(x)
        call.A_log.copy_(source.A_log)
        call.dt_bias.copy_(source.dt_bias)
        call.initial.copy_(source.initial[:N])
        call.cu_seqlens.copy_(source.cu_seqlens[: N + 1])
        call.poison()
        graph.replay()
        replayed = call.results()
        call.poison().run()
        torch.cuda.synchronize()
        assert call.matches(replayed)
        used = sum(lens)
        for n, x in replayed.items():
            if n in GRADIENTS[:5]:
                assert torch.isfinite(x[:, :used]).all() and torch.isnan(x[:, used:]).all()
            else:
                assert torch.isfinite(x).all()
        if not used:  # what comes out goes back in
            assert same_bits(replayed["initial_state"], call.d_final)
            assert not replayed["A_log"].any() and not replayed["dt_bias"].any()


def test_graph_decode_steps():
    N, steps = 6, 5
    p = problem(B=N, T=1, H=4, K=128, V=128, seed=3)
    call = Call(p)
    start = call.initial.clone()
    pool = start.clone()

    def step():
        flash_kda.decode(*call.inputs, pool, call.out, A_log=call.A_log, dt_bias=call.dt_bias)

    def tokens(t):
        for to, x in zip(call.inputs, Call(problem(B=N, T=1, H=4, K=128, V=128, seed=t)).inputs):
            to.copy_(x)

    flash_kda.warmup("cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    assert same_bits(pool, start)  # capturing does not run
    seen = []
    for t in range(steps):
        tokens(t)
        graph.replay()
        seen.append(call.results()[0])
    graph_pool = pool.clone()
    pool.copy_(start)
    for t in range(steps):
        tokens(t)
        step()
        assert same_bits(call.results()[0], seen[t])
    assert same_bits(pool, graph_pool)


@pytest.mark.parametrize("T", [1, 4], ids=["one_token", "drafts"])
@pytest.mark.parametrize("layout", ["vk", "kv"])
def test_graphs_of_padded_batches(T, layout):
    """A graph a batch size, captured once: rows beyond the batch have slot -1 (and any count), and leave
    out and pool alone; the others give the bits of a call without padding."""
    sizes, H, HV, P = (1, 2, 4, 8), 2, 4, 9 * T
    flash_kda.warmup("cuda")
    p = problem(B=8, T=T, H=H, HV=HV, K=128, V=128, state=False)
    call = Call(p)
    pool = torch.randn(P, HV, 128, 128, device="cuda")
    start = pool.clone()
    columns = (T,) if T > 1 else ()
    slots = torch.full((8, *columns), -1, dtype=torch.int32, device="cuda")
    accepted = torch.zeros(8, dtype=torch.int32, device="cuda")

    def step(n, table, counts):
        flash_kda.decode(
            *[x[:n] for x in call.inputs], pool, call.out[:n], A_log=call.A_log,
            dt_bias=call.dt_bias, state_indices=table[:n], state_layout=layout,
            num_accepted_tokens=counts[:n] if T > 1 else None, batch_invariant=True,
        )  # fmt: skip

    graphs = {}
    for size in sizes:
        graphs[size] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[size]):
            step(size, slots, accepted)
    rng = np.random.default_rng(T)
    for n in (1, 2, 3, 5, 7, 8, 4):
        for to, x in zip(
            call.inputs, Call(problem(B=8, T=T, H=H, HV=HV, K=128, V=128, seed=n)).inputs
        ):
            to.copy_(x)
        table = rng.permutation(P)[: n * T].reshape(n, *columns).astype(np.int32)
        slots.fill_(-1)
        slots[:n] = torch.from_numpy(table).cuda()
        accepted.fill_(0)
        accepted[:n] = torch.from_numpy(rng.integers(1, T + 1, n).astype(np.int32)).cuda()
        pool.copy_(start)
        call.poison()
        graphs[next(size for size in sizes if size >= n)].replay()
        out, states = call.results()[0], pool.clone()
        assert torch.isfinite(out[:n]).all() and torch.isnan(out[n:]).all()
        unused = sorted(set(range(P)) - set(table.flatten().tolist()))
        assert same_bits(states[unused], start[unused]) and not same_bits(states, start)
        pool.copy_(start)
        call.poison()
        step(n, slots, accepted)
        assert same_bits(call.results()[0], out) and same_bits(pool, states)


@pytest.mark.parametrize("mode", ["decode", "mixed", "graphs"])
def test_serving_engine(mode):
    """Continuous batching: every request as it is alone, bit for bit."""
    serving = test_serving.serving
    arguments = [] if mode == "decode" else [f"--{mode}"]
    sizes = ["--heads", "4", "--dim", "128"] if mode == "decode" else []
    row = serving.serve(serving.parse(["--device", "cuda", "--requests", "60", *arguments, *sizes]))
    assert row["differing"] == [] and row["slots_lost"] == 0
    assert row["finished"] and row["cancelled"] and row["cache_hits"]


# ---- streams, threads, devices ------------------------------------------------------------------------


def test_work_is_ordered_on_the_current_stream():
    """Inputs that arrive late on the stream: a call on any other stream would see NaN."""
    p = problem(T=100, H=2, K=128, V=128)
    expected = Call(p).run().results()
    for stream in (
        torch.cuda.default_stream(),
        torch.cuda.Stream(),
        torch.cuda.Stream(priority=-1),
    ):
        call = Call(p)
        kept = [x.clone() for x in call.inputs]
        for x in call.inputs:
            x.fill_(torch.nan)
        result = torch.zeros_like(call.out)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            for to, x in zip(call.inputs, kept):
                to.copy_(x, non_blocking=True)
            call.run()
            result.copy_(call.out)
        stream.synchronize()
        assert same_bits(result, expected[0]) and same_bits(call.final, expected[1])


def test_backward_is_ordered_on_the_current_stream():
    p = problem(T=100, H=2, K=128, V=128)
    expected = Gradients(p).run().results()
    call, stream = Gradients(p), torch.cuda.Stream()
    kept = [x.clone() for x in (*call.inputs, call.d_out)]
    for x in (*call.inputs, call.d_out):
        x.fill_(torch.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for to, x in zip((*call.inputs, call.d_out), kept):
            to.copy_(x, non_blocking=True)
        call.run()
    stream.synchronize()
    assert call.matches(expected)


@pytest.mark.parametrize("make, same", [(Call, matches), (Gradients, Gradients.matches)])
def test_many_streams_at_once(make, same):
    shapes = [dict(T=40 + 50 * i, H=1 + i % 3, K=(64, 128)[i % 2], V=128, seed=i) for i in range(6)]
    calls = [make(problem(**shape)) for shape in shapes]
    expected = [call.run().results() for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    for call in calls:
        call.poison()
    torch.cuda.synchronize()
    for _ in range(20):
        for call, stream in zip(calls, streams):
            with torch.cuda.stream(stream):
                call.run()
    torch.cuda.synchronize()
    for call, result in zip(calls, expected):
        assert same(call, result)


def test_many_host_threads():
    p = problem(lens=[100, 0, 31, 64], H=4, K=128, V=128)
    expected = Call(p).run().results()
    failures = []

    def work():
        try:
            call, stream = Call(p), torch.cuda.Stream()
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                for _ in range(25):
                    call.poison().run()
                    stream.synchronize()
                    if not matches(call, expected):
                        failures.append("other bits")
        except Exception as problem:  # whatever it is, the test has failed
            failures.append(repr(problem))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_device_that_is_not_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    p = problem(T=60, K=128, V=128)
    expected = Call(p).run().results()
    with torch.cuda.device(0):
        call = Call(p, device="cuda:1").run()
        assert torch.cuda.current_device() == 0
        torch.cuda.synchronize("cuda:1")
        assert torch.equal(raw(call.out).cpu(), raw(expected[0]).cpu())
        call.inputs[2] = call.inputs[2].to("cuda:0")
        with pytest.raises(ValueError, match="v: device cuda:0, expected cuda:1 to match q"):
            call.run()


# ---- determinism, size, speed ---------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["prefill", "decode", "backward", "backward_of_equal_keys"])
def test_1000_repetitions_on_a_busy_gpu(op, record_property):
    gradients = op.startswith("backward")
    if op == "prefill":
        call = Call(problem(lens=[300, 0, 64, 17, 130], H=8, K=128, V=128))
        run = call.run
    elif gradients:
        p = problem(lens=[300, 0, 64, 17, 130], H=4, HV=8, K=128, V=128)
        if op == "backward_of_equal_keys":
            equal_keys(p, 1)
        call = Gradients(p)
        run = call.run
    else:
        call = Call(problem(B=32, T=2, H=8, K=128, V=128))
        pool = torch.empty_like(call.initial)
        call.final = pool

        def run():
            pool.copy_(call.initial)
            flash_kda.decode(*call.inputs, pool, call.out, A_log=call.A_log, dt_bias=call.dt_bias)

    run()
    expected = call.results()
    results = (call.out, call.final)
    if gradients:
        expected, results = expected.values(), call.d.values()
    wanted = [raw(x) for x in expected]
    other = torch.cuda.Stream()
    busy = torch.randn(3072, 3072, device="cuda", dtype=torch.bfloat16)
    sink = torch.empty_like(busy)
    differing = torch.zeros((), device="cuda", dtype=torch.int64)
    torch.cuda.synchronize()
    for i in range(1000):
        if i % 4 == 0:
            with torch.cuda.stream(other):
                torch.mm(busy, busy, out=sink)
        if gradients:
            call.poison()
        call.out.fill_(torch.nan)
        run()
        for x, y in zip(results, wanted):
            differing += (raw(x) != y).any()
    torch.cuda.synchronize()
    name = "portable" if op == "decode" else call.backend()
    record_property(f"differing_of_1000_{op}_{name}", differing.item())
    assert differing.item() == 0


def test_more_than_2_31_elements():
    """One call against two that pass the state on: the same bits, in the rows past 2**31 elements too."""
    T, H, D = 180_000, 96, 128
    split = 11_000 * 16
    assert T * H * D > 2**31 > (T - split) * H * D
    free, _ = torch.cuda.mem_get_info()
    if free < 40e9:
        pytest.skip(f"{free / 1e9:.0f} GB of free device memory, expected 40")
    q, k, v, g = (
        torch.empty(1, T, H, D, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(4)
    )
    beta = torch.randn(1, T, H, device="cuda", dtype=torch.bfloat16)
    bias = torch.full((H, D), -4.0, device="cuda")
    out = torch.full_like(v, torch.nan)
    final, middle, last = (torch.full((1, H, D, D), torch.nan, device="cuda") for _ in range(3))

    def fwd(rows, to, initial, state):
        inputs = [x[:, rows] for x in (q, k, v, g, beta)]
        flash_kda.fwd(*inputs, None, to, None, bias, None, initial_state=initial, final_state=state)

    fwd(slice(0, T), out, None, final)
    tail = torch.full_like(v[:, split:], torch.nan)
    head = torch.full_like(v[:, :split], torch.nan)
    fwd(slice(0, split), head, None, middle)
    fwd(slice(split, T), tail, middle, last)
    torch.cuda.synchronize()
    assert same_bits(out[:, split:], tail)
    assert same_bits(final, last)
    del tail
    for t in range(0, split, 16_000):
        assert same_bits(out[:, t : min(t + 16_000, split)], head[:, t : t + 16_000])
    assert torch.isfinite(out[:, -1000:]).all() and torch.isfinite(final).all()
    assert out[:, -1000:].float().abs().mean() > 0


def test_backward_of_more_than_2_31_elements():
    """Two sequences in one call against the second alone, which lies past 2**31 elements: the same bits."""
    T, H, D, split = 180_000, 96, 128, 176_000
    assert split * H * D > 2**31
    free, _ = torch.cuda.mem_get_info()
    if free < 70e9:
        pytest.skip(f"{free / 1e9:.0f} GB of free device memory, expected 70")
    q, k, v, g, d_out = (
        torch.empty(1, T, H, D, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(5)
    )
    beta = torch.randn(1, T, H, device="cuda", dtype=torch.bfloat16)
    bias = torch.full((H, D), -4.0, device="cuda")
    inputs = q, k, v, g, beta

    def backward(rows, cu_seqlens):
        x = [t[:, rows] for t in inputs]
        d_g = torch.full_like(x[3], torch.nan)
        d_initial = torch.empty(len(cu_seqlens) - 1, H, D, D, device="cuda")
        bounds = torch.tensor(cu_seqlens, device="cuda")
        flash_kda.backward(
            *x, None, d_out[:, rows], None, bias, None, cu_seqlens=bounds, d_g=d_g,
            d_initial_state=d_initial,
        )  # fmt: skip
        torch.cuda.synchronize()
        return d_g[:, -(T - split) :].clone(), d_initial[-1]

    d_g, d_initial = backward(slice(0, T), [0, split, T])
    alone = backward(slice(split, T), [0, T - split])
    assert same_bits(d_g, alone[0]) and same_bits(d_initial, alone[1])
    assert torch.isfinite(d_g).all() and d_g.float().abs().mean() > 0


FIRST_CALL = """
import time, torch
x = torch.zeros(1, 16, 1, 128, device="cuda", dtype=torch.bfloat16)
beta = torch.zeros(1, 16, 1, device="cuda", dtype=torch.bfloat16)
out = torch.empty_like(x)
torch.cuda.synchronize()
begin = time.perf_counter()
import flash_kda
flash_kda.fwd(x, x, x, x, beta, None, out, None, None, None)
torch.cuda.synchronize()
print(time.perf_counter() - begin)
"""


def test_first_call(run_python, record_property):
    """From `import flash_kda` to the first result, kernels loaded; torch and its context are there."""
    seconds = min(float(run_python(FIRST_CALL)) for _ in range(2))
    record_property("first_call_ms", round(1e3 * seconds, 1))
    print(f"first call after import: {1e3 * seconds:.0f} ms")
    assert seconds < 1
