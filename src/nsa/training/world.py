"""The processes of one training run, as torchrun starts them: which holds what, and one line where one fails."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import DeviceMesh, init_device_mesh

from nsa.distributed import ZigZag
from nsa.training.config import TrainConfig
from nsa.training.folder import last_checkpoint

T = TypeVar("T")
OWN = ("cache_dir",)  # what each process may have its own of
PATIENCE = timedelta(hours=2)  # the first process of a node may train a tokenizer while the others wait


def launched() -> int:
    """Processes that torchrun, or what does as it does, has started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def mesh_shape(config: TrainConfig, size: int) -> tuple[int, int, int, int]:
    """How many processes replicate, shard, share sequences, and share heads.

    Raises:
        ValueError: flags that do not divide the processes, batches, heads or rows.
    """
    replicate, cp, tp = config.dp_replicate, config.cp, config.tp
    shard = config.dp_shard or max(1, size // (replicate * cp * tp))
    if replicate * shard * cp * tp != size:
        flags = f"--dp-replicate {replicate} --dp-shard {config.dp_shard or 'any'} --cp {cp} --tp {tp}"
        wanted = f"{replicate * shard * cp * tp}" if config.dp_shard else f"a multiple of {replicate * cp * tp}"
        raise ValueError(
            f"{flags} need {wanted} processes, got {size}; start them with torchrun --nproc-per-node N -m nsa train"
        )
    if config.accumulation % (replicate * shard):
        raise ValueError(
            f"--accumulation: a step's forward passes are divided among {replicate * shard} ranks of data parallelism; "
            f"expected a multiple of {replicate * shard}, got {config.accumulation} (with a smaller --batch-tokens as "
            "many tokens make more of them)"
        )
    if config.num_kv_heads % tp:
        raise ValueError(
            f"--tp: expected a divisor of the {config.num_kv_heads} KV heads (num_kv_heads), each of which one rank "
            f"holds, got {tp}"
        )
    if config.compile and tp > 1:
        raise ValueError(
            f"--compile: torch.compile does not trace layers whose heads several ranks share; expected --tp 1, or "
            f"--no-compile, got --tp {tp}"
        )
    shortest = min(stage.length for stage in config.stages)
    if cp > 1 and shortest < 2 * cp:
        raise ValueError(
            f"--cp: each rank holds two chunks of every row, at least a token each; expected rows of {2 * cp} tokens "
            f"or more, got a stage of {shortest}"
        )
    return replicate, shard, cp, tp


@dataclass(frozen=True)
class World:
    """What this process knows of the others.

    mesh: dp_replicate x fsdp x tp; parameters are sharded over fsdp, which is dp_shard x cp.
    contexts: dp_replicate x dp_shard x cp x tp, the same processes.
    """

    mesh: DeviceMesh
    contexts: DeviceMesh
    store: dist.Store

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def size(self) -> int:
        return dist.get_world_size()

    @property
    def is_main(self) -> bool:
        """Whether this one writes what is written once."""
        return self.rank == 0

    @property
    def dp(self) -> int:
        """Ranks, or groups of them, that have batches of their own."""
        return self.contexts.size(0) * self.contexts.size(1)

    @property
    def dp_rank(self) -> int:
        return self.contexts.get_local_rank(0) * self.contexts.size(1) + self.contexts.get_local_rank(1)

    @property
    def zigzag(self) -> ZigZag | None:
        """This rank's part of each sequence; None where it has all of it."""
        cp = self.contexts["cp"]
        return ZigZag(cp.get_local_rank(), cp.size()) if cp.size() > 1 else None

    def any(self, flag: bool) -> bool:
        """Whether it is true on some rank."""
        told = torch.tensor(int(flag))
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return bool(told)

    def wait(self) -> None:
        """Until all are here; on the host."""
        self.any(False)

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on the main rank, where alone it is called; its error there, which that rank tells."""
        told: list[Any] = [None, False]
        try:
            if self.is_main:
                told = [make(), True]
        finally:  # the others do not wait for what does not come
            dist.broadcast_object_list(told)
        if not told[1]:
            raise SystemExit(2)
        return told[0]

    def main_first(self, make: Callable[[], T]) -> T:
        """make() on the first rank of each node, then on the others, which find what it has left on the disk."""
        is_first = int(os.environ.get("LOCAL_RANK", "0")) == 0
        made = make() if is_first else None
        self.wait()
        return made if is_first else make()  # type: ignore[return-value]

    def agree(self, name: str, value: Any, what: Callable[[Any, Any], str]) -> None:
        """ValueError where a rank has another value than the main one, which tells it; `what` says how both differ."""
        _agree(self.store, self.rank, self.size, name, value, what)


@contextmanager
def joined(config: TrainConfig) -> Iterator[World]:
    """Inside, the processes of a run know each other; an error of one is told by one of them, and ends all.

    Raises:
        ValueError: flags that do not divide the processes, or are not alike on all of them.
        OSError: another process has ended without a word.
        SystemExit: another rank tells what went wrong.
    """
    size, rank = launched(), int(os.environ.get("RANK", "0"))
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store: dist.Store = dist.HashStore() if "RANK" not in os.environ else next(iter(dist.rendezvous("env://")))[0]
    with _told_once(store, rank, config):
        try:
            config.validate()
            replicate, shard, cp, tp = mesh_shape(config, size)
            values = {name: value for name, value in config.to_dict().items() if name not in OWN}
            _agree(store, rank, size, "flags", values, _other_flags)
            # CPU tensors too: flags and objects do not wait for the device.
            backend, device = ("cpu:gloo,cuda:nccl", "cuda") if on_gpu else ("gloo", "cpu")
            group = dist.PrefixStore("nsa", store)
            dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=PATIENCE)
            mesh = init_device_mesh(device, (replicate, shard * cp, tp), mesh_dim_names=("dp_replicate", "fsdp", "tp"))
            contexts = init_device_mesh(
                device, (replicate, shard, cp, tp), mesh_dim_names=("dp_replicate", "dp_shard", "cp", "tp")
            )
            yield World(mesh, contexts, store)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


@contextmanager
def _told_once(store: dist.Store, rank: int, config: TrainConfig) -> Iterator[None]:
    """Of the errors that follow from one, the first is told."""
    try:
        yield
    except Exception as error:
        if not _is_first(store, rank):
            raise SystemExit(2) from None
        if not _is_of_others(error):
            raise
        last = last_checkpoint(config.out)
        hope = f"{last} is whole, continue with --resume" if last else "no checkpoint was written yet"
        raise OSError(f"rank {rank} lost another process of this run; {hope}") from error
    except KeyboardInterrupt:
        if not _is_first(store, rank):
            raise SystemExit(130) from None
        raise


def _is_first(store: dist.Store, rank: int) -> bool:
    """Whether no other rank has claimed to tell what went wrong."""
    try:
        return store.compare_set("told", "", str(rank)).decode() == str(rank)
    except Exception:  # whoever kept the store is gone
        return True


def _is_of_others(error: Exception) -> bool:
    """Whether it says that another process does not answer any more."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _agree(store: dist.Store, rank: int, size: int, name: str, value: Any, what: Callable[[Any, Any], str]) -> None:
    store.set(f"{name}/{rank}", json.dumps(value))
    if rank == 0:
        others = (json.loads(store.get(f"{name}/{other}")) for other in range(size))
        told = (f"rank {other} was started with {what(x, value)}" for other, x in enumerate(others) if x != value)
        store.set(name, next(told, ""))
    if verdict := store.get(name).decode():
        store.set(f"{name}/heard/{rank}", "")
        if rank:
            raise SystemExit(2)
        for other in range(size):  # the store goes with this process
            store.get(f"{name}/heard/{other}")
        raise ValueError(verdict)


def _other_flags(theirs: dict[str, Any], own: dict[str, Any]) -> str:
    changed = [f"{name}: {theirs.get(name)!r}, there {own[name]!r}" for name in own if own[name] != theirs.get(name)]
    return f"another configuration than rank 0 ({'; '.join(changed)})"
