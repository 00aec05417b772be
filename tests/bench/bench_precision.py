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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class Traffic(TorchDispatchMode):
    """Bytes that operations read (every tensor they are given, but what a copy overwrites) and write (every tensor that
    is new, or is not what it was)."""

    moved = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.ndim]
        before = [x.clone() for x in given]
        made = function(*args, **kwargs or {})
        changed = [x for x, old in zip(given, before, strict=True) if not torch.equal(x, old)]
        there = {x.untyped_storage().data_ptr() for x in given}
        new = [x for x in tree_leaves(made) if isinstance(x, torch.Tensor) and x.nbytes
               and x.untyped_storage().data_ptr() not in there]
        if changed or new:                                                       # else a view, which moves nothing
            copied = tree_leaves(args[0]) if function.overloadpacket.__name__.endswith("copy_") else []
            read = [x for x in given if not any(x is y for y in copied)]
            self.moved += sum(x.nbytes for x in (*read, *changed, *new))
        return made


def optimizer(precision_of: str, params: int, *shape):
    """With gradients, after a first step."""
    dtype = torch.float32 if precision_of == "fp32" else torch.bfloat16
    weights = [nn.Parameter(torch.randn(shape).to(dtype)) for _ in range(params)]
    made = torch.optim.AdamW(weights, fused=True) if dtype == torch.float32 else precision.MasterWeights(
        weights, torch.optim.AdamW, fused=True, keep="none" not in precision_of)
    for p in weights:
        p.grad_dtype = torch.float32
        p.grad = torch.randn(shape)
    made.step()
    return made


OPTIMIZERS = "fp32", "bf16, master weights", "bf16, none"


def bytes_moved(precision_of: str) -> float:
    """By a step, each parameter."""
    made = optimizer(precision_of, 4, 128, 128)
    with Traffic() as traffic:
        made.step()
    return traffic.moved / (4 * 128 * 128)


def optimizers():
    rows = alternate({name: optimizer(name, 16, 1024, 1024).step for name in OPTIMIZERS})
    print("optimizer step, 16.8 M parameters: ms; time beside fp32's; bytes moved a parameter, beside fp32's")
    for name, (seconds, ratio) in rows.items():
        moved = bytes_moved(name)
        print(f"    {name:<22} {seconds * 1e3:7.1f}   {ratio:.2f} x   {moved:g} = {moved / bytes_moved('fp32'):.2f} x")


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
