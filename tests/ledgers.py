"""What is held in memory, counted while it runs: for tests that compare it with a formula."""

from collections import defaultdict

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Largest(TorchDispatchMode):
    """numel: the most elements of any tensor of this dtype that an operation returned."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.numel = dtype, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor) and x.dtype == self.dtype]
        self.numel = max(self.numel, *made, 0)
        return out


def holdings(sync, optimizer) -> dict:
    """The tensors of model states that are there now: {"parameters", "gathered": rows of stage 3, "gradients": shards
    (at stage 1 whole ones too), "buckets": gradients on their way, "arriving": just made by autograd, "states"}."""
    stage1, stage3 = getattr(sync, "stage", 3) == 1, hasattr(sync, "units")
    buckets = sync.units if stage3 else sync.buckets
    rows = [row for bucket in buckets for row in (bucket.grads, bucket.sending)]
    parts = {"parameters": [bucket.weights for bucket in buckets],
             "gathered": [unit.row for unit in buckets if stage3],
             "gradients": [bucket.total for bucket in buckets] + [shard.grad for shard in sync.shards.values()]
             + rows * stage1,
             "buckets": [x for bucket in buckets for x in (bucket.received, bucket.out)] + rows * (not stage1),
             "arriving": [p.grad for p in sync.bucket_of],
             "states": [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]}
    return {kind: [x for x in tensors if x is not None] for kind, tensors in parts.items()}


class MemoryLedger(TorchDispatchMode):
    """Inside, after every operation of this thread, in backward and hooks too, the bytes of tensors' storages are added
    up: peak has the most of each kind, and of all together. holdings: () -> {kind: tensors}; a storage counts once, for
    the first kind that has it."""

    def __init__(self, holdings):
        super().__init__()
        self.holdings, self.peak = holdings, defaultdict(int)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        seen, total = set(), 0
        for kind, tensors in self.holdings().items():
            sizes = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
            new_bytes = sum(n for key, n in sizes.items() if key not in seen)
            seen |= sizes.keys()
            self.peak[kind], total = max(self.peak[kind], new_bytes), total + new_bytes
        self.peak["total"] = max(self.peak["total"], total)
        return out
