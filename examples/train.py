"""Trains a small Kimi-Linear-style language model on text that ships with Python: its own reference manual.

    python examples/train.py                                      # 200 steps on the CPU, a minute or so
    python examples/train.py --kda naive                          # the token recurrence in PyTorch instead
    python examples/train.py --save run.pt --steps 100            # stop half way ...
    python examples/train.py --resume run.pt --steps 200          # ... and go on: the same losses
    python examples/train.py --compare --json FILE --plot FILE    # all of it, side by side
    python examples/train.py --device cuda --compare              # a larger model on a GPU, FLA too if installed
    python examples/train.py --device cuda --compare --json FILE --continue       # what FILE does not have yet

Bytes in, bytes out. Three layers of Kimi Delta Attention to one of multi-head latent attention without
positions, as in Kimi Linear (arXiv 2510.26692); each followed by a SwiGLU MLP. --kda fla trains on
flash-linear-attention's kernels (on a GPU); naive64 is the recurrence in float64 inside the same model: how far
naive and naive64 come apart is what rounding does to a training curve. On a GPU the model is float32 under bfloat16
autocast, and q, k and v go to each of them in bfloat16; tokens a second are also taken of long sequences, where
the recurrence would take hours. There --compare takes minutes: FLA's kernels are compiled first, by processes side by
side, and after --limit seconds a curve ends where it is.
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY = 256


def corpus() -> torch.Tensor:
    """The topics of Python's help(), about 465 KB of English."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


# ---- Kimi Delta Attention, three ways ------------------------------------------------------------------


def naive_kda(q, k, v, g, beta, A_log, dt_bias, lower_bound, dtype):
    """The definition, token by token; autograd does the rest."""
    io = v.dtype
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    A, bias = A_log.to(dtype).exp()[:, None], dt_bias.to(dtype)
    decay = (lower_bound * torch.sigmoid(A * (g + bias))).exp()
    beta = beta.sigmoid()
    B, _, H, K = q.shape
    S = v.new_zeros(B, H, v.shape[3], K)
    out = []
    for q_t, k_t, v_t, decay_t, beta_t in zip(*(x.unbind(1) for x in (q, k, v, decay, beta))):
        S = S * decay_t[:, :, None, :]
        u = beta_t[:, :, None] * (v_t - (S * k_t[:, :, None, :]).sum(-1))
        S = S + u[..., None] * k_t[:, :, None, :]
        out.append((S * q_t[:, :, None, :]).sum(-1))
    return (K**-0.5 * torch.stack(out, 1)).to(io)


def kda_function(name):
    if name in ("naive", "naive64"):
        dtype = torch.float64 if name == "naive64" else torch.float32

        def kda(*x):
            return naive_kda(*x, dtype)

    else:
        kda = kernels(name)

    def run(q, k, v, *rest):
        device = q.device.type
        if torch.is_autocast_enabled(device):  # as an operator that knows of autocast does
            q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
        return kda(q, k, v, *rest)

    return run


def kernels(name):
    if name == "fla":
        os.environ["FLA_FLASH_KDA"] = "0"  # its own
        from fla.ops.kda import chunk_kda
    else:
        from flash_kda import chunk_kda

    def run(q, k, v, g, beta, A_log, dt_bias, lower_bound):
        return chunk_kda(
            q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias.flatten(), lower_bound=lower_bound,
            use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
            safe_gate=True,
        )[0]  # fmt: skip

    return run


# ---- the model -----------------------------------------------------------------------------------------


class ShortConvolution(nn.Module):
    """A causal convolution over 4 tokens, a filter for each channel, then SiLU."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, dim).uniform_(-0.5, 0.5))

    def forward(self, x):
        before = F.pad(x, (0, 0, 3, 0))
        return F.silu(sum(before[:, i : i + x.shape[1]] * w for i, w in enumerate(self.weight)))


class KDALayer(nn.Module):
    def __init__(self, dim, heads, head_dim, kda):
        super().__init__()
        self.heads, self.head_dim, self.kda = heads, head_dim, kda
        width = heads * head_dim
        self.q, self.k, self.v = (nn.Linear(dim, width, bias=False) for _ in range(3))
        self.convs = nn.ModuleList(ShortConvolution(width) for _ in range(3))
        self.gate = nn.Sequential(
            nn.Linear(dim, head_dim, bias=False), nn.Linear(head_dim, width, bias=False)
        )
        self.beta = nn.Linear(dim, heads, bias=False)
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.dt_bias = nn.Parameter(
            torch.full((heads, head_dim), -4.0)
        )  # decays of e^-0.1 to begin with
        self.out_gate = nn.Linear(dim, width)
        self.norm = nn.RMSNorm(head_dim)
        self.out = nn.Linear(width, dim, bias=False)

    def forward(self, x):
        B, T, _ = x.shape
        shape = (B, T, self.heads, self.head_dim)
        q, k, v = (c(p(x)).view(shape) for c, p in zip(self.convs, (self.q, self.k, self.v)))
        g = self.gate(x).view(shape)
        o = self.kda(q, k, v, g, self.beta(x), self.A_log, self.dt_bias, -5.0)
        o = self.norm(o) * torch.sigmoid(self.out_gate(x)).view(shape)
        return self.out(o.reshape(B, T, -1))


class LatentAttention(nn.Module):
    """Softmax attention whose keys and values come out of one small latent vector a token."""

    def __init__(self, dim, heads, head_dim):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        width = heads * head_dim
        self.q = nn.Linear(dim, width, bias=False)
        self.latent = nn.Sequential(nn.Linear(dim, dim // 4, bias=False), nn.RMSNorm(dim // 4))
        self.kv = nn.Linear(dim // 4, 2 * width, bias=False)
        self.out = nn.Linear(width, dim, bias=False)

    def forward(self, x):
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.heads, -1).transpose(1, 2)
        k, v = self.kv(self.latent(x)).view(B, T, self.heads, -1).transpose(1, 2).chunk(2, -1)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(o.transpose(1, 2).reshape(B, T, -1))


class SwiGLU(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.up, self.down = (
            nn.Linear(dim, 4 * dim, bias=False),
            nn.Linear(2 * dim, dim, bias=False),
        )

    def forward(self, x):
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Model(nn.Module):
    def __init__(self, args, kda):
        super().__init__()
        dim, heads, head_dim = args.dim, args.heads, args.head_dim
        self.embed = nn.Embedding(VOCABULARY, dim)
        self.mixers, self.mlps, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for layer in range(args.layers):
            full = layer % 4 == 3
            mixer = (
                LatentAttention(dim, heads, head_dim)
                if full
                else KDALayer(dim, heads, head_dim, kda)
            )
            self.mixers.append(mixer)
            self.mlps.append(SwiGLU(dim))
            self.norms.extend((nn.RMSNorm(dim), nn.RMSNorm(dim)))
        self.norm = nn.RMSNorm(dim)

    def forward(self, tokens):
        x = self.embed(tokens)
        for i, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps)):
            x = x + mixer(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.norm(x) @ self.embed.weight.T


# ---- training ------------------------------------------------------------------------------------------


def batch(text, args, step, device):
    """The same tokens at a step whatever came before."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    starts = torch.randint(0, len(text) - args.length - 1, (args.batch,), generator=generator)
    rows = text[starts[:, None] + torch.arange(args.length + 1)]
    return rows.to(device)


def train(args, kda, steps, resume=None, save=None, say=print):
    """Losses of the steps that were run, tokens a second (the median step), and seconds of the first step. With
    args.limit no step begins later than so many seconds after the first one."""
    torch.manual_seed(args.seed)
    text, device = corpus(), torch.device(args.device)
    model = Model(args, kda_function(kda)).to(device)
    nn.init.normal_(model.embed.weight, std=args.dim**-0.5)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    first = 0
    if resume:
        kept = torch.load(resume, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        first = kept["step"]
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)
    losses, times = [], []
    for step in range(first, steps):
        if len(times) > 1 and args.limit and sum(times[1:]) > args.limit:
            say(f"{kda:10s} stopped after {step} steps: --limit {args.limit:g}")
            steps = step
            break
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 20)
        tokens = batch(text, args, step, device)
        start = time.perf_counter()
        with autocast:
            logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        times.append(time.perf_counter() - start)
        if step % 20 == 0 or step == steps - 1:
            say(f"{kda:10s} step {step:5d}  loss {losses[-1]:.4f}  {1e3 * times[-1]:7.1f} ms")
    if save:
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": steps}, save
        )
    median = sorted(times)[len(times) // 2] if times else float("nan")
    return losses, args.batch * args.length / median, times[0] if times else None


def distance(a, b, window=10):
    """Largest difference of two curves, as far as both go, each averaged over `window` steps."""
    n = min(len(a), len(b))
    a, b = a[:n], b[:n]
    means = [torch.tensor(x).unfold(0, min(window, len(x)), 1).mean(-1) for x in (a, b)]
    return float((means[0] - means[1]).abs().max())


def compare(args):
    """Curves of every implementation, and of a run that was stopped half way; then rates of long sequences."""
    cpu = args.device == "cpu"
    record = {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": platform.processor() or platform.machine() if cpu
        else torch.cuda.get_device_name(args.device),
        "torch": torch.__version__,
        "settings": {n: getattr(args, n) for n in
                     ("steps", "seed", "layers", "dim", "heads", "head_dim", "length", "batch", "lr", "bf16")},
        "tokens_per_second": {}, "first_step_seconds": {}, "distance": {}, "losses": {},
    }  # fmt: skip
    if not cpu:
        record["long"] = {"length": args.long_length, "batch": args.long_batch}
        record["long"]["tokens_per_second"] = {}
    curves = {}
    if args.go_on and os.path.exists(args.json):
        with open(args.json) as file:
            earlier = json.load(file)
        for key in ("commit", "device", "torch", "settings"):
            if earlier[key] != record[key]:
                raise SystemExit(f"--continue: {key} {earlier[key]}, expected {record[key]}")
        record, curves = earlier, dict(earlier["losses"])
    names = [name for name in args.kdas.split(",") if name not in curves]
    if "fla" in names and not cpu:
        compile_ahead(args)
    for name in names:
        torch.use_deterministic_algorithms(not cpu, warn_only=True)
        curves[name], rate, first = train(args, name, args.steps)
        record["tokens_per_second"][name] = round(rate)
        record["first_step_seconds"][name] = round(first, 3)
        record["losses"][name] = [round(x, 5) for x in curves[name]]
        pairs = (("flash_kda", "naive"), ("naive", "naive64"), ("flash_kda", "fla"))
        for a, b in pairs:
            if name in (a, b) and a in curves and b in curves:
                record["distance"][f"{a}_{b}"] = distance(curves[a], curves[b])
        if name == "flash_kda":
            resumed = train_in_two(args)
            apart = max(abs(x - y) for x, y in zip(resumed, curves[name]))
            record["distance"]["resumed"] = apart
        if not cpu and not name.startswith("naive"):
            torch.use_deterministic_algorithms(False)
            long = argparse.Namespace(**vars(args))
            long.length, long.batch = args.long_length, args.long_batch
            record["long"]["tokens_per_second"][name] = round(train(long, name, 12)[1])
        if args.json:  # what there is so far: the last may tune its kernels for minutes
            with open(args.json, "w") as file:
                json.dump(record, file, indent=1)
    long = record.get("long", {}).get("tokens_per_second", {})
    for name, value in record["tokens_per_second"].items():
        more = f", {long[name]} of {args.long_length} tokens" if name in long else ""
        print(f"{name:10s} {value:8d} tokens/s{more}   last loss {curves[name][-1]:.4f}")
    for pair, value in record["distance"].items():
        print(f"curves apart: {pair} {value:.4g}")
    if args.plot:
        plot(record, args.plot)


def compile_ahead(args):
    """What FLA's tuning will ask for, compiled by processes side by side, each a share of the candidates."""
    from flash_kda import bench

    parts, started, start = min(os.cpu_count() or 1, 16), [], time.monotonic()
    names = ("device", "layers", "dim", "heads", "head_dim", "length", "batch", "long_length")
    given = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    given += ["--bf16" if args.bf16 else "--no-bf16"]
    for part in range(parts):
        log = tempfile.TemporaryFile("w+")
        command = [sys.executable, __file__, *given, "--compile", f"{part}/{parts}"]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        started.append(((args.heads, False), process, log))
    bench.finish_prewarm(started, args.compile_limit)
    print(f"fla        kernels compiled ahead for {time.monotonic() - start:.0f} s")


def compile_part(args):
    """A training step of every length, whatever comes out of it."""
    from flash_kda import bench

    bench.compile_without_timing(*map(int, args.compile.split("/")))
    for length, rows in ((args.length, args.batch), (args.long_length, 2)):
        args.length, args.batch = length, rows
        train(args, "fla", 1)


def train_in_two(args):
    """The losses of a run that is saved half way and resumed."""
    half, path = args.steps // 2, args.save or "train-half.pt"
    losses = train(args, "flash_kda", half, save=path)[0]
    losses += train(args, "flash_kda", args.steps, resume=path)[0]
    if not args.save:
        os.unlink(path)
    return losses


def plot(record, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    styles = {"flash_kda": "-", "naive": "--", "naive64": ":", "fla": "-."}
    for name, losses in record["losses"].items():
        axes.plot(
            losses, styles[name], label=f"{name}, {record['tokens_per_second'][name]} tokens/s"
        )
    axes.set(
        xlabel="step", ylabel="loss (nats a byte)", title="Kimi-Linear-style model, the same seed"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def commit():
    if os.environ.get("FLASHKDA_COMMIT"):
        return os.environ["FLASHKDA_COMMIT"]
    here = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run(
        ["git", "-C", here, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return done.stdout.strip() or None


# What the options are by default.
SIZES = {
    "cpu": dict(dim=128, heads=2, head_dim=64, length=256, batch=4, bf16=False),
    "cuda": dict(dim=512, heads=4, head_dim=128, length=256, batch=8, bf16=True, lr=1e-3),
}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kda", choices=["flash_kda", "naive", "naive64", "fla"], default="flash_kda"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="autocast to bfloat16; on a GPU the kernels take nothing else",
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4, help="every fourth is full attention")
    parser.add_argument("--dim", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--head-dim", type=int)
    parser.add_argument("--length", type=int, help="tokens a sequence")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--save", help="write model and optimizer at the end")
    parser.add_argument("--resume", help="start from what --save wrote")
    parser.add_argument(
        "--compare", action="store_true", help="every implementation, and a resumed run"
    )
    parser.add_argument("--kdas", help="with --compare: which, comma-separated")
    parser.add_argument("--long-length", type=int, default=4096, help="with --compare on a GPU")
    parser.add_argument("--long-batch", type=int, default=4, help="with --compare on a GPU")
    parser.add_argument("--json", help="with --compare: write curves and rates")
    parser.add_argument(
        "--continue", dest="go_on", action="store_true", help="only what --json FILE does not have"
    )
    parser.add_argument(
        "--limit", type=float, help="seconds of a training run (on a GPU with --compare: 120)"
    )
    parser.add_argument(
        "--compile-limit", type=float, default=150, help="seconds of compiling FLA ahead (150)"
    )
    parser.add_argument("--compile", help=argparse.SUPPRESS)  # compile_ahead()
    parser.add_argument("--plot", help="with --compare: draw the curves (matplotlib)")
    device = parser.parse_known_args(arguments)[0].device.split(":")[0]
    parser.set_defaults(**SIZES["cpu" if device == "cpu" else "cuda"])
    args = parser.parse_args(arguments)
    if device != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the same bits again
    if not args.kdas:
        fla = device != "cpu" and importlib.util.find_spec("fla")
        args.kdas = "flash_kda,naive,naive64" + (",fla" if fla else "")
    if args.go_on and not args.json:
        parser.error("--continue: expected --json FILE with it")
    if args.compile:
        return compile_part(args)
    if args.compare:
        if args.limit is None and device != "cpu":
            args.limit = 120
        return compare(args)
    losses, rate, _ = train(args, args.kda, args.steps, args.resume, args.save)
    print(f"{rate:.0f} tokens/s")
    return losses


if __name__ == "__main__":
    main()
