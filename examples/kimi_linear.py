"""transformers' Kimi-Linear generating text with and without this library, timed.

    python examples/kimi_linear.py                        a small model with random weights, on the CPU
    python examples/kimi_linear.py --device cuda --model moonshotai/Kimi-Linear-48B-A3B-Instruct

The model is transformers' own `kimi_linear` (5.17 or newer). All that is needed is

    import flash_kda.integrations.transformers
    flash_kda.integrations.transformers.enable()
"""

import argparse
import time

import torch
import transformers

import flash_kda.integrations.transformers as integration

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--device", default="cpu")
parser.add_argument("--model", help="a checkpoint's name or directory; default: random weights")
parser.add_argument("--prompt", type=int, default=512, help="tokens (512)")
parser.add_argument("--tokens", type=int, default=32, help="to generate (32)")
parser.add_argument("--batch", type=int, default=1, help="sequences (1)")
options = parser.parse_args()


def small_model():
    """Three KDA layers to one MLA layer, as in the real one, each an eighth as wide."""
    config = transformers.KimiLinearConfig(
        vocab_size=4096, hidden_size=288, intermediate_size=1152, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=64, qk_rope_head_dim=16,
        v_head_dim=32, qk_nope_head_dim=32, linear_num_heads=4, linear_head_dim=128,
        layer_types=["linear_attention"] * 3 + ["full_attention"], mlp_layer_types=["dense"] * 4,
        pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.KimiLinearForCausalLM(config)


if options.model:
    model = transformers.KimiLinearForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
else:
    # in float32 the tokens are the same with and without us; the GPU kernels take bfloat16
    model = small_model().to(torch.float32 if options.device == "cpu" else torch.bfloat16)
model = model.to(options.device).eval()
prompt = torch.randint(
    2, model.config.vocab_size, (options.batch, options.prompt), device=options.device
)


def seconds(run):
    if options.device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if options.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def generate(n):
    return model.generate(prompt, max_new_tokens=n, min_new_tokens=n, do_sample=False)


def measure(name):
    """Prefill is what one token takes; the rest of a longer run is decode."""
    generate(2)  # warm-up: kernels loaded or compiled
    prefill, _ = seconds(lambda: generate(1))
    total, tokens = seconds(lambda: generate(options.tokens))
    step = (total - prefill) / (options.tokens - 1)
    print(f"{name:12} prefill {1e3 * prefill:8.1f} ms   decode {1e3 * step:7.2f} ms a token")
    return tokens


stock = measure("transformers")
integration.enable()
ours = measure("flash_kda")
same = int((stock == ours).all(dim=0).sum()) - options.prompt
print(f"{same} of {options.tokens} generated tokens are the same")
