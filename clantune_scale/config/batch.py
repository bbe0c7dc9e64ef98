"""The user's batch is the whole clan's: a member's share of it, by DeepSpeed's own arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from clantune_scale.config.deepspeed_values import AUTO
from clantune_scale.errors import ConfigError

TRAIN = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"
CLIPPING = "gradient_clipping"


@dataclass(frozen=True)
class BatchPlan:
    """Samples per optimizer step, and how they are split.

    Attributes:
        clan_batch: samples that all members train on together in a cooperative step.
        member_batch: a member's share, ``micro_batch x accumulation x dp_size``.
        micro_batch: samples of one forward pass on one rank.
        accumulation: micro-batches per optimizer step on one rank.
        dp_size: data-parallel ranks of one member.
        population_size: members.
        counted: how often DeepSpeed counts each data-parallel rank in its ``train_batch_size``.
    """

    clan_batch: int
    member_batch: int
    micro_batch: int
    accumulation: int
    dp_size: int
    population_size: int
    counted: int = 1

    @classmethod
    def of_members(cls, population_size: int, *, micro_batch: int, accumulation: int, dp_size: int) -> BatchPlan:
        """As many samples for each member as its engine takes in an optimizer step."""
        member_batch = micro_batch * accumulation * dp_size
        return cls(member_batch * population_size, member_batch, micro_batch, accumulation, dp_size, population_size)

    def describe(self) -> str:
        """One line for the terminal."""
        members = f" = {self.population_size} members x {self.member_batch}" if self.population_size > 1 else ""
        text = (
            f"batch {self.clan_batch}{members} "
            f"(micro-batch {self.micro_batch} x accumulation {self.accumulation} x dp {self.dp_size})"
        )
        if self.counted > 1:
            text += f"; as DeepSpeed counts, each tensor rank for itself, {TRAIN} is {self.clan_batch * self.counted}"
        return text


def split_batch(
    ds_config: Mapping[str, Any], *, population_size: int, dp_size: int, counted: int = 1
) -> tuple[dict[str, Any], BatchPlan]:
    """Divides the batch of a DeepSpeed config among the members.

    A key that is missing is derived as DeepSpeed derives it for ``population_size x dp_size`` ranks: the
    clan's batch is the one that the same config has in plain data parallelism on all ranks. With AutoTP,
    DeepSpeed's ``train_batch_size`` counts each tensor rank as if it read data of its own; the same config
    means the same here, and the plan has the samples that are really read.

    Args:
        ds_config: the config without the ``clantune`` block.
        population_size: members.
        dp_size: data-parallel ranks of one member.
        counted: how often DeepSpeed counts each of them: AutoTP's tensor degree, else 1.

    Returns:
        The config that a member's engine gets, with all three batch keys set (with AutoTP, without
        ``train_batch_size``, which then follows), and the plan.

    Raises:
        ConfigError: if a value is "auto" or not a positive whole number, no batch size is given, or
            something does not divide.
    """
    autos = [key for key in (TRAIN, MICRO, ACCUMULATION) if ds_config.get(key) == AUTO]
    if autos:
        raise ConfigError(
            f'{" and ".join(autos)} {"is" if len(autos) == 1 else "are"} "auto", which is filled in after the clan '
            f"divides the batch. Write a number."
        )
    train, micro, accumulation = (_read(ds_config, key) for key in (TRAIN, MICRO, ACCUMULATION))
    num_ranks = population_size * dp_size * counted
    ranks = f"population_size({population_size}) x dp({dp_size})" + (f" x tp({counted})" if counted > 1 else "")
    if micro is None:
        if train is None:
            raise ConfigError(f"the DeepSpeed config has neither {TRAIN} nor {MICRO}. Give one of them.")
        accumulation = accumulation or 1
        micro = _divide(train, accumulation * num_ranks, f"{ACCUMULATION}({accumulation}) x {ranks}")
    elif accumulation is None:
        accumulation = 1 if train is None else _divide(train, micro * num_ranks, f"{MICRO}({micro}) x {ranks}")
    product = micro * accumulation * num_ranks
    if train is not None and train != product:
        raise ConfigError(
            f"{MICRO}({micro}) x {ACCUMULATION}({accumulation}) x {ranks} = {product}, but {TRAIN} is {train}. "
            f"{TRAIN} counts the whole clan: set it to {product}, or drop one of the three."
        )
    plan = replace(
        BatchPlan.of_members(population_size, micro_batch=micro, accumulation=accumulation, dp_size=dp_size),
        counted=counted,
    )
    member_config = {**ds_config, TRAIN: plan.member_batch, MICRO: micro, ACCUMULATION: accumulation}
    if counted > 1:
        # DeepSpeed checks it twice under ZeRO 3, once with the tensor ranks counted and once without.
        del member_config[TRAIN]
    return member_config, plan


def with_arguments(
    settings: Mapping[str, Any], *, function: str, given: Mapping[str, tuple[str, float | None]]
) -> dict[str, Any]:
    """The settings of a config, completed by the keywords of the function that got the config.

    Args:
        settings: the config without the ``clantune`` block.
        function: that got both, for the message.
        given: by key of the config, the function's name for it and its value; None if the caller left it out.

    Raises:
        ConfigError: if a keyword contradicts the config, or neither of them says how many samples a pass takes.
    """
    merged = dict(settings)
    for key, (name, value) in given.items():
        written = settings.get(key)
        if value is None:
            continue
        # Who passes a number answers the "auto" that other libraries fill in.
        if written not in (None, AUTO, value):
            raise ConfigError(
                f"{function}() was given {name}={value}, and the config says {key}: {written}. Leave one of the two "
                f"out, or make them equal."
            )
        merged[key] = value
    if merged.get(TRAIN) is None and merged.get(MICRO) is None:
        raise ConfigError(
            f"nothing says how many samples a pass takes: {function}() got no {given[MICRO][0]}, and the config has "
            f"neither {MICRO} nor {TRAIN}. Give one of them."
        )
    return merged


def clipping_of(settings: Mapping[str, Any]) -> float | None:
    """The gradient-norm threshold of a config, 0 for none; None if the config does not say.

    Raises:
        ConfigError: if it is not a number of at least 0.
    """
    value = settings.get(CLIPPING)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ConfigError(f"{CLIPPING} is {value!r}. Set it to a number of at least 0; 0 is none.")
    return float(value)


def _read(ds_config: Mapping[str, Any], key: str) -> int | None:
    value = ds_config.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{key} is {value!r}. Set it to a whole number of at least 1.")
    return value


def _divide(train: int, divisor: int, factors: str) -> int:
    quotient, rest = divmod(train, divisor)
    if rest:
        lower, upper = quotient * divisor, (quotient + 1) * divisor
        choices = f"{lower} or {upper}" if lower else str(upper)
        raise ConfigError(
            f"{TRAIN} is {train}, the whole clan's, and {train} / ({factors}) = {train} / {divisor} "
            f"leaves a rest of {rest}. Set {TRAIN} to {choices}."
        )
    return quotient
