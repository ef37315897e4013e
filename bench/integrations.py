#!/usr/bin/env python3
"""What models of other projects take with this library and without; bench/results/integrations-<device>.json.

    python bench/integrations.py                      both models, recorded (needs a GPU)
    python bench/integrations.py --models kimi_linear
    python bench/integrations.py --device cpu --tiny -o /tmp/x.json     a try without a GPU

Models have the real ones' widths, random weights, few layers and no experts: the point is the linear
attention layer. Weights and activations are bfloat16.

    kimi_linear   transformers' own model, three KDA layers to one MLA layer. Without us: its PyTorch functions,
                  and FLA's kernels where `fla` can be imported (which transformers then takes by itself)
    fla           flash-linear-attention's KDA model: softplus gates, which FLA's own FlashKDA backend refuses
                  (register() is needed), and bounded gates, for which FLA finds us by itself

What is measured, ms:

    prefill       the model's forward over T tokens without a cache, and the last token's logits; of device time
    decode        one token for each of N sequences through the cache: wall time, in which launching counts
    layer         one KDA layer by itself: prefill, and decode in a CUDA graph (device time)

Each row has our time and our peers'; `calls` counts how often our prefill and decode ran in one call of
the model, so that a row that was not computed by us cannot pass for one; the peers' counts are checked to be 0.
`error` is RMS(logits - gold) / RMS(gold) over a teacher-forced pass, gold the same weights in float32 by
transformers' PyTorch functions. Exit status 1 if ours exceeds 1.2 times a peer's.

FLA's kernels tune themselves for minutes at first use. They are compiled ahead, each model's in a process of its
own, into Triton's cache (--no-prewarm: not). Rows are written as they come, and a later run
with other --models adds its rows to a file of the same device and commit.
"""

import argparse
import contextlib
import copy
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import flash_kda
import torch
from flash_kda import _C, bench, ops
from flash_kda.integrations import transformers as integration

ROOT = pathlib.Path(__file__).resolve().parent.parent
ERROR_RATIO = 1.2

SIZES = dict(
    hidden=2304, mlp=9216, heads=32, head_dim=128, vocabulary=32768, kda_layers=3,
    prefill=(8192,), decode=(1, 32), prompt=1024, error_tokens=512,
)  # fmt: skip
TINY = dict(
    hidden=64, mlp=64, heads=2, head_dim=32, vocabulary=256, kda_layers=2,
    prefill=(40,), decode=(1, 3), prompt=20, error_tokens=40,
)  # fmt: skip


def say(text):
    print(f"{time.monotonic() - START:7.1f} s  {text}", file=sys.stderr, flush=True)


def difference(x, y):
    return float((x.double() - y.double()).norm() / y.double().norm())


# ---- who computes -----------------------------------------------------------------------------------


class Calls:
    """Counts the calls of our entry points, however they are reached."""

    def __init__(self):
        self.count = {"prefill": 0, "decode": 0}
        self._wrap(flash_kda, "fwd", "prefill")
        self._wrap(_C, "_prefill_results", "prefill")
        self._wrap(_C, "_recurrent_results", "decode")
        self._wrap(ops, "prefill", "prefill")
        self._wrap(ops, "decode", "decode")
        self._wrap(ops, "recurrent", "decode")

    def _wrap(self, owner, name, kind):
        run = getattr(owner, name)

        @functools.wraps(run)
        def counting(*arguments, **keywords):
            results = run(*arguments, **keywords)
            self.count[kind] += results is not NotImplemented  # else another one follows
            return results

        setattr(owner, name, counting)

    def of(self, function):
        self.count.update(prefill=0, decode=0)
        function()
        return dict(self.count)


def pytorch_functions():
    """transformers' PyTorch functions, also where FLA is installed."""
    from transformers.models.kimi_linear import modeling_kimi_linear as module

    @contextlib.contextmanager
    def patched():
        names = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")
        stock = {name: getattr(module, name) for name in names}
        for name, function in stock.items():
            setattr(module, name, integration.reference(function))
        try:
            yield
        finally:
            for name, function in stock.items():
                setattr(module, name, function)

    return patched


@contextlib.contextmanager
def enabled(**options):
    integration.enable(**options)
    try:
        yield
    finally:
        integration.disable()


@contextlib.contextmanager
def fla_alone(*, found=False, registered=False):
    """FLA by itself; with what it finds by itself; or with our backend registered."""
    from flash_kda.integrations import fla

    before = os.environ.get("FLA_FLASH_KDA")
    os.environ["FLA_FLASH_KDA"] = "1" if found or registered else "0"
    if registered:
        fla.register()
    try:
        yield
    finally:
        if registered:
            fla.unregister()
        if before is None:
            del os.environ["FLA_FLASH_KDA"]
        else:
            os.environ["FLA_FLASH_KDA"] = before


def has_fla(*, models=False):
    return importlib.util.find_spec("fla") is not None and (
        not models or importlib.util.find_spec("fla.models") is not None
    )


# ---- the models -------------------------------------------------------------------------------------


class KimiLinear:
    """transformers' model. Variants: ours, and who computes without us."""

    name = "kimi_linear"

    def __init__(self, sizes, device):
        import transformers

        self.sizes, self.device, self.transformers = sizes, device, transformers
        narrow = sizes["hidden"] < 2304
        self.config = transformers.KimiLinearConfig(
            vocab_size=sizes["vocabulary"], hidden_size=sizes["hidden"],
            intermediate_size=sizes["mlp"], num_hidden_layers=sizes["kda_layers"] + 1,
            num_attention_heads=sizes["heads"], num_key_value_heads=sizes["heads"],
            linear_num_heads=sizes["heads"], linear_head_dim=sizes["head_dim"],
            layer_types=["linear_attention"] * sizes["kda_layers"] + ["full_attention"],
            mlp_layer_types=["dense"] * (sizes["kda_layers"] + 1),
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
            **(dict(kv_lora_rank=16, qk_rope_head_dim=8, v_head_dim=16, qk_nope_head_dim=16) if narrow else {}),
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device(device):
            model = transformers.KimiLinearForCausalLM(self.config)
        self.model = model.to(torch.bfloat16).eval()
        pytorch = pytorch_functions()
        self.ours = {"": enabled, "unfused_gate": lambda: enabled(fused_gate=False)}
        self.peers = {"transformers": pytorch}
        if has_fla() and torch.device(device).type == "cuda":
            self.peers["fla"] = contextlib.nullcontext
        self.gold = pytorch
        self.layer = self.model.model.layers[0].self_attn
        self.expected = {"prefill": sizes["kda_layers"], "decode": sizes["kda_layers"]}

    def cache(self):
        return self.transformers.DynamicCache(config=self.config)

    def forward(self, ids, cache=None):
        return self.model(ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)

    def logits(self, model, ids):
        return model(ids, use_cache=False).logits

    def layer_forward(self, hidden, cache=None):
        return self.layer(hidden, cache_params=cache)


class FlaKda:
    """FLA's model, with softplus or with bounded gates."""

    def __init__(self, sizes, device, safe_gate):
        from fla.models import KDAConfig, KDAForCausalLM

        self.name = "fla_bounded" if safe_gate else "fla_softplus"
        self.sizes, self.device = sizes, device
        gate = dict(safe_gate=True, lower_bound=-5.0) if safe_gate else {}
        self.config = KDAConfig(
            hidden_size=sizes["hidden"], num_heads=sizes["heads"], head_dim=sizes["head_dim"],
            num_hidden_layers=sizes["kda_layers"], intermediate_size=sizes["mlp"],
            vocab_size=sizes["vocabulary"], fuse_cross_entropy=False, **gate,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device(device):
            model = KDAForCausalLM(self.config)
        self.model = model.to(torch.bfloat16).eval()
        self.ours = {"": lambda: fla_alone(registered=True)}
        if safe_gate:
            self.ours["found"] = lambda: fla_alone(found=True)
        self.peers = {"fla": fla_alone}
        self.gold = None
        self.layer = self.model.model.layers[0].attn
        self.expected = {"prefill": sizes["kda_layers"], "decode": sizes["kda_layers"]}

    def cache(self):
        return None  # made by the model at the first call

    def forward(self, ids, cache=None, use_cache=False):
        return self.model(ids, past_key_values=cache, use_cache=use_cache, logits_to_keep=1)

    def logits(self, model, ids):
        return model(ids, use_cache=False).logits

    def layer_forward(self, hidden, cache=None):
        return self.layer(hidden)[0]


# ---- one row ----------------------------------------------------------------------------------------


def wall_ms(clock, function, seconds):
    """Median wall time of a call, to its end."""
    for _ in range(3):
        function()
    clock.sync()
    times, begin = [], time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        function()
        clock.sync()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def start_decode(model, prompt, token):
    """After the prompt: a call for one token more."""
    if isinstance(model, KimiLinear):
        cache = model.cache()
        model.forward(prompt, cache)
        return lambda: model.forward(token, cache)
    cache = model.forward(prompt, use_cache=True).past_key_values
    return lambda: model.forward(token, cache, use_cache=True)


class Bench:
    def __init__(self, clock, options, sizes):
        self.clock, self.options, self.sizes = clock, options, sizes
        self.calls, self.failures = Calls(), []
        self.device = str(clock.device)
        driver, clocks = clock.description()
        self.head = {
            "commit": bench.commit() if options.commit is None else options.commit,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "version": flash_kda.__version__,
            "device": clock.name,
            "driver": driver,
            "clocks_mhz": clocks,
            "copy_gbps": clock.copy_gbps(),
            "versions": {name: version(name) for name in PACKAGES if version(name)},
            "sizes": json.loads(json.dumps(sizes)),
            "note": options.note,
        }
        self.rows = self.earlier_rows()

    def earlier_rows(self):
        """Of other models, from a file of the same device and commit."""
        try:
            record = json.loads(pathlib.Path(self.options.output).read_text())
        except (OSError, ValueError):
            return []
        if any(record.get(k) != self.head[k] for k in ("device", "commit", "sizes")):
            return []
        self.head["versions"] = {**record["versions"], **self.head["versions"]}
        return [row for row in record["rows"] if row["model"] not in self.options.models]

    def add(self, model, name, measure, **what):
        """A row of ours, variants and peers. `measure` returns milliseconds and one call's counts."""
        row = {"name": f"{model.name}_{name}", "model": family(model), **what}
        times, counts = {}, {}
        for kind, variants in (("ours", model.ours), ("peers", model.peers)):
            for variant, context in variants.items():
                try:
                    with context():
                        times[kind, variant], counts[kind, variant] = measure()
                except torch.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    times[kind, variant] = counts[kind, variant] = None
                say(f"{row['name']} {kind} {variant}: {times[kind, variant]} ms")
        row["ms"] = times["ours", ""]
        row["peers_ms"] = {v: times["peers", v] for v in model.peers}
        row["variants_ms"] = {v: times["ours", v] for v in model.ours if v}
        row["calls"] = counts["ours", ""]
        for variant in model.peers:
            if counts["peers", variant] not in (None, {"prefill": 0, "decode": 0}):
                self.fail(f"{row['name']}: {variant} ran our kernels: {counts['peers', variant]}")
        for variant in model.ours:
            if not any(counts["ours", variant].values()) and variant != "found":
                self.fail(f"{row['name']}: ours {variant!r} did not run our kernels")
        self.rows.append(row)
        self.write()

    def fail(self, text):
        say(f"FAILED: {text}")
        self.failures.append(text)

    def write(self):
        bench.write_record(self.options.output, {**self.head, "rows": self.rows})

    def ids(self, *shape):
        generator = torch.Generator().manual_seed(1)
        return torch.randint(3, self.sizes["vocabulary"], shape, generator=generator).to(
            self.device
        )

    def hidden(self, *shape):
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(*shape, self.sizes["hidden"], generator=generator)
        return x.to(self.device, torch.bfloat16)

    # ---- what is measured

    def run(self, model):
        seconds = self.options.seconds
        for T in self.sizes["prefill"]:
            ids, hidden = self.ids(1, T), self.hidden(1, T)

            def whole(ids=ids):
                call = lambda: model.forward(ids)
                return self.clock.calls([call], seconds), self.calls.of(call)

            def layer(hidden=hidden):
                call = lambda: model.layer_forward(hidden)
                return self.clock.calls([call], seconds), self.calls.of(call)

            self.add(model, f"prefill_T{T}", whole, op="prefill", N=1, T=T, clock="device")
            self.add(model, f"layer_prefill_T{T}", layer, op="prefill", N=1, T=T, clock="device")
        for N in self.sizes["decode"]:
            self.add(
                model, f"decode_N{N}", lambda N=N: self.decode(model, N), op="decode", N=N, T=1,
                clock="wall",
            )  # fmt: skip
            if isinstance(model, KimiLinear):
                self.add(
                    model, f"layer_decode_N{N}", lambda N=N: self.layer_decode(model, N),
                    op="decode", N=N, T=1, clock="device, CUDA graph",
                )  # fmt: skip
        self.errors(model)

    def decode(self, model, N):
        call = start_decode(model, self.ids(N, self.sizes["prompt"]), self.ids(N, 1))
        return wall_ms(self.clock, call, self.options.seconds), self.calls.of(call)

    def layer_decode(self, model, N):
        cache = model.cache()
        model.layer_forward(self.hidden(N, 20), cache)
        hidden = self.hidden(N, 1)
        call = lambda: model.layer_forward(hidden, cache)
        counts = self.calls.of(call)
        return self.clock.graph([call], self.options.seconds), counts

    def errors(self, model):
        """Teacher-forced logits against float32; FLA's model against FLA itself."""
        ids = self.ids(2, self.sizes["error_tokens"])
        row = {
            "name": f"{model.name}_error", "model": family(model), "op": "error", "N": 2,
            "T": ids.shape[1],
        }  # fmt: skip
        results = {}
        for kind, variants in (("ours", model.ours), ("peers", model.peers)):
            for variant, context in variants.items():
                with context():
                    results[kind, variant] = model.logits(model.model, ids)
        if model.gold:
            with model.gold():
                gold = model.logits(copy.deepcopy(model.model).float(), ids)
            errors = {key: difference(x, gold) for key, x in results.items()}
            row["error"] = errors["ours", ""]
            row["peers_error"] = {v: errors["peers", v] for v in model.peers}
            row["variants_error"] = {v: errors["ours", v] for v in model.ours if v}
            for variant, theirs in row["peers_error"].items():
                if row["error"] > ERROR_RATIO * theirs:
                    self.fail(f"{row['name']}: {row['error']:.2e}, {variant}: {theirs:.2e}")
        else:
            row["difference"] = difference(results["ours", ""], results["peers", "fla"])
        say(json.dumps(row))
        self.rows.append(row)
        self.write()


# ---- FLA's kernels ----------------------------------------------------------------------------------

MODELS = {
    "kimi_linear": KimiLinear,
    "fla_softplus": functools.partial(FlaKda, safe_gate=False),
    "fla_bounded": functools.partial(FlaKda, safe_gate=True),
}


def names_of(options):
    """Of the models to measure."""
    with_fla = has_fla(models=True) and options.device != "cpu"
    names = ["kimi_linear"] if "kimi_linear" in options.models else []
    return names + (["fla_softplus", "fla_bounded"] if "fla" in options.models and with_fla else [])


def compile_fla(name, sizes):
    """In a process of its own: what tuning will ask for, compiled without being timed."""
    bench.compile_without_timing()
    torch.set_grad_enabled(False)
    model = MODELS[name](sizes, "cuda")
    run = Bench.__new__(Bench)  # its inputs only
    run.sizes, run.device = sizes, "cuda"
    with model.peers["fla"]():
        for T in sizes["prefill"]:
            model.forward(run.ids(1, T))
        for N in sizes["decode"]:
            start_decode(model, run.ids(N, sizes["prompt"]), run.ids(N, 1))()
    torch.cuda.synchronize()


def prewarm(options, seconds):
    """compile_fla() for every model at once. Not needed: what fails or takes too long is compiled later."""
    started = []
    for name in names_of(options):
        log = tempfile.TemporaryFile("w+")
        command = [sys.executable, __file__, "--compile", name]
        started.append((name, subprocess.Popen(command, stdout=log, stderr=log), log))
    bench.finish_prewarm(started, seconds)


def family(model):
    return "kimi_linear" if isinstance(model, KimiLinear) else "fla"


PACKAGES = ("torch", "triton", "transformers", "fla-core", "flash-linear-attention")


@functools.cache
def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="kimi_linear,fla", help="kimi_linear, fla, or both")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a try: sizes of no interest")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each number (0.5)")
    parser.add_argument("--commit", help="recorded; default: FLASHKDA_COMMIT or what git says")
    parser.add_argument("--note", default="", help="recorded")
    parser.add_argument("--no-prewarm", action="store_true", help="do not compile FLA's kernels ahead")
    parser.add_argument("--compile", choices=MODELS, help=argparse.SUPPRESS)  # prewarm()
    parser.add_argument("-o", "--output", help="default: bench/results/integrations-<device>.json")
    options = parser.parse_args()
    if options.compile:
        return compile_fla(options.compile, SIZES)
    options.models = options.models.split(",")
    for name in options.models:
        if name not in ("kimi_linear", "fla"):
            parser.error(f"--models: {name!r}, expected kimi_linear, fla or both")

    if options.device == "cpu":
        clock = bench.HostClock(torch)
    elif torch.cuda.is_available():
        clock = bench.CudaClock(torch, torch.cuda.current_device())
        torch.backends.cuda.matmul.allow_tf32 = False  # of the float32 model that is gold
    else:
        parser.error("no CUDA device for torch; --device cpu --tiny tries it without one")
    if not options.output:
        device = bench.short_device(clock.name)
        options.output = str(ROOT / f"bench/results/integrations-{device}.json")

    if has_fla() and options.device != "cpu" and not (options.no_prewarm or options.tiny):
        prewarm(options, 200)
    run = Bench(clock, options, TINY if options.tiny else SIZES)
    names = names_of(options)
    with torch.inference_mode():
        for name in names:
            run.run(MODELS[name](run.sizes, run.device))
    if "fla" in options.models and "fla_bounded" not in names:
        say("fla left out: needs a GPU and the package flash-linear-attention")
    say(f"wrote {options.output}")
    for text in run.failures:
        print(f"FAILED: {text}")
    return 1 if run.failures else 0


if __name__ == "__main__":
    START = time.monotonic()
    sys.exit(main())
