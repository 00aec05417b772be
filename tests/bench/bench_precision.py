"""Speed and bytes of low precision.

The optimizer step: MasterWeights over torch's fused AdamW beside that AdamW on float32 weights, in turns. Generation
and evaluation with integer weights beside float32, on this machine.

run: python tests/bench/bench_precision.py
"""

import copy
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import model as net  # noqa: E402
import precision  # noqa: E402

ROUNDS = 15


def alternate(works: dict) -> dict:
    """{name: seconds} medians, and the ratio of each to the first one, round by round."""
    times = {name: [] for name in works}
    for i in range(ROUNDS + 2):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if i > 1:
                times[name].append(time.perf_counter() - start)
    first = next(iter(times.values()))
    return {name: (statistics.median(x), statistics.median(a / b for a, b in zip(x, first, strict=True)))
            for name, x in times.items()}


def optimizers():
    def made(dtype, **options):
        params = [nn.Parameter(torch.randn(1024, 1024).to(dtype)) for _ in range(16)]
        optimizer = torch.optim.AdamW(params, fused=True) if dtype == torch.float32 else precision.MasterWeights(
            params, torch.optim.AdamW, fused=True, **options)
        for p in params:
            p.grad_dtype = torch.float32
            p.grad = torch.randn(p.shape)
        return optimizer.step

    # read w g m v, write w m v; with masters the low weight is written too; without, read, and the master written twice
    moved = {"fp32": 28, "bf16, master weights": 28 + 4 + 2, "bf16, none": 28 + 2 + 4 + 4 + 2}
    rows = alternate({"fp32": made(torch.float32), "bf16, master weights": made(torch.bfloat16),
                      "bf16, none": made(torch.bfloat16, keep=False)})
    print("optimizer step, 16.8 M parameters: ms; time beside fp32's; bytes moved a parameter, beside fp32's")
    for name, (seconds, ratio) in rows.items():
        print(f"    {name:<22} {seconds * 1e3:7.1f}   {ratio:.2f} x   {moved[name]} = {moved[name] / 28:.2f} x")


@torch.no_grad()
def integers():
    config = net.ModelConfig(vocab_size=2048, seq_len=256, n_layer=4, n_head=8, n_kv_head=8, head_dim=64, n_embd=512,
                             n_ff=1408)
    models = {"fp32": net.build(config)}
    for fmt in ("int8", "int4"):
        models[fmt] = precision.quantize(copy.deepcopy(models["fp32"]), fmt)
    prompt, window = torch.zeros(1, 16, dtype=torch.int64), torch.zeros(8, 256, dtype=torch.int64)
    written = alternate({name: (lambda m=m: m.generate(prompt, 32, 0.0)) for name, m in models.items()})
    read = alternate({name: (lambda m=m: m(window, window)) for name, m in models.items()})
    whole = precision.weight_bytes(models["fp32"])
    print("weights as integers, 15 M parameters: bytes of linear layers and head; fewer; tokens/s written; read")
    for name, m in models.items():
        size = precision.weight_bytes(m)
        print(f"    {name:<6} {size:>12,}   {whole / size:.2f} x   {32 / written[name][0]:7,.0f} "
              f"({1 / written[name][1]:.2f} x)   {2048 / read[name][0]:9,.0f} ({1 / read[name][1]:.2f} x)")


if __name__ == "__main__":
    torch.set_num_threads(1)
    optimizers()
    integers()
