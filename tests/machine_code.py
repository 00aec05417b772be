"""What a Triton kernel becomes: its machine code, compiled ahead of time and read on a machine without a GPU.

compile_for(90, kernel, *args, num_warps=8, ...) compiles what a launch with those arguments would run: the launcher's
own code specialises them (16-byte alignment, arguments that are 1 or multiples of 16), only the driver is a stub that
names a chip by NVIDIA's compute capability: 80, 86, 89, 90, 100, 120. Pass tensors on the meta device: they take no
memory, and a view's address is its offset, so misalignment counts too. analyse(compiled) reads registers, stack and
loops off the binary (cuobjdump, nvdisasm).

What the figures are worth. None is a time. To rely on: whether the kernel can launch at all; spill instructions in
the hot loop; wgmma serialised or not; kind, accumulator and number of the tensor-core instructions. Good for comparing
two versions of a kernel on one chip: warp instructions per 1024 scores, counts of shuffles and shared memory accesses,
blocks per multiprocessor. Weak: total instructions, registers alone, spills outside loops.

What is counted. Loops are natural loops: t -> h is a back edge if every way to t passes h, and the loop is what reaches
t without passing h. An instruction counts once an iteration, behind a branch or a predicate too: the three of a
barrier's retry as if they always ran. A loop with a short constant trip count is unrolled by the compiler and no loop
here. A warp-specialised kernel spreads its work over several loops: the figures of one are not the kernel's.
"""

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

# KB of shared memory in a multiprocessor and at most in a block, then warps and blocks in a multiprocessor (the table
# of compute capabilities in NVIDIA's CUDA programming guide).
NVIDIA = {80: (164, 163, 64, 32), 86: (100, 99, 48, 16), 89: (100, 99, 48, 24),
          90: (228, 227, 64, 32), 100: (228, 227, 64, 32), 120: (100, 99, 48, 24)}

TENSOR = re.compile(r"(UTC)?[A-Z]G?MMA\b")  # HMMA, HGMMA, UTCHMMA, QMMA, ...
WARP_MMA = {"884": 8 * 8 * 4, "1684": 16 * 8 * 4, "1688": 16 * 8 * 8, "16816": 16 * 8 * 16, "16832": 16 * 8 * 32,
            "16864": 16 * 8 * 64}  # m, n, k written without a separator: HMMA.16816.F32
MASKS = "FSEL", "SEL", "FSETP", "ISETP"
SPILLS = "LDL", "STL"
JUMPS = "BRA", "BRX", "JMP", "JMX", "CALL"  # CALL to a .L label is a jump, on sm_80 the way out of loops
ENDS = "BRA", "BRX", "JMP", "JMX", "EXIT", "RET"


class Stub:
    """As much of a driver as compiling asks for."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target  # only a key to the kernels compiled so far: it must differ between chips

    def get_current_stream(self, device=None):
        return 0


@contextlib.contextmanager
def target(arch: int):
    """Inside, fn.warmup(...) compiles for this chip."""
    before = triton.runtime.driver._active  # the public property would look for a GPU
    triton.runtime.driver.set_active(Stub(arch))
    try:
        yield
    finally:
        triton.runtime.driver.set_active(before)


def compile_for(arch: int, fn, *args, **options):
    """fn[grid](*args, **options) as far as the binary. Whether a*b+c is fused is said, for the default varies."""
    assert not knobs.runtime.interpret, "the interpreter compiles nothing"
    with target(arch):
        return fn.warmup(*args, grid=(1,), **{"enable_fp_fusion": True, **options})


@dataclass
class Op:
    name: str  # with its modifiers: HMMA.16816.F32
    operands: str
    targets: list[str]  # labels it may jump to
    falls: bool  # may go on to the next instruction


@dataclass
class Loop:
    ops: Counter  # name -> number in the body
    innermost: bool  # no loop with tensor-core instructions inside
    single: int  # instructions in the blocks of code that issue tcgen05 instructions: one warp runs those

    @property
    def instructions(self) -> int:
        return self.ops.total()

    @property
    def spills(self) -> int:
        return self.count(*SPILLS)

    @property
    def tensor(self) -> Counter:
        """Tensor-core instructions: shape, accumulator and, unless fp16, operand type are in the name."""
        return Counter({name: n for name, n in self.ops.items() if TENSOR.match(name)})

    def count(self, *kinds: str) -> int:
        """Instructions of these kinds: MUFU counts MUFU.EX2, LDS does not count LDSM."""
        form = re.compile("({})(?![A-Z0-9])".format("|".join(map(re.escape, kinds))))
        return sum(n for name, n in self.ops.items() if form.match(name))

    def flops(self, num_warps: int) -> float:
        """Tensor-core FLOPs of a thread block in an iteration."""
        total = 0
        for name, n in self.tensor.items():
            if shape := re.search(r"(\d+)x(\d+)x(\d+)", name):
                macs = int(shape[1]) * int(shape[2]) * int(shape[3])
            elif not (macs := WARP_MMA.get((name + ".").split(".")[1])):
                raise ValueError(f"{name}: unknown shape")
            issuers = 1 if name.startswith("UTC") else num_warps / 4 if "GMMA" in name else num_warps
            total += 2 * macs * n * issuers
        return total


@dataclass
class Report:
    registers: int  # a thread
    stack: int  # bytes a thread: spilled registers
    shared: int  # bytes a block
    blocks: int  # that fit in a multiprocessor at once
    limits: list[str]  # exceeded: why it cannot launch
    loops: list[Loop]
    wgmma_serialized: bool  # each waits for the one before; can be told if a dot takes more than one of them

    @property
    def launchable(self) -> bool:
        return not self.limits

    @property
    def hot(self) -> Loop:
        """The loop over unmasked tiles.

        Among the innermost loops with tensor-core instructions it has the fewest compares and selects for each of those
        (a mask costs every score one or two), then the fewest instructions. By the tensor-core instruction, since the
        compiler may unroll one of the loops.
        """
        loops = [loop for loop in self.loops if loop.tensor and loop.innermost]
        if not loops:
            raise ValueError("no loop with tensor-core instructions")
        return min(loops, key=lambda loop: (loop.count(*MASKS) / loop.tensor.total(),
                                            loop.instructions / loop.tensor.total()))


def per_1024(loop: Loop, scores: int, flops: int, num_warps: int) -> float:
    """Warp instructions issued per 1024 scores, by a loop that computes a tile per iteration.

    scores: of a tile, BLOCK_M * BLOCK_N. flops: on tensor cores for one score, 2 * head dim for each of the kernel's
    dots: forward 4 D, dk and dv 8 D, dq 6 D.
    """
    if (tiles := loop.flops(num_warps) / (scores * flops)) < 1:            # more if warps repeat each other's work
        raise ValueError(f"an iteration does the work of {tiles:.3f} tiles: scores, flops or num_warps is wrong")
    issued = (loop.instructions - loop.single) * num_warps + loop.single
    return issued * 1024 / scores


def cubin_tool(compiled, tool, *flags: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool.path, *flags, file.name], capture_output=True, text=True, check=True).stdout


def assembly(compiled) -> tuple[list[Op], dict[str, int]]:
    """Instructions in the order of addresses, and where each label points."""
    text = cubin_tool(compiled, knobs.nvidia.nvdisasm, "-c")
    form = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)\s*([^;]*)")
    ops, labels, constants = [], {}, {}
    for line in text.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(ops)
        elif found := form.match(line):
            predicate, name, operands = found.groups()
            kind = name.split(".")[0]
            jumps = kind in JUMPS
            if name.startswith("BRA.DIV"):  # taken by a warp whose threads have parted: none in Triton's code
                jumps = False
            falls = bool(predicate) or kind not in ENDS or kind == "BRA" and not operands.startswith("`")
            if predicate == "!PT":
                name = "NOP"  # never runs: LDS RZ, [RZ], a workaround before a fence
            elif descriptor := re.search(r"idesc\[(\w+)\]", operands):
                name = name_tcgen05(name, constants.get(descriptor[1], 0))
            ops.append(Op(name, operands.strip(), re.findall(r"\.L\w+", operands) if jumps else [], falls))
            written, _, value = ops[-1].operands.partition(", ")
            constants[written] = int(value, 16) if name == "UMOV" and value.startswith("0x") else 0
    return ops, labels


def name_tcgen05(name: str, descriptor: int) -> str:
    """UTCHMMA -> UTCHMMA.128x64x16.F32. The shape is in the instruction descriptor (PTX ISA, tcgen05), a constant that
    was moved into a uniform register before; the name stays as it is where that was done in another way."""
    m, n, a = (descriptor >> 24 & 31) * 16, (descriptor >> 17 & 63) * 8, descriptor >> 7 & 7
    if m not in (64, 128, 256) or not n:
        return name
    k, operand = {1: (16, ".BF16"), 2: (8, ".TF32")}.get(a, (16, "")) if name.startswith("UTCHMMA") else (32, "")
    return f"{name}.{m}x{n}x{k}.{('F16', 'F32', 'S32', '')[descriptor >> 4 & 3]}{operand}"


def reach(start: list[int], edges: dict[int, list[int]], without: int | None = None) -> set[int]:
    seen, todo = {without}, list(start)
    while todo:
        if (i := todo.pop()) not in seen:
            seen.add(i)
            todo += edges[i]
    return seen - {without}


def find_loops(ops: list[Op], labels: dict[str, int]) -> list[Loop]:
    successors = {i: [labels[t] for t in op.targets if t in labels] + [i + 1] * (op.falls and i + 1 < len(ops))
                  for i, op in enumerate(ops)}
    alive = reach([0], successors)
    predecessors = {i: [] for i in alive}
    for i in alive:
        for s in successors[i]:
            predecessors[s].append(i)
    bodies = []
    for head in sorted(alive & set(labels.values())):
        elsewhere = reach([0], successors, head)
        if tails := [i for i in predecessors[head] if i not in elsewhere]:
            bodies.append({head} | reach(tails, predecessors, head))
    mma = {i for i in alive if TENSOR.match(ops[i].name)}
    starts = set(labels.values()) | {i + 1 for i, op in enumerate(ops) if op.targets}
    block = list(accumulate(i in starts for i in range(len(ops))))  # number of the basic block
    single = {block[i] for i in mma if ops[i].name.startswith("UTC")}
    return [Loop(Counter(ops[i].name for i in body), not any(other < body and other & mma for other in bodies),
                 sum(block[i] in single for i in body)) for body in bodies]


def analyse(compiled) -> Report:
    meta, arch = compiled.metadata, compiled.metadata.target.arch
    warps, shared, tmem = meta.num_warps, meta.shared, getattr(meta, "tmem_size", 0) or 0
    usage = cubin_tool(compiled, knobs.nvidia.cuobjdump, "-res-usage")
    registers, stack = (int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    sm_shared, block_shared, sm_warps, sm_blocks = NVIDIA[arch]
    by_registers = 65536 // (-(-registers // 8) * 8 * 32) // 4 * 4 // warps  # given out by 8, and to 4 warps
    fit = [by_registers, sm_shared * 1024 // (shared + 1024), sm_warps // warps, sm_blocks, 512 // max(tmem, 1)]
    most = {"registers": (registers, 255), "shared memory": (shared, block_shared * 1024),
            "threads": (32 * warps, 1024), "tensor memory": (tmem, 512)}
    limits = [f"{name}: {used} of {limit}" for name, (used, limit) in most.items() if used > limit]
    if by_registers < 1:
        limits.append(f"registers: {registers} a thread in {warps} warps")
    ops, labels = assembly(compiled)
    wgmma, arrive = sum("GMMA" in op.name for op in ops), sum(op.name == "WARPGROUP.ARRIVE" for op in ops)
    return Report(registers, stack, shared, 0 if limits else min(fit), limits,
                  find_loops(ops, labels), 0 < wgmma <= arrive)
