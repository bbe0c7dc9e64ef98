"""The ``clantune`` block of a DeepSpeed config: every key, its default and what it means.

``{"population_size": 4}`` is a complete block. The text under a field is its documentation; the table in
this folder's README is made from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationInfo, field_validator

from clantune_scale.core.genome import Consensus, Gene, Kind, Scale

if TYPE_CHECKING:
    from clantune_scale.core.strategies import RunFacts

# JSON has types of its own: "4", true and 4.0 are not a count, and reading them as one would hide a mistake.
Count = Annotated[int, Strict(), Field(ge=1, le=10**18)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Flag = Annotated[bool, Strict()]
Difference = Literal[
    "population_size", "round_length", "duty_cycle", "seed", "total_steps", "strategy", "genes", "fitness",
    "topology", "batch", "optimizer", "parameters", "nonfinite_mask", "members", "line",
]  # fmt: skip
ChampionForm = Literal["safetensors", "dcp", "deepspeed"]


class Block(BaseModel):
    """A part of the block: immutable, and no key that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class StrategyConfig(Block):
    """How fitness becomes the next population."""

    name: str = "clan"
    """`clan` (the best form known), `classic`, `pbt`, `hdet`, `halving`, `control` (no change), or `module:Class`."""

    options: dict[str, Any] = {}
    """Options of that strategy, by name."""


class GeneConfig(Block):
    """One gene; a key left out takes the default of its target."""

    target: str | None = None
    """What the gene sets; the part of its name before `:` if null."""

    groups: list[str] | None = None
    """Names of the optimizer's parameter groups that it is written to; all if null."""

    kind: Kind | None = None
    """`optimizer` (acts on how a gradient is applied) or `specialized` (acts on the gradient itself)."""

    scale: Scale | None = None
    """Scale in which it varies: `log`, `linear`, or `logit` for rates between 0 and 1."""

    bounds: tuple[Number, Number] | None = None
    """Lowest and highest value, both allowed."""

    initial: Number | None = None
    """First value of every member; null takes 1 for a relative gene and the engine's own value for another."""

    step_size: Annotated[Number, Field(gt=0)] | None = None
    """First standard deviation of a change, in scale units."""

    max_change: Annotated[Number, Field(gt=0)] | None = None
    """Largest move of the clan's value in one round, in scale units."""

    consensus: Consensus | None = None
    """The clan's one value while the gene is not expressed: `mean` or `median`, in scale."""

    integer: Flag | None = None
    """Whether the expressed value is rounded to a whole number."""

    mode: Literal["relative", "absolute"] | None = None
    """`relative` multiplies what the user's own schedule says, `absolute` replaces it."""

    @field_validator("bounds")
    @classmethod
    def _in_order(cls, bounds: tuple[float, float] | None) -> tuple[float, float] | None:
        if bounds is not None and not bounds[0] < bounds[1]:
            raise ValueError("the first bound should be below the second")
        return bounds


class FitnessConfig(Block):
    """What members are compared by: the mean loss on a common validation window."""

    num_samples: Count = 256
    """Samples in the window, the same for every member; spread evenly over `eval_data`."""

    batch_size: Count | None = None
    """Samples per forward pass on one rank; null takes the training micro-batch."""


class TrackingConfig(Block):
    """Where a run leaves its traces."""

    directory: Annotated[str, Field(min_length=1)] = "clan_runs"
    """Folder that holds one folder per run."""

    run_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.=+-]*$", max_length=200)] | None = None
    """Name of the run and its folder; null takes the date and time. A used folder gets a numbered sibling."""

    mlflow: Flag = True
    """Whether the run is logged to MLflow, if it is installed, beside the events file that is always written."""

    tracking_uri: str | None = None
    """MLflow's tracking URI; null takes `MLFLOW_TRACKING_URI`, then an SQLite file in `directory`."""

    experiment: Annotated[str, Field(min_length=1, max_length=500)] = "clantune"
    """MLflow experiment that the run belongs to."""

    system_metrics: Flag = False
    """Whether MLflow also gets processor, memory, network and GPU of rank 0's host."""

    print_every_steps: Count = 10
    """Optimizer steps between two lines on the terminal."""


class CheckpointConfig(Block):
    """What is kept of the weights, and of the whole run."""

    champion: list[ChampionForm] = ["safetensors"]
    """Forms in which the best member is kept: `safetensors`, `dcp`, `deepspeed` (to resume from); `false` for none."""

    champion_file_bytes: Count = 5_000_000_000
    """Largest `.safetensors` file; more weights are split over several, with an index."""

    every_rounds: Count | None = 1
    """Rounds between two that are written to disk, if the disk keeps up; null writes none."""

    keep_last: Annotated[int, Strict(), Field(ge=2)] = 2
    """Committed rounds that stay on disk; at least two, so that a damaged one leaves another."""

    asynchronous: Flag = True
    """Whether training goes on while a round is written, from a copy in host memory."""

    resume: str = "never"
    """`never`; `latest` (the last run of `tracking.run_name`, unless it has finished); or a run's or round's folder."""

    grace_s: Annotated[Number, Field(gt=0)] = 15.0
    """Seconds after SIGTERM in which the state is committed; keep it below the time until your scheduler kills."""

    allow: list[Difference] = []
    """Settings in which a resumed run may differ from the one that stopped, by name; all others are refused."""

    @field_validator("champion", mode="before")
    @classmethod
    def _champion_or_not(cls, value: Any) -> Any:
        return (["safetensors"] if value else []) if isinstance(value, bool) else value


class TransferConfig(Block):
    """How a member's state becomes another's."""

    transport: Literal["peer", "dcp_files"] = "peer"
    """`peer` (rank to rank), or `dcp_files` (torch's DCP on a shared folder, some 12 times slower: for a backend that
    has collectives and no point-to-point messages)."""

    bucket_bytes: Annotated[Count, Field(ge=1024)] = 1 << 25
    """Size of a message; a receiving rank needs room for two, and digests are compared by it."""

    directory: str | None = None
    """Folder that every host sees, for `dcp_files`; null takes `transfers` in `tracking.directory`."""


class JoinConfig(Block):
    """How the members find each other before training."""

    timeout_s: Annotated[Number, Field(gt=0)] = 300.0
    """Seconds to wait for every rank of every member to arrive."""

    port: Annotated[int, Strict(), Field(ge=1, le=65535)] | None = None
    """TCP port on rank 0's host where ranks meet; null takes the launcher's `MASTER_PORT`."""


class FaultsConfig(Block):
    """What happens when processes die, or a member's numbers do."""

    nonfinite_mask: Flag = True
    """Whether a member whose loss or gradient is not finite is left out of the clan's mean, at one number a pass."""

    min_members: Count | None = None
    """Members with which the run goes on when others have died; null ends it when one dies."""

    deadline_s: Annotated[Number, Field(gt=0)] = 300.0
    """Seconds that the others wait for a member, in a collective or for a sign of life, until it counts as dead."""

    rejoin_s: Annotated[Number, Field(gt=0)] = 60.0
    """Seconds that survivors, which start again, wait for each other before they go on without who is missing."""


class LineConfig(Block):
    """Members on the line: one model from which every member's weights are computed."""

    go_on_from: Literal["fittest", "centre"] = "fittest"
    """Where training goes on after a round: `fittest` (the weights are moved to the best point), or `centre` (weights
    are never written but to measure them, and one array less is stored; an optimizer whose state holds a copy of the
    weights, as schedule-free ones do, has it so in any case)."""

    store: Literal["device", "host"] = "device"
    """Where the average of the weights and the starts of a round lie: `device` (beside the weights), or `host` (weights
    are copied there with each update of the average; raise `average_every` with it)."""

    average_every: Count = 1
    """Optimizer steps from one update of the average of the weights to the next."""


class ClanConfig(Block):
    """The whole ``clantune`` block."""

    enabled: Flag = True
    """False turns the run into plain `deepspeed.initialize`."""

    population_size: Count
    """Members of the clan. Required."""

    members: Literal["groups", "line"] = "groups"
    """`groups`: the launcher's ranks are divided among the members. `line`: all ranks train one model, from which every
    member's weights are computed at a round's end. The world, the engine and the data stay as they are."""

    round_length: Count = 20
    """Optimizer steps of a round (of the shortest one, if the strategy lets rounds grow)."""

    duty_cycle: Annotated[Number, Field(ge=0, lt=1)] = 0.1
    """Share of a round that is competitive, if a specialized gene is active."""

    seed: Annotated[int, Strict(), Field(ge=0)] = 0
    """Seed of every decision and of the order of the data."""

    total_steps: Count | None = None
    """Optimizer steps of the whole run, for the final decay; null if it is not known."""

    strategy: StrategyConfig = StrategyConfig()
    """How fitness becomes the next population; a bare name is short for `{"name": ...}`."""

    genes: dict[str, GeneConfig] = {"lr": GeneConfig()}
    """Genes by name (`lr`, or `lr:head` with `groups`); a list of names takes their defaults. If the key is left out,
    `clan` takes `weight_decay` too in a run with AdamW and a weight decay above 0 that is known to see no training
    sample twice."""

    fitness: FitnessConfig = FitnessConfig()
    """How members are measured."""

    tracking: TrackingConfig = TrackingConfig()
    """Where the run leaves its traces."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is kept of the weights."""

    line: LineConfig = LineConfig()
    """How members on the line are stored."""

    transfer: TransferConfig = TransferConfig()
    """How a member's state becomes another's."""

    join: JoinConfig = JoinConfig()
    """How members find each other."""

    faults: FaultsConfig = FaultsConfig()
    """What happens when members die."""

    @field_validator("strategy", mode="before")
    @classmethod
    def _strategy_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("faults")
    @classmethod
    def _survivors_can_go_on(cls, faults: FaultsConfig, known: ValidationInfo) -> FaultsConfig:
        least, members, checkpoint = faults.min_members, known.data.get("population_size"), known.data.get("checkpoint")
        if least is not None and members is not None and least > members:
            raise ValueError(f"min_members should be at most population_size, {members}")
        if least is not None and checkpoint is not None and checkpoint.every_rounds is None:
            raise ValueError("min_members needs rounds on disk to go on from: give checkpoint.every_rounds a number")
        return faults

    @field_validator("genes")
    @classmethod
    def _names_can_be_shown(cls, genes: dict[str, GeneConfig]) -> dict[str, GeneConfig]:
        hidden = [name for name in genes if not name.isprintable() or not name.strip()]
        if hidden:
            raise ValueError(f"a name is a word that can be printed in a table, and {hidden[0]!r} is none")
        return genes

    @field_validator("genes", mode="before")
    @classmethod
    def _genes_by_name(cls, value: Any) -> Any:
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            return value
        if len(set(value)) < len(value):
            raise ValueError(f"a name is listed twice in {value}")
        return {name: {} for name in value}

    def facts(self, genes: tuple[Gene, ...], *, total_steps: int | None, sees_samples_once: bool = False) -> RunFacts:
        """What the strategy of a run with this block knows of it.

        Args:
            genes: that the block's were resolved to.
            total_steps: optimizer steps of the run, or None; the block's own count is not looked at.
            sees_samples_once: whether the run is known to see no training sample twice.
        """
        # Strategies bring scipy along, half a second that reading a config does without.
        from clantune_scale.core.strategies import RunFacts

        return RunFacts(
            population_size=self.population_size,
            genes=genes,
            seed=self.seed,
            round_length_steps=self.round_length,
            duty_cycle=self.duty_cycle,
            total_steps=total_steps,
            sees_samples_once=sees_samples_once,
        )
