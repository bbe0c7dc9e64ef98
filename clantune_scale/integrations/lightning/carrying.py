"""The clan in the Trainer's checkpoints: in the callback's state, or in files beside sharded weights."""

from __future__ import annotations

import copy
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy

from clantune_scale.backends.torch.loop_clan import LoopClan
from clantune_scale.errors import CheckpointError
from clantune_scale.gradients.hooks import replace_method
from clantune_scale.integrations import common


class Carrier:
    """Takes the clan into checkpoints, and out of the one that a run goes on from.

    If each rank holds the whole model, the callback's state holds the clan. If ranks hold shards, each writes a file of
    its own, into a folder ``clan``: in the checkpoint if that is a folder, else in ``NAME.parts`` beside it.
    """

    def __init__(self) -> None:
        self._clan: LoopClan | None = None
        self._loaded: dict[str, Any] | None = None
        self._is_pending = self._is_sharded = False
        self._undo: list[Callable[[], None]] = []

    def follow(self, trainer: Trainer, clan: LoopClan) -> None:
        """From here on checkpoints hold the clan."""
        self._clan, self._loaded = clan, None
        strategy = trainer.strategy
        self._is_sharded = isinstance(strategy, ModelParallelStrategy | DeepSpeedStrategy)
        if not self._is_sharded:
            return
        save, remove = strategy.save_checkpoint, strategy.remove_checkpoint

        def save_with_clan(checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
            save(checkpoint, filepath, storage_options)
            if self._is_pending:  # else only weights are saved
                self._is_pending = False
                # Ranks may have made different names for one checkpoint: the first rank's counts.
                common.save(clan, _place_of(Path(strategy.broadcast(filepath))))

        def remove_with_clan(filepath: Any) -> None:
            remove(filepath)
            if strategy.is_global_zero:
                shutil.rmtree(_beside(Path(filepath)), ignore_errors=True)

        self._undo = [
            replace_method(strategy, "save_checkpoint", save_with_clan),
            replace_method(strategy, "remove_checkpoint", remove_with_clan),
        ]

    def state_dict(self) -> dict[str, Any]:
        """For the callback's state (a collective of all ranks, between two optimizer steps); empty without a clan."""
        if self._clan is None:
            return {}
        if not self._is_sharded:
            return of_ranks(self._clan.state_dict())
        self._is_pending = True
        return {"num_ranks": dist.get_world_size()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` returned."""
        self._loaded = state

    def check(self, trainer: Trainer) -> None:
        """Refuses a checkpoint that the clan cannot go on from, before it is attached.

        Raises:
            CheckpointError: if it holds no clan, or was saved on another number of ranks.
        """
        path, state = trainer.ckpt_path, self._loaded
        if path is not None and state is None:
            raise CheckpointError(
                f"{path} holds no clan: it was saved without one. Resume from another checkpoint; or, to begin a clan "
                f"with its weights, load them into the module and call fit() without ckpt_path."
            )
        if state is not None and state["num_ranks"] != trainer.world_size:
            raise CheckpointError(
                f"{path} was saved on {state['num_ranks']} ranks and this launch has {trainer.world_size}, among which "
                f"a clan's state is not divided anew. Launch with {state['num_ranks']} ranks."
            )

    def load(self, trainer: Trainer, clan: LoopClan) -> None:
        """Goes on from the checkpoint that the Trainer has loaded, if there is one."""
        state, self._loaded = self._loaded, None
        if state is None:
            return
        if "ranks" in state:
            clan.load_state_dict(from_ranks(state), source=str(trainer.ckpt_path))
        else:
            common.load(clan, _place_of(Path(str(trainer.ckpt_path))))

    def release(self) -> None:
        """Ends the following: checkpoints that come later hold no clan."""
        while self._undo:
            self._undo.pop()()
        self._clan = self._loaded = None


def _place_of(checkpoint: Path) -> Path:
    """The folder in which a clan's folder lies."""
    return checkpoint if checkpoint.is_dir() else _beside(checkpoint)


def _beside(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}.parts")


#: Where the clan's state holds tensors that are equal on ranks that hold the whole model.
_EQUAL = (("tensors",), ("phase", "tensors"), ("rollback", "tensors"), ("turns", "start", "tensors"))


def of_ranks(own: dict[str, Any]) -> dict[str, Any]:
    """What one checkpoint holds of all ranks, each of which holds the whole model (a collective of all ranks).

    Args:
        own: this rank's state.

    Returns:
        The first rank's tensors once, and each rank's rest as bytes.
    """
    rest, tensors = dict(own), {}
    for *above, last in _EQUAL:
        place = rest
        for key in above:
            # Copied on the way: the clan goes on with what it gave.
            place[key] = copy.copy(place.get(key) or {})
            place = place[key]
        if last in place:
            tensors["/".join([*above, last])] = place.pop(last)
    written = io.BytesIO()
    torch.save(rest, written)
    parts = _gathered(torch.frombuffer(bytearray(written.getbuffer()), dtype=torch.uint8))
    return {"num_ranks": len(parts), "ranks": parts, "tensors": tensors}


def from_ranks(saved: dict[str, Any]) -> dict[str, Any]:
    """This rank's state in what :func:`of_ranks` returned."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    own = dict(torch.load(io.BytesIO(saved["ranks"][rank].cpu().numpy().tobytes()), weights_only=True))
    for name, tensors in saved["tensors"].items():
        *above, last = name.split("/")
        place = own
        for key in above:
            place = place[key]
        place[last] = tensors
    for key in ("phase", "rollback", "turns"):
        # Of a part that there was not, its empty place is left.
        own[key] = None if own[key] in ({}, {"start": {}}) else own[key]
    return own


def _gathered(mine: torch.Tensor) -> list[torch.Tensor]:
    """Each rank's bytes, of any length, in host memory."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([mine.numel()], device=device))
    padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8, device=device)
    padded[: mine.numel()] = mine.to(device)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [part[: int(size)].cpu().clone() for part, size in zip(parts, sizes, strict=True)]
