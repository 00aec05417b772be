"""What a call of attention costs the host, measured without a GPU: python tests/bench/bench_launch.py [--quick]

Microseconds per call on a CPU, medians, taking turns with F.scaled_dot_product_attention in the same run; and torch
operations per call, counted. A GPU that needs less than this for its kernels waits for Python.

What is real: flash_attention with all its checks, autograd, the allocation of tensors, and Triton's own code: the
kernels are compiled for sm_90, and launched through the object that Triton compiled. What is a stub: the driver. It
says that there is a chip, loads no code, and its launch, a C function that reads the arguments and puts the kernel on
a stream, does nothing. Tensors are small and lie on the CPU, where making one costs about what it costs on a GPU.
sdpa computes: on tensors so small, that is its overhead too.

Bounds, on a machine where sdpa takes 57 us for both passes: forward 40 us, both passes 130 us, with documents 150 us.
Another machine is slower or faster: a bound is multiplied by sdpa's time for both passes here over 57 us. (sdpa's
forward alone, 8 us there, is one call into C++. It says little of how fast a machine runs Python and autograd.)
"""

import os

os.environ |= {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}     # read when the kernels are defined

import statistics  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import machine_code  # noqa: E402
import triton  # noqa: E402

import flash_attn  # noqa: E402

BOUNDS = {"forward": 40, "both passes": 130, "both passes, documents": 150}                     # microseconds
SDPA = 57                                                                                        # there, both passes
OPERATIONS = 6


class Driver(machine_code.Stub):
    """As much of a driver as launching asks for."""

    class utils:
        @staticmethod
        def load_binary(name, kernel, shared, device):
            return "module", "function", 255, 0, 1024    # module, function, registers, spills, threads per block

        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 227 * 1024}

        @staticmethod
        def unload_module(module):
            pass

    @staticmethod
    def launcher_cls(source, metadata):
        return lambda *args: None


class Operations(TorchDispatchMode):
    """Counts operations; the detach by which autograd unpacks what it saved is not ours, and sdpa has it too."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += "detach" not in str(op)
        return op(*args, **(kwargs or {}))


def cases():
    """-> {what: a function to call}."""
    draw = lambda: torch.randn(2, 64, 2, 64).half().transpose(1, 2).requires_grad_()      # (B, H, T, D), as in a model
    q, k, v = draw(), draw(), draw()
    do = torch.randn(2, 64, 2, 64).half().transpose(1, 2)
    x = [torch.randn(1, 1, 1, 16, requires_grad=True) for _ in range(3)]                 # sdpa's overhead, not its work
    limits = flash_attn.document_limits(torch.arange(64).div(20, rounding_mode="floor").expand(2, -1))
    ours = lambda documents=None: flash_attn.flash_attention(q, k, v, documents=documents, backend="triton")
    sdpa = lambda: F.scaled_dot_product_attention(*x, is_causal=True)
    both = lambda documents=None: torch.autograd.grad(ours(documents), (q, k, v), do)
    return {"forward": ours, "both passes": both, "both passes, documents": lambda: both(limits),
            "sdpa, forward": sdpa, "sdpa, both passes": lambda: torch.autograd.grad(sdpa(), x, torch.ones_like(x[0]))}


def medians(runs, turns, calls):
    """{name: microseconds per call}, taking turns."""
    times = {name: [] for name in runs}
    for turn in range(turns + 3):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(calls):
                run()
            if turn >= 3:
                times[name].append((time.perf_counter() - start) / calls * 1e6)
    return {name: statistics.median(x) for name, x in times.items()}


def main(quick=False):
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(Driver(90))
    flash_attn.resolve_backend, flash_attn.capability = lambda backend, *_: backend, lambda device: (9, 0)
    flash_attn.PINNED = {name: choices[0] for name, choices in flash_attn.CONFIGS["pointers"][128].items()}
    runs, counts = cases(), {}
    for name, run in runs.items():
        run()                                                                             # the first call compiles
        with Operations() as operations:
            run()
        counts[name] = operations.count
    us = medians(runs, *((3, 20) if quick else (100, 50)))
    scale = us["sdpa, both passes"] / SDPA
    print(f"{'':<24} {'us':>6} {'bound here':>11} {'bound there':>12} {'operations':>11}")
    for name, time_taken in us.items():
        bound = BOUNDS.get(name)
        cells = f"{bound * scale:>11.0f} {bound:>12}" if bound else " " * 24
        print(f"{name:<24} {time_taken:>6.0f} {cells} {counts[name]:>11}")
    for name, bound in BOUNDS.items():
        assert counts[name] <= OPERATIONS, name
        assert quick or us[name] <= bound * scale, name


if __name__ == "__main__":
    main("--quick" in sys.argv)
