"""flash-linear-attention's KDA model with and without this library, timed; its functions on the CPU.

    python examples/fla_model.py --device cuda      wants flash-linear-attention and a GPU
    python examples/fla_model.py                    wants fla-core; runs its two KDA functions

FLA's layers have Triton parts that need a GPU; the KDA functions themselves run on the CPU through us.
All that is needed is

    import flash_kda.integrations.fla
    flash_kda.integrations.fla.register()

and for models with safe_gate=True not even that: FLA finds flash_kda by itself.
"""

import argparse
import time

import torch
from fla.ops.kda import chunk_kda, fused_recurrent_kda

import flash_kda.integrations.fla as integration

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--device", default="cpu")
parser.add_argument("--prompt", type=int, default=4096, help="tokens (4096)")
parser.add_argument("--tokens", type=int, default=32, help="to decode (32)")
options = parser.parse_args()
torch.manual_seed(0)


def functions():
    """Prefill and then token by token, as FLA's layer calls them, against one prefill of everything."""
    T, H, D = 96, 4, 128
    q, k, v, g = (torch.randn(2, T, H, D).bfloat16() for _ in range(4))
    beta = torch.randn(2, T, H).bfloat16()
    layer = dict(
        A_log=torch.zeros(H), dt_bias=torch.randn(H * D), output_final_state=True,
        use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
    )  # fmt: skip

    def part(begin, end):
        return [x[:, begin:end] for x in (q, k, v, g, beta)]

    expected, expected_state = chunk_kda(*part(0, T), **layer)
    out, state = chunk_kda(*part(0, 64), **layer)
    outs = [out]
    for t in range(64, T):
        out, state = fused_recurrent_kda(*part(t, t + 1), initial_state=state, **layer)
        outs.append(out)
    out = torch.cat(outs, dim=1).float()
    error = float((out - expected.float()).norm() / expected.float().norm())
    state_error = float((state - expected_state).norm() / expected_state.norm())
    print(f"chunk_kda of 64 tokens and fused_recurrent_kda of {T - 64}, against chunk_kda of {T}: "
          f"out {error:.1e}, state {state_error:.1e}")  # fmt: skip
    assert error < 1e-2 and state_error < 1e-2


def model():
    from fla.models import KDAConfig, KDAForCausalLM

    config = KDAConfig(
        hidden_size=1024, num_heads=8, head_dim=128, num_hidden_layers=4, vocab_size=8192,
        fuse_cross_entropy=False, eos_token_id=None,
    )  # fmt: skip
    net = KDAForCausalLM(config).to(options.device, torch.bfloat16).eval()
    prompt = torch.randint(2, config.vocab_size, (1, options.prompt), device=options.device)

    def seconds(run):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = run()
        torch.cuda.synchronize()
        return time.perf_counter() - start, result

    @torch.inference_mode()
    def generate(n):
        step = net(prompt, use_cache=True)
        logits = [step.logits[:, -1:]]
        for _ in range(n - 1):
            token = logits[-1].argmax(-1)
            step = net(token, past_key_values=step.past_key_values, use_cache=True)
            logits.append(step.logits)
        return torch.cat(logits, dim=1)

    def measure(name):
        generate(2)  # warm-up: FLA's kernels tune themselves, which takes minutes the first time
        prefill, _ = seconds(lambda: generate(1))
        total, logits = seconds(lambda: generate(options.tokens))
        step = (total - prefill) / (options.tokens - 1)
        print(f"{name:10} prefill {1e3 * prefill:8.1f} ms   decode {1e3 * step:7.2f} ms a token")
        return logits[:, 0]

    stock = measure("fla")
    integration.register()
    ours = measure("flash_kda")
    print(f"logits of the first token differ by {float((ours - stock).norm() / stock.norm()):.1e}")


if options.device == "cpu":
    integration.register()
    functions()
else:
    model()
