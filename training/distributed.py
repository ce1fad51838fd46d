"""Training with several processes: their communication, and the distribution of the model over them.

A run started by torchrun is the same as one with a single process: every process computes its part of the same
batch, and the gradients are averaged. ``ddp`` keeps a whole copy of everything in each process. ``fsdp`` keeps one
slice of weights, gradients, averages and optimizer state in each process, and gathers the weights of one block at a
time where they are needed (Zhao et al. 2023, arXiv:2304.11277; Rajbhandari et al. 2020). ``hybrid`` does so within
groups of ``shards`` processes, and each group has its own copy.
"""
import contextlib
import datetime
import itertools
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from model.attention import CrossAttention
from model.unet import Level

Parallel = Literal["ddp", "fsdp", "hybrid"]

# How long processes wait for each other: while the main one fills a cache, and while it validates and samples. If a
# process dies, its connections break, and the job ends at once whatever these limits are.
LONG, PATIENCE = datetime.timedelta(days=30), datetime.timedelta(hours=2)
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "NCCL",
        "Socket Timeout", "Timed out waiting", "failed to recv", "connectFullMesh", "unhandled system error")


class ProcessLost(RuntimeError):
    """Another process of this job has ended, so this one cannot continue."""


@dataclass(frozen=True)
class Processes:
    """This process is number ``rank`` of ``world`` processes, and number ``local_rank`` of ``local_world`` on its
    machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    store: Any = None
    turns: Iterator[int] = field(default_factory=itertools.count)  # numbers the messages, equally in all processes

    @property
    def main(self) -> bool:
        """Whether this is the main process, which writes files and prints messages."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values``, of any shape, over all processes, computed in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process; every process gets the same answer."""
        return bool(self.sum(torch.tensor(int(flag)))) if self.world > 1 else flag

    def wait(self) -> None:
        """Wait until every process has called this."""
        if self.world > 1:
            self.any(False)

    def from_main(self, value: Any = None) -> Any:
        """The ``value`` of the main process, plain data, in every process. The wait has no time limit: if the main
        process dies, torchrun ends the others."""
        if self.world == 1:
            return value
        name = f"from_main/{next(self.turns)}"
        if self.main:
            self.store.set(name, json.dumps(value))
            return value
        self.store.wait([name], LONG)
        return json.loads(self.store.get(name))

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block in the main process first and then in the others, which find the files that it made."""
        if not self.main:
            self.from_main()
        yield
        if self.main:
            self.from_main()

    def device(self) -> torch.device:
        """The GPU of this process if there are GPUs, else the CPU."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank) if self.world > 1 else torch.device("cuda")


ALONE = Processes()


@contextlib.contextmanager
def process_group() -> Iterator[Processes]:
    """This process among those that torchrun started, or alone. Raises ProcessLost in place of the errors of a broken
    connection, because another process has ended."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    # a filter of one pixel has two equal orders in memory; DDP warns of it at every start, but it costs nothing here
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        store, rank, world = next(rendezvous("env://"))
        # after a restart the store still holds the addresses of the former processes
        store = dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
        processes = Processes(rank, world, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", world)), store)
        yield processes
        processes.wait()  # the store may end with the main process
    except (RuntimeError, OSError) as error:
        if not any(word in str(error) for word in LOST):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun is about to send it; the line below comes first
        raise ProcessLost(f"process {rank} of {world} has lost another one ({str(error).splitlines()[0][:120]}); see "
                          "above for why that one ended; the same command goes on from the last checkpoint") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def leave() -> None:
    """End a program that torchrun started, after its work is done and its group is closed. Threads of the connections
    may abort the interpreter during its shutdown ("terminate called without an active exception"), and torchrun would
    restart a finished job."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class Loss(nn.Module):
    """A model together with its loss: ``forward`` calls ``loss_at``, so that wrappers see a single module."""

    def __init__(self, model: nn.Module, loss_at: Any):
        super().__init__()
        self.model, self.loss_at = model, loss_at

    def forward(self, *arguments: Any) -> dict[str, Tensor]:
        """``loss_at(model, *arguments)``."""
        return self.loss_at(self.model, *arguments)


def distribute(loss: Loss, parallel: Parallel, shards: int, processes: Processes, device: torch.device) -> nn.Module:
    """The module to call in every process for the ``loss``; ``fsdp`` and ``hybrid`` change its model in place.

    Under ``hybrid`` ``shards`` processes hold one copy; 0 stands for the number of processes on one machine. Raises
    ValueError if it does not divide the number of processes.
    """
    if parallel == "ddp":
        if processes.world == 1:
            return loss
        return DistributedDataParallel(loss, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh  # these imports take 0.7 s, so they are made only here
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():  # one process is sharded by the same code into the same files
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0,
                                world_size=1)
    shape: tuple[int, ...] = (processes.world,)
    if parallel == "hybrid":
        shards = shards or processes.local_world
        if processes.world % shards:
            raise ValueError(f"shards: {shards} for {processes.world} processes; valid: a divisor of {processes.world}")
        shape = (processes.world // shards, shards)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape):])
    for parameter in loss.parameters():  # only in this order is a slice of rows one piece of memory
        parameter.data = parameter.data.contiguous()
    for unit in sharding_units(loss.model):
        fully_shard(unit, mesh=mesh)  # type: ignore[arg-type]
    fully_shard(loss, mesh=mesh)
    return loss


def sharding_units(model: nn.Module) -> list[nn.Module | list[nn.Module]]:
    """The parts whose weights are gathered at a time: first, as one part, the layers that act on the context, since the
    UNet computes all keys and values before its first block, then each block of a list. Whole levels of the UNet are
    not used, because they pass on a list that the hooks of PyTorch would copy."""
    contexts: list[nn.Module] = [part.kv for part in model.modules() if isinstance(part, CrossAttention)]
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)
             and not any(isinstance(block, Level) for block in part)]
    inner = {id(part) for outer in lists for part in outer.modules() if part is not outer}
    blocks = [block for outer in lists if id(outer) not in inner for block in outer]
    return [*([contexts] if contexts else []), *(block for block in blocks if any(True for _ in block.parameters()))]


@contextlib.contextmanager
def skip_gradient_sync(module: nn.Module, skip: bool) -> Iterator[None]:
    """Inside this block, if ``skip``, gradients accumulate in this process only, which is right for all but the last
    part of a batch."""
    if isinstance(module, DistributedDataParallel):
        with module.no_sync() if skip else contextlib.nullcontext():
            yield
        return
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(not skip)  # type: ignore[operator]
    yield


def local_slice(tensor: Tensor) -> Tensor:
    """The slice of a tensor that this process holds; it shares the memory of the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, in every process; all processes must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def slice_like(whole: Tensor, like: Tensor) -> Tensor:
    """The slice of ``whole``, which every process has, that belongs to this process if it is distributed like
    ``like``."""
    if not hasattr(like, "device_mesh"):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    copies = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return copies.redistribute(mesh, placements).to_local()
