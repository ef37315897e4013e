"""Gold data: Kimi Delta Attention by a float64 NumPy recurrence, independent of the C library.

Written from the equations (1)-(7) of docs/math.md (Kimi Linear, arXiv 2510.26692; gated delta rule,
arXiv 2412.06464), one token at a time. Each case is one .safetensors file beside this script:
inputs under the names of the C argument structs, options as strings in __metadata__, and what they
must give as float64 tensors "gold.out", "gold.final_state", "gold.state" (the pool after a decode),
"gold.checkpoint_state", "gold.M" and "gold.b". NaN in a gold tensor: that element must not be
written.

    make_gold.py               write the files
    make_gold.py --verify      compare the files here with what would be written
    make_gold.py --check-fla   compare the recurrence with flash-linear-attention's naive functions

Writing and verifying need NumPy only. --check-fla needs fla-core 0.5.2, torch and triton 3.6
(pip install fla-core==0.5.2 torch==2.13.0 triton==3.6.0 packaging); no GPU.
"""

import argparse
import itertools
import json
import pathlib
import struct
import sys

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent


# ---- the recurrence ------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def log_decay(raw, options, A_log, dt_bias):
    """(2): raw [T,HV,K] -> g [T,HV,K], clamped to [-100, 0]."""
    if options["gate"] == "direct":
        g = raw
    else:
        A = np.exp(A_log)[None, :, None]
        x = raw + dt_bias[None]
        if options["gate"] == "bounded":
            g = options["lower_bound"] * sigmoid(A * x)
        else:
            g = -A * softplus(x)
    return np.clip(g, -100, 0)


def activate(q, k, raw, beta, options, A_log, dt_bias):
    """(1)-(3): one sequence's q, k, g and beta as the recurrence takes them."""
    if options["l2norm"]:
        q = q / np.sqrt((q * q).sum(-1, keepdims=True) + 1e-6)
        k = k / np.sqrt((k * k).sum(-1, keepdims=True) + 1e-6)
    if options["beta_is_logit"]:
        beta = sigmoid(beta) * (2 if options["allow_neg_eigval"] else 1)
    return q, k, log_decay(raw, options, A_log, dt_bias), beta


def recurrence(q, k, v, g, beta, S, scale):
    """(4)-(7) on activated inputs: q, k [T,H,K], v [T,HV,V], g [T,HV,K], beta [T,HV], S [HV,V,K].

    Returns out [T,HV,V] and the states after 0, 1, ... T tokens, a list of [HV,V,K].
    """
    T, H, _ = q.shape
    HV = v.shape[1]
    states, out = [S], np.empty(v.shape)
    for t in range(T):
        S = states[-1].copy()
        for j in range(HV):
            h = j * H // HV
            S[j] = S[j] @ np.diag(np.exp(g[t, j]))  # (4)
            u = beta[t, j] * (v[t, j] - S[j] @ k[t, h])  # (5)
            S[j] = S[j] + np.outer(u, k[t, h])  # (6)
            out[t, j] = scale * S[j] @ q[t, h]  # (7)
        states.append(S)
    return out, states


# ---- what the operations do with it --------------------------------------------------------------

DEFAULTS = {
    "gate": "bounded",
    "l2norm": 1,
    "beta_is_logit": 1,
    "allow_neg_eigval": 0,
    "lower_bound": -5.0,
    "scale": 0.0,
    "state_layout": "vk",
    "write_state": 1,
    "checkpoint_every": 0,
    "checkpoint_before": 0,
}


class Call:
    """The inputs of one file in float64, with defaults filled in."""

    def __init__(self, op, options, tensors):
        self.op = op
        self.options = {**DEFAULTS, **options}
        self.x = {name: widen(array) for name, array in tensors.items()}
        x = self.x
        self.B, self.T, self.H, self.K = x["k"].shape
        self.HV, self.V = x["v"].shape[2:]
        self.q = x.get("q", np.zeros_like(x["k"]))
        self.A_log = x["A_log"].reshape(self.HV) if "A_log" in x else np.zeros(self.HV)
        self.dt_bias = np.zeros((self.HV, self.K))
        if "dt_bias" in x:
            self.dt_bias = x["dt_bias"].reshape(self.HV, self.K)
        self.scale = self.options["scale"] or self.K**-0.5
        if "cu_seqlens" in x:
            cu = x["cu_seqlens"]
            self.spans = [(0, int(a), int(b)) for a, b in itertools.pairwise(cu)]
        else:
            self.spans = [(b, 0, self.T) for b in range(self.B)]
        self.N = len(self.spans)

    def to_vk(self, state):
        return state.swapaxes(-1, -2) if self.options["state_layout"] == "kv" else state

    from_vk = to_vk

    def sequence(self, n):
        """Activated inputs of sequence n."""
        b, begin, end = self.spans[n]
        x, rows = self.x, slice(begin, end)
        q, k, g, beta = activate(self.q[b, rows], x["k"][b, rows], x["g"][b, rows],
                                 x["beta"][b, rows], self.options, self.A_log, self.dt_bias)
        return q, k, x["v"][b, rows], g, beta

    def start(self, n, pool, slot):
        """The state [HV,V,K] that sequence n starts from."""
        if pool is None or ("has_initial_state" in self.x and not self.x["has_initial_state"][n]):
            return np.zeros((self.HV, self.V, self.K))
        return self.to_vk(pool[slot]).copy()

    def index(self, name, other):
        """Slot numbers, from the tensor `name`, else `other`; without both, sequence n uses n."""
        x = self.x
        index = x.get(name, x.get(other))
        return np.arange(self.N) if index is None else index.astype(int)


def checkpoint_rows(call):
    """What each row of checkpoint_state holds: (sequence, tokens before it), or None."""
    x, options = call.x, call.options
    every = options["checkpoint_every"]
    for n, (_, begin, end) in enumerate(call.spans):
        offsets = []
        if every:
            rows = -(-(end - begin) // every)
            first = 0 if options["checkpoint_before"] else 1
            offsets = [min((i + first) * every, end - begin) for i in range(rows)]
        elif "checkpoint_indptr" in x:
            offsets = x["checkpoint_offsets"][slice(*x["checkpoint_indptr"][n:n + 2])]
        elif "checkpoint_offsets" in x:
            offsets = x["checkpoint_offsets"][n]
        yield from ((n, int(t)) if t >= 0 else None for t in offsets)


def prefill(call):
    x = call.x
    head = (call.HV, call.V, call.K)
    out = np.full(x["v"].shape, np.nan)
    first = x.get("initial_state_indices", np.arange(call.N))
    last = x.get("final_state_indices", np.arange(call.N))
    final = np.full((max(last, default=-1) + 1, *head), np.nan)
    states = {}
    for n, (b, begin, end) in enumerate(call.spans):
        if first[n] < 0 or last[n] < 0:
            continue
        S = call.start(n, x.get("initial_state"), first[n])
        out[b, begin:end], states[n] = recurrence(*call.sequence(n), S, call.scale)
        final[last[n]] = states[n][-1]
    gold = {"gold.out": out, "gold.final_state": call.from_vk(final)}

    rows = list(checkpoint_rows(call))
    if rows:
        slots = x.get("checkpoint_state_indices", np.arange(len(rows))).reshape(-1)
        pool = np.full((max(slots) + 1, *head), np.nan)
        for row, slot in zip(rows, slots):
            if row and slot >= 0 and row[0] in states:
                pool[slot] = states[row[0]][row[1]]
        if "checkpoint_offsets" in x and "checkpoint_state_indices" not in x:
            pool = pool.reshape(*x["checkpoint_offsets"].shape, *head)
        gold["gold.checkpoint_state"] = call.from_vk(pool)
    return gold


def decode(call):
    x, options = call.x, call.options
    pool = x["state"].copy()
    out = np.full(x["v"].shape, np.nan)
    first = call.index("initial_state_indices", "final_state_indices")
    last = call.index("final_state_indices", "initial_state_indices")
    accepted = x.get("num_accepted_tokens", np.ones(call.N)).astype(int)
    for n in range(call.N):
        slot = first[n] if first.ndim == 1 else first[n, accepted[n] - 1]
        if slot < 0 or (last.ndim == 1 and last[n] < 0):
            continue
        S = call.start(n, x["state"], slot)
        out[n], states = recurrence(*call.sequence(n), S, call.scale)
        if not options["write_state"]:
            continue
        if last.ndim == 1:
            pool[last[n]] = call.from_vk(states[-1])
        else:
            for t in range(call.T):
                if last[n, t] >= 0:
                    pool[last[n, t]] = call.from_vk(states[t + 1])
    return {"gold.out": out, "gold.state": pool}


def summary(call):
    """S_out = S_in M + b, read off the recurrence: b from S_in = 0, M from S_in = 1 with v = 0."""
    K = call.K
    M = np.empty((call.N, call.HV, K, K))
    b = np.empty((call.N, call.HV, call.V, K))
    for n in range(call.N):
        q, k, v, g, beta = call.sequence(n)
        b[n] = recurrence(q, k, v, g, beta, np.zeros(b.shape[1:]), 0)[1][-1]
        identity = np.broadcast_to(np.eye(K), (call.HV, K, K))
        no_v = np.zeros(v.shape[:2] + (K,))
        M[n] = recurrence(q, k, no_v, g, beta, identity, 0)[1][-1]
    return {"gold.M": M, "gold.b": call.from_vk(b)}


OPERATIONS = {"prefill": prefill, "decode": decode, "summary": summary}


# ---- numbers and files ---------------------------------------------------------------------------


class BF16:
    """A bfloat16 array, kept as its bits. NumPy has no such type."""

    def __init__(self, bits):
        self.bits = bits
        self.shape = bits.shape

    @staticmethod
    def round(array):
        """Round to nearest, ties to even; finite values only."""
        bits = np.asarray(array, np.float32).view(np.uint32)
        return BF16(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16))


def widen(array):
    if isinstance(array, BF16):
        array = (array.bits.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64) if array.dtype.kind == "f" else array


class Random:
    """A counter hashed by splitmix64: the same numbers with every NumPy on every machine."""

    def __init__(self, seed):
        self.state = np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)

    def uniform(self, low, high, *shape):
        n = int(np.prod(shape))
        with np.errstate(over="ignore"):
            step = np.uint64(0x9E3779B97F4A7C15)
            z = self.state + np.arange(1, n + 1, dtype=np.uint64) * step
            self.state = self.state + np.uint64(n) * step
            z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
            z = z ^ z >> np.uint64(31)
        return low + (high - low) * ((z >> np.uint64(40)).astype(float) / 2**24).reshape(shape)

    def normal(self, *shape):
        """Nearly: the sum of twelve uniforms, which needs no logarithm and so is exact."""
        return sum(self.uniform(-0.5, 0.5, *shape) for _ in range(12))


DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16,
          "I64": np.int64, "I32": np.int32, "BOOL": np.bool_}


def write_file(path, metadata, tensors):
    """Widest dtype first, so that every tensor lies aligned to its element."""
    header, blobs, offset = {"__metadata__": metadata}, [], 0
    arrays = []
    for name, array in tensors.items():
        dtype = "BF16" if isinstance(array, BF16) else next(
            word for word, numpy in DTYPES.items() if word != "BF16" and array.dtype == numpy)
        arrays.append((name, dtype, array.bits if dtype == "BF16" else array))
    for name, dtype, array in sorted(arrays, key=lambda a: -a[2].itemsize):
        blob = np.ascontiguousarray(array).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape),
                        "data_offsets": [offset, offset + len(blob)]}
        offset += len(blob)
        blobs.append(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * ((56 - len(text)) % 64)  # 8 bytes of length before it: data begin at 64
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def read_file(path):
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    metadata, tensors = header.pop("__metadata__"), {}
    for name, entry in header.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        array = np.frombuffer(data[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        tensors[name] = BF16(array) if entry["dtype"] == "BF16" else array
    return metadata, tensors


# ---- the cases -----------------------------------------------------------------------------------

f32 = np.float32


def plain(r, B, T, H, HV, K, V, to=f32, to_gate=None):
    """Inputs with nothing special about them, q, k, v as `to`, g and beta as `to_gate`."""
    cast = lambda array, kind: BF16.round(array) if kind is BF16 else array.astype(kind)
    gate = to_gate or to
    return {
        "q": cast(r.normal(B, T, H, K), to),
        "k": cast(r.normal(B, T, H, K), to),
        "v": cast(r.normal(B, T, HV, V) + np.linspace(-1, 1, V), to),  # V is not K
        "g": cast(r.normal(B, T, HV, K) + np.linspace(-3, 1, K), gate),
        "beta": cast(r.normal(B, T, HV), gate),
    }


def state(r, *shape):
    """States whose two directions can be told apart."""
    return 0.3 * r.normal(*shape) + np.linspace(0, 1, shape[-2])[:, None]


def case_bounded_bf16(r):
    x = plain(r, 2, 20, 2, 2, 24, 32, BF16)
    x["A_log"] = r.uniform(-1, 1, 2).astype(f32)
    x["dt_bias"] = r.uniform(-2, 2, 2, 24).astype(f32)
    x["initial_state"] = state(r, 2, 2, 32, 24).astype(f32)
    return "prefill", {}, x


def case_bounded_wide_bf16(r):
    x = plain(r, 1, 50, 1, 1, 128, 32, BF16, f32)
    x["A_log"] = BF16.round(r.uniform(-1, 1, 1, 1, 1, 1))
    x["dt_bias"] = BF16.round(r.uniform(-8, 8, 128))
    return "prefill", {}, x


def case_bounded_absent(r):
    """No A_log, no dt_bias, no state; its own lower_bound and scale; tokens past the last sequence;
    checkpoints by offset to slots of their own."""
    x = plain(r, 1, 36, 1, 1, 48, 16)
    x["cu_seqlens"] = np.array([0, 33], np.int32)
    x["checkpoint_offsets"] = np.array([[16, 32]], np.int32)
    x["checkpoint_state_indices"] = np.array([[1, 0]], np.int64)
    return "prefill", {"lower_bound": -2.5, "scale": 0.3}, x


def case_softplus_ragged_gva(r):
    """Empty sequences at the start, in the middle and at the end; two value heads to a key head."""
    x = plain(r, 1, 51, 2, 4, 16, 8)
    x["A_log"] = r.uniform(-1, 1, 4).astype(f32)
    x["dt_bias"] = r.uniform(-1, 1, 64).astype(f32)
    x["cu_seqlens"] = np.array([0, 0, 17, 17, 50, 50], np.int32)
    x["initial_state"] = BF16.round(state(r, 5, 4, 8, 16))
    return "prefill", {"gate": "softplus"}, x


def case_softplus_strong(r):
    """Decays down to e^-640 a token, which the clamp makes e^-100: enough to see 1e37 behind it."""
    x = plain(r, 1, 37, 2, 2, 16, 20)
    x["g"] = r.uniform(-8, 40, 1, 37, 2, 16).astype(f32)
    x["g"][0, 0] = 40
    x["A_log"] = np.array([np.log(16), -2]).astype(f32)
    x["initial_state"] = state(r, 1, 2, 20, 16).astype(f32)
    x["initial_state"][0, 0] *= f32(1e37)
    return "prefill", {"gate": "softplus"}, x


def case_direct_ragged(r):
    """Activated inputs, as transformers and FLA give them: direct gate, no norm, beta itself."""
    x = plain(r, 1, 64, 2, 2, 20, 12)
    x["k"] = (x["k"] / 5).astype(f32)
    x["g"] = -r.uniform(0, 3, 1, 64, 2, 20).astype(f32)
    x["g"][0, ::7] = 0
    x["beta"] = r.uniform(0, 1, 1, 64, 2).astype(f32)
    x["beta"][0, 3] = 0
    x["beta"][0, 5] = 1
    x["cu_seqlens"] = np.array([0, 1, 1, 49, 64], np.int64)
    x["initial_state"] = state(r, 4, 2, 12, 20).astype(f32)
    x["has_initial_state"] = np.array([True, True, False, True])
    x["initial_state"][2] = np.nan
    return "prefill", {"gate": "direct", "l2norm": 0, "beta_is_logit": 0}, x


def case_neg_eigval_kv(r):
    """Beta up to 2 and states [K,V]."""
    x = plain(r, 1, 48, 1, 2, 24, 16)
    x["beta"] = r.uniform(-4, 6, 1, 48, 2).astype(f32)
    x["initial_state"] = state(r, 1, 2, 24, 16).astype(f32)
    return "prefill", {"allow_neg_eigval": 1, "state_layout": "kv"}, x


def case_collinear(r):
    """One key for every token, beta near 1: a triangular inverse in low precision breaks here."""
    x = plain(r, 1, 64, 1, 1, 32, 16)
    x["q"][:] = x["k"][:] = x["k"][:, :1]
    x["v"] = np.tile(x["v"][:, :16], (1, 4, 1, 1))
    x["g"][:] = -12
    x["beta"][:] = 8
    return "prefill", {}, x


def case_half_checkpoints(r):
    """fp16 with an fp32 gate; a state before every 16 tokens."""
    x = plain(r, 1, 56, 1, 1, 16, 24, np.float16, f32)
    x["cu_seqlens"] = np.array([0, 16, 39, 56], np.int64)
    return "prefill", {"checkpoint_every": 16, "checkpoint_before": 1}, x


def case_pool_offsets(r):
    """Slots read and written apart, sequences skipped, checkpoints at offsets, K and V odd."""
    x = plain(r, 4, 33, 1, 1, 17, 9)
    x["initial_state"] = state(r, 4, 1, 9, 17).astype(f32)
    x["initial_state_indices"] = np.array([3, 0, 1, -1], np.int32)
    x["final_state_indices"] = np.array([1, -1, 3, 0], np.int64)
    x["checkpoint_offsets"] = np.array([[32, 0], [16, 32], [-1, 16], [16, 0]], np.int32)
    return "prefill", {}, x


def case_packed_slots(r):
    """Checkpoints packed, to slots of their own."""
    x = plain(r, 1, 60, 1, 2, 12, 16)
    x["cu_seqlens"] = np.array([0, 40, 40, 60], np.int32)
    x["initial_state"] = state(r, 3, 2, 16, 12).astype(f32)
    x["checkpoint_offsets"] = np.array([16, 32, 0, 16], np.int64)
    x["checkpoint_indptr"] = np.array([0, 2, 3, 4], np.int32)
    x["checkpoint_state_indices"] = np.array([4, -1, 0, 2], np.int32)
    return "prefill", {}, x


def case_every_after(r):
    """A state after every 32 tokens and at the end, over two batch rows."""
    x = plain(r, 2, 70, 1, 1, 12, 8)
    return "prefill", {"checkpoint_every": 32}, x


def case_decode(r):
    """One token each, slots read and written apart, two sequences skipped, one from zero."""
    x = plain(r, 5, 1, 1, 2, 20, 16)
    x["dt_bias"] = r.uniform(-1, 1, 2, 20).astype(f32)
    x["state"] = state(r, 7, 2, 16, 20).astype(f32)
    x["state"][4] = np.nan
    x["initial_state_indices"] = np.array([2, -1, 4, 0, 1], np.int32)
    x["final_state_indices"] = np.array([5, 3, 4, -1, 6], np.int64)
    x["has_initial_state"] = np.array([True, True, False, True, True])
    return "decode", {}, x


def case_decode_speculative(r):
    """Three tokens each: start from the accepted column, a column for every new state, in place."""
    x = plain(r, 3, 3, 1, 2, 16, 8)
    x["A_log"] = r.uniform(-1, 1, 2).astype(f32)
    x["state"] = state(r, 10, 2, 8, 16).astype(f32)
    x["initial_state_indices"] = np.array([[7, 1, 3, 0], [9, 8, -1, 6], [-1, 2, 4, 5]], np.int64)
    x["num_accepted_tokens"] = np.array([3, 1, 1], np.int32)
    return "decode", {"gate": "softplus"}, x


def case_decode_verify(r):
    """Eight tokens, bf16 and a bf16 pool in [K,V], nothing written to it."""
    x = plain(r, 2, 8, 2, 2, 16, 24, BF16)
    x["state"] = BF16.round(state(r, 2, 2, 16, 24))
    return "decode", {"write_state": 0, "state_layout": "kv"}, x


def case_summary(r):
    x = plain(r, 1, 45, 1, 2, 16, 12)
    del x["q"]
    x["g"] = (x["g"] - 4).astype(f32)
    x["cu_seqlens"] = np.array([0, 12, 12, 45], np.int32)
    return "summary", {}, x


CASES = {name.removeprefix("case_"): function for name, function in list(globals().items())
         if name.startswith("case_")}


def make(name):
    seed = 1 + list(CASES).index(name)
    op, options, tensors = CASES[name](Random(seed))
    tensors = dict(tensors)
    call = Call(op, options, tensors)
    gold = OPERATIONS[op](call)
    metadata = {"op": op, **{key: str(value) for key, value in options.items()}}
    return metadata, {**tensors, **gold}, call


# ---- commands ------------------------------------------------------------------------------------


def difference(x, gold):
    """RMS(x - gold) / RMS(gold); NaN must meet NaN."""
    x, gold = np.asarray(x, float), np.asarray(gold, float)
    if x.shape != gold.shape or not np.array_equal(np.isnan(x), np.isnan(gold)):
        return np.inf
    x, gold = (a[~np.isnan(gold)] for a in (x, gold))
    if not gold.size:
        return 0.0
    return np.sqrt(((x - gold) ** 2).sum()) / max(np.sqrt((gold**2).sum()), 1e-300)


def verify():
    """Inputs bit for bit; gold within 1e-12, since the last bit of exp() is the platform's."""
    bad = []
    files = {path.stem for path in HERE.glob("*.safetensors")}
    bad += [f"{name}: no such case" for name in sorted(files - set(CASES))]
    for name in CASES:
        if name not in files:
            bad.append(f"{name}: file missing")
            continue
        metadata, tensors, _ = make(name)
        kept_metadata, kept = read_file(HERE / f"{name}.safetensors")
        if metadata != kept_metadata or set(tensors) != set(kept):
            bad.append(f"{name}: other options or tensors")
            continue
        for key, array in tensors.items():
            if key.startswith("gold."):
                same = difference(kept[key], array) <= 1e-12
            else:
                raw = [a.bits if isinstance(a, BF16) else a for a in (array, kept[key])]
                same = raw[0].dtype == raw[1].dtype and raw[0].tobytes() == raw[1].tobytes()
            if not same:
                bad.append(f"{name}: {key} differs")
        print(f"{name}: verified")
    return bad


def check_fla():
    """Every sequence of every case by FLA's fp32 functions, from the same start, to 1e-5."""
    import torch
    from fla.ops.kda.gate import naive_kda_gate, naive_kda_lowerbound_gate
    from fla.ops.kda.naive import naive_recurrent_kda

    # Unsqueezed: one sequence is FLA's batch of one.
    tensor = lambda array: torch.tensor(np.ascontiguousarray(array), dtype=torch.float32)[None]
    bad = []
    for name in CASES:
        _, _, call = make(name)
        x, options, worst = call.x, call.options, 0.0
        r = Random(1000)
        for n, (b, begin, end) in enumerate(call.spans):
            if begin == end:
                continue
            q, k, v, g, beta = call.sequence(n)
            raw = tensor(x["g"][b, begin:end])
            A_log, dt_bias = (tensor(a)[0] for a in (call.A_log, call.dt_bias))
            if options["gate"] == "softplus":
                ours = np.maximum(naive_kda_gate(raw, A_log, dt_bias)[0].numpy(), -100)
                worst = max(worst, difference(ours, g))
            if options["gate"] == "bounded":
                ours = naive_kda_lowerbound_gate(raw, A_log, dt_bias, options["lower_bound"])
                worst = max(worst, difference(ours[0].numpy(), g))
            S = 0.3 * r.normal(call.HV, call.V, call.K)
            out, states = recurrence(q, k, v, g, beta, S, call.scale)
            fla_out, fla_state = naive_recurrent_kda(
                *(tensor(a) for a in (q, k, v, g, beta)), scale=call.scale,
                initial_state=tensor(S.swapaxes(-1, -2)), output_final_state=True)
            worst = max(worst, difference(fla_out[0].numpy(), out),
                        difference(fla_state[0].numpy().swapaxes(-1, -2), states[-1]))
        print(f"{name}: largest difference from FLA {worst:.1e}")
        if not worst <= 1e-5:
            bad.append(f"{name}: {worst:.1e} from FLA")
    return bad


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--verify", action="store_true", help="compare the files, write nothing")
    parser.add_argument("--check-fla", action="store_true", help="compare the recurrence with FLA")
    arguments = parser.parse_args()
    bad = []
    if arguments.verify:
        bad += verify()
    if arguments.check_fla:
        bad += check_fla()
    if not arguments.verify and not arguments.check_fla:
        for name in CASES:
            metadata, tensors, _ = make(name)
            write_file(HERE / f"{name}.safetensors", metadata, tensors)
            print(f"{name}: {(HERE / f'{name}.safetensors').stat().st_size} bytes")
    for line in bad:
        print(line, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
