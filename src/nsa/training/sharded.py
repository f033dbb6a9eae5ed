"""A run of several processes: the model sharded over them, its batches divided, its checkpoints written by all.

    mesh: parameters over dp_shard x cp (FSDP2), copies of them over dp_replicate, heads over tp
    batches: pass i of a step belongs to rank i modulo dp; within it each rank of cp has its part of every sequence

A checkpoint holds the whole model and optimizer in pieces (torch.distributed.checkpoint), which any number of processes
put together again.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from nsa.distributed import ZigZag, context_parallel, tensor_parallel
from nsa.models import NSALlamaForCausalLM
from nsa.training.compiling import compile_between_hooks
from nsa.training.config import TrainConfig
from nsa.training.folder import MODEL_FILE, SHARDS, checkpoints
from nsa.training.stopping import all_finite
from nsa.training.trainer import WholeCheckpointTrainer
from nsa.training.world import World
from nsa.training.writing import Partial, in_pieces, put_in_place, reading


def shard_weights(model: nn.Module, mesh: DeviceMesh, *, in_bf16: bool, gather_once: bool) -> None:
    """FSDP2 over `mesh`, in place: a group a layer, the next one gathered while one computes, and one of the rest.

    Args:
        in_bf16: for a model under autocast to bf16: the layers' weights are rounded before they are gathered, not
            after, and half of the bytes are sent. What a rank owns, and sums of gradients, stay fp32.
        gather_once: keep what forward has gathered until backward, all of the weights at once.
    """
    low: dict[str, Any] = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32, "cast_forward_inputs": False}
    policy = MixedPrecisionPolicy(**low if in_bf16 else {})
    language_model: Any = model
    layers = language_model.model.layers
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=not gather_once)
    fully_shard(model, mesh=mesh)
    for layer, following in pairwise(layers):
        layer.set_modules_to_forward_prefetch([following])


def distribute(model: NSALlamaForCausalLM, world: World, config: TrainConfig, *, on_cpu: bool) -> None:
    """Shard the model in place; it takes this rank's parts of sequences from then on, where there are parts."""
    if (tp := world.mesh["tp"]).size() > 1:
        plan: dict[str, str] = model.config.base_model_tp_plan or {}
        tensor_parallel(model.model, tp, plan, model.config.num_key_value_heads)
    if world.zigzag is not None:
        context_parallel(model, world.contexts["cp"])
    model.to("cpu" if on_cpu else "cuda")
    names = ("dp_replicate", "fsdp") if world.mesh.size(0) > 1 else ("fsdp",)
    if config.compile:
        compile_between_hooks(model, on_cpu=on_cpu)
    is_bf16 = config.dtype == "bfloat16"
    shard_weights(model, world.mesh[names], in_bf16=is_bf16, gather_once=config.gather_once)
    # accelerate would make a second engine of it, for it knows of this one only by its own plugin.
    model._is_accelerate_prepared = True


class Parts(Dataset):
    """Of the batches of `whole` those of one rank of data parallelism, and of their sequences a rank's part."""

    def __init__(self, whole: Any, dp_rank: int, dp: int, zigzag: ZigZag | None) -> None:
        self.whole, self.dp_rank, self.dp, self.zigzag = whole, dp_rank, dp, zigzag

    def __len__(self) -> int:
        return len(self.whole) // self.dp

    def number_in_run(self, index: int) -> int:
        """Of a batch among those of `whole`."""
        return index * self.dp + self.dp_rank

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        batch = self.whole[self.number_in_run(index)]
        return batch if self.zigzag is None else self.zigzag.shard_batch(batch)


class ShardedTrainer(WholeCheckpointTrainer):
    """`WholeCheckpointTrainer` of a model that `distribute` has sharded."""

    def __init__(self, *, world: World, **kwargs: Any) -> None:
        self.world = world
        kwargs["train_dataset"] = Parts(kwargs["train_dataset"], world.dp_rank, world.dp, world.zigzag)
        # Evaluation is every rank's: its batches may be fewer than ranks.
        kwargs["eval_dataset"] = {name: Parts(x, 0, 1, world.zigzag) for name, x in kwargs["eval_dataset"].items()}
        super().__init__(ranks_with_tokens=world.size // world.contexts.size(3), **kwargs)

    # Data: accelerate's loaders would divide once more

    def _prepared(self, loader: DataLoader) -> DataLoader:
        return prepare_data_loader(
            loader, self.accelerator.device, num_processes=1, process_index=0, put_on_device=True,
            non_blocking=self.accelerator.non_blocking,
        )  # fmt: skip

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        dataset = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        return self._prepared(DataLoader(dataset, collate_fn=self.data_collator))

    # Passes

    def number_in_run(self, number: int) -> int:
        return self.train_dataset.number_in_run(number)

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args)
        if self.world.mesh["tp"].size() > 1:  # weights lie on meshes of their own, which no fused step takes together
            for group in optimizer.param_groups:
                group.update(fused=False, foreach=False)
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm = super()._clip_grad_norm(model)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    # Checkpoints

    def _all_finite(self, tensors: Any) -> bool:
        local = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
        return not self.world.any(not all_finite(local))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        with self.clock.paused():
            self._require_numbers()
            with self._partial(run) as parent:
                weights, optimizer = get_state_dict(self.model, self._torch_optimizer())
                with in_pieces():
                    dcp.save({"model": weights, "optimizer": optimizer}, checkpoint_id=parent / name / SHARDS)
                if self.world.is_main:
                    torch.save(self.lr_scheduler.state_dict(), parent / name / "scheduler.pt")
                    self.state.save_to_json(str(parent / name / "trainer_state.json"))
                    put_in_place(parent / name, run / name)
                self.world.wait()
            if self.world.is_main:
                for old in checkpoints(run)[: -(self.args.save_total_limit or 10**9)]:
                    shutil.rmtree(old, ignore_errors=True)

    def save_final(self, run: Path) -> None:
        self._require_numbers()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.model, options=options)
        for name in self.model.all_tied_weights_keys:  # which a file holds under one name
            weights.pop(name, None)
        with self._partial(run) as parent:
            if self.world.is_main:
                self._save(str(parent / "model"), state_dict=weights)
                for file in sorted((parent / "model").iterdir(), key=lambda file: file.name == MODEL_FILE):
                    os.replace(file, run / file.name)
            self.world.wait()

    @contextmanager
    def _partial(self, run: Path) -> Iterator[Path]:
        """The main rank's folder of what is being written, for all of them."""
        partial = Partial(run)
        if self.world.is_main:
            with partial as parent:
                self.world.wait()
                yield parent
        else:
            self.world.wait()
            try:
                yield partial.folder
            except Exception as error:
                partial.tell(error)
                raise

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        optimizer: Any = self.optimizer
        return getattr(optimizer, "optimizer", optimizer)  # out of accelerate's wrapper

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with reading(resume_from_checkpoint), in_pieces():
            weights = get_model_state_dict(self.model)
            dcp.load({"model": weights}, checkpoint_id=Path(resume_from_checkpoint) / SHARDS)
            set_model_state_dict(self.model, weights)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with reading(checkpoint), in_pieces():
            weights, optimizer = get_state_dict(self.model, self._torch_optimizer())
            dcp.load({"model": weights, "optimizer": optimizer}, checkpoint_id=Path(checkpoint) / SHARDS)
            set_state_dict(self.model, self._torch_optimizer(), model_state_dict=weights, optim_state_dict=optimizer)
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """There is none: what is drawn at random follows from the number of the pass."""
