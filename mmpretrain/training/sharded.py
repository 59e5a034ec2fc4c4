"""Lightning's side of fully sharded training (FSDP2): its checkpoints are ours, each rank writing its own parts."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch.optim import Optimizer

from mmpretrain.errors import InputError
from mmpretrain.training.manifest import DamagedCheckpoint, verify
from mmpretrain.training.saving import SafeCheckpointIO
from mmpretrain.training.sharded_state import load_sharded, save_sharded

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others while a checkpoint is planned and written."""


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 with checkpoints of our own format; needs `SafeCheckpointIO` among the trainer's plugins.

    `data_parallel_size`: copies of the model (nodes); `tensor_parallel_size`: ranks each is sharded over, as Lightning
    calls the two dimensions of its mesh. Saving has a gloo group of its own, so that the background thread's messages
    never meet those of training.
    """

    def __init__(self, data_parallel_size: int | str = "auto", tensor_parallel_size: int | str = "auto") -> None:
        super().__init__(data_parallel_size, tensor_parallel_size)  # type: ignore[arg-type]

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Optimizers are restored from the loaded state, as everywhere else."""
        return True

    def setup_environment(self) -> None:
        """Start the processes, and the group that saves."""
        super().setup_environment()
        io = self.checkpoint_io
        if not isinstance(io, SafeCheckpointIO):
            raise InputError("fully sharded training needs mmpretrain's SafeCheckpointIO in trainer.plugins")
        io.writer = partial(save_sharded, group=dist.new_group(backend="gloo", timeout=TIMEOUT))

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the model's state, each rank its own shards."""
        return ParallelStrategy.lightning_module_state_dict(self)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load sharded weights into the model."""
        ParallelStrategy.load_model_state_dict(self, checkpoint, strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's state, each rank its own shards."""
        return ParallelStrategy.optimizer_state(self, optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load sharded optimizer state."""
        ParallelStrategy.load_optimizer_state_dict(self, checkpoint)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Save on every rank, into the folder that rank 0 names."""
        self.checkpoint_io.save_checkpoint(checkpoint, self.broadcast(str(filepath)))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load what rank 0 names, each rank its own shards; raises `DamagedCheckpoint` on every rank."""
        path = Path(self.broadcast(str(checkpoint_path)))
        problem = None
        if self.is_global_zero:
            try:
                verify(path)
            except DamagedCheckpoint as error:
                problem = str(error)
        problem = self.broadcast(problem)
        if problem is not None:
            raise DamagedCheckpoint(problem)
        return load_sharded(path, self.device_mesh)

    def teardown(self) -> None:
        """End the background thread, too."""
        self.checkpoint_io.teardown()
        super().teardown()
