"""Replaying a schedule in a run without a clan: a learning-rate scheduler for PyTorch and DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from clantune_scale.core import decay
from clantune_scale.core.genome import GROUP_KEYS, chosen_groups, replaces_schedule
from clantune_scale.core.schedule import ClanSchedule


class ClanScheduleLR(LRScheduler):
    """A clan's schedule as a learning-rate scheduler of PyTorch.

    The step after n completed ones trains at ``base rate x gene(n) x min(own(n), own(f) x lr_factor(n))``, where the
    final decay starts at f. If the gene is absolute, it trains at ``gene(n) x lr_factor(n)``. The order of factors is
    the clan's, so that equal rates are equal to the last bit. Weight decay, betas, momentum and eps are set
    in the groups that their genes name. Relative genes multiply what a group held when the scheduler was made. The
    scheduler's state is one integer.

    For DeepSpeed, pass ``lr_scheduler=lambda optimizer: ClanScheduleLR(optimizer, schedule)``.

    Args:
        optimizer: whose groups it writes.
        schedule: what ``clantune schedule`` gives.
        own: your own schedule as a factor of the base rate by step, as in ``LambdaLR``: what the clan's run had
            beside its genes; 1 if None.
        last_epoch: completed steps less one where training resumes, as for every scheduler of PyTorch.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        schedule: ClanSchedule,
        *,
        own: Callable[[int], float] | None = None,
        last_epoch: int = -1,
    ) -> None:
        self._schedule = schedule
        self._genes = [gene for gene in schedule.described_genes if gene.target in GROUP_KEYS]
        self._own = own
        if last_epoch == -1:
            for group in optimizer.param_groups:
                for key in {GROUP_KEYS[gene.target][0] for gene in self._genes} & group.keys():
                    # Kept in the group, as torch keeps initial_lr, so that the optimizer's state carries it.
                    group.setdefault(f"initial_{key}", group[key])
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        """The learning rates of the next step; writes the other genes' values into their groups."""
        rates = []
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            values = self._values(group, self._scheduled(base, self.last_epoch))
            rates.append(values.pop("lr") * self._rate_factor(group, base) * self._schedule.rate_factor)
            group.update(values)
        return rates

    def state_dict(self) -> dict[str, int]:
        """The one integer from which all values follow."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Goes to a saved step and writes its values."""
        self.last_epoch = state_dict["last_epoch"] - 1
        self._update_lr()

    def _scheduled(self, base: Any, step: int) -> Any:
        """A group's learning rate by your own schedule."""
        return base if self._own is None else base * self._own(step)

    def _rate_factor(self, group: Mapping[str, Any], base: Any) -> float:
        """The final decay's factor on a group's learning rate."""
        step, start = self.last_epoch, self._schedule.decay_start_step
        factor = self._schedule.lr_factor_at(step)
        if replaces_schedule(self._genes, group, self.optimizer.param_groups):
            return factor
        reference = self._scheduled(base, step if start is None else min(step, start))
        return decay.under_ceiling(factor, reference=float(reference), scheduled=float(self._scheduled(base, step)))

    def _values(self, group: Mapping[str, Any], rate: Any) -> dict[str, Any]:
        """What the genes make of a group's first values; genes on one target follow one another, as in the clan."""
        values: dict[str, Any] = {"lr": rate}
        for gene in self._genes:
            key, place = GROUP_KEYS[gene.target]
            chosen = chosen_groups(self.optimizer.param_groups, gene.groups)
            if key not in group or not any(group is one for one in chosen):
                continue
            held = values.get(key, group[f"initial_{key}"])
            value = self._schedule.value_at(gene.name, self.last_epoch)
            if place is None:
                values[key] = held * value if gene.relative else value
            else:
                wanted = held[place] * value if gene.relative else value
                values[key] = tuple(wanted if index == place else other for index, other in enumerate(held))
        return values
