"""What a DeepSpeed config says of the optimizer that DeepSpeed makes of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from clantune_scale.config.deepspeed_limits import NO_VALIDATION_GRADIENTS
from clantune_scale.config.deepspeed_values import AUTO, block_of, is_number, number_of
from clantune_scale.config.default_genes import ADAMW
from clantune_scale.core.line import DecayRule

_DECOUPLED = (ADAMW, "lion")


class ConfiguredOptimizer:
    """The optimizer of a config. A script's own, of which a config says nothing, counts as AdamW.

    Args:
        ds_config: a DeepSpeed config.

    Attributes:
        rule: its update rule, as :func:`~clantune_scale.config.default_genes.update_rule` names it.
    """

    def __init__(self, ds_config: Mapping[str, Any]) -> None:
        block = ds_config.get("optimizer")
        self._is_known = isinstance(block, Mapping)
        self._block: Mapping[str, Any] = block if isinstance(block, Mapping) else {}
        kind = str(self._block.get("type", ADAMW)).lower()
        # DeepSpeed's "Adam" decays as AdamW does unless it is told not to.
        is_decoupled = kind == "adam" and self._params.get("adam_w_mode", True)
        self.rule = ADAMW if is_decoupled or not self._is_known else kind

    def weight_decays(self, groups: Iterable[Mapping[str, Any]]) -> list[float]:
        """[groups] weight decays. A script's own optimizer may have some.

        Args:
            groups: the model's parameter groups, each with or without a value of its own.
        """
        if not self._is_known:
            return [1.0]
        # DeepSpeed's own have no decay by default, torch's AdamW has 0.01.
        common = self._params.get("weight_decay", 0.01 if self._params.get("torch_adam") else 0.0)
        decays = [group.get("weight_decay", common) for group in groups]
        # Whoever fills in "auto" may fill in some. What is no number is an error elsewhere.
        return [float(decay) if is_number(decay) else float(decay == AUTO) for decay in decays]

    def decay_rules(self) -> list[DecayRule | None]:
        """One rule for all groups; None if it is not known to be linear in the decay."""
        if self.rule in _DECOUPLED or self._params.get("decoupled_weight_decay"):
            return [DecayRule()]
        if self.rule == "sgd":
            momentum, dampening = (float(number_of(self._params, key, 0.0)) for key in ("momentum", "dampening"))
            return [DecayRule(momentum, dampening, bool(self._params.get("nesterov", False)))]
        return [None]

    def validation_gradients(self) -> str:
        """Why an engine that a DeepSpeed config describes has none."""
        return NO_VALIDATION_GRADIENTS

    def optimizer_name(self) -> str:
        """The type that the config names."""
        return str(self._block.get("type", "the script's optimizer"))

    @property
    def _params(self) -> Mapping[str, Any]:
        return block_of(self._block, "params")
