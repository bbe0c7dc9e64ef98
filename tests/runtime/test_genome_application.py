"""What each gene sets, on a torch optimizer and module behind the smallest backend that expression needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from clantune_scale.config.schema import ClanConfig
from clantune_scale.core.genome import Gene
from clantune_scale.errors import ClanError, ConfigError, NoEffectWarning
from clantune_scale.runtime.genome_application import REFERENCE_KEY, Expression, bind_genes


@dataclass
class FakeBackend:
    """A module and an optimizer, stepped by hand."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    clip: float = 1.0
    accumulation: int = 2

    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def update(self, expression: Expression, lr_factor: float = 1.0) -> list[dict[str, Any]]:
        """One update under ``expression``; the groups as the optimizer saw them."""
        seen: list[dict[str, Any]] = []
        handle = self.optimizer.register_step_pre_hook(lambda *_: seen.extend(dict(g) for g in self.param_groups()))
        for parameter in self.module.parameters():
            parameter.grad = torch.ones_like(parameter)
        with expression.during_update(lr_factor):
            self.optimizer.step()
        handle.remove()
        return seen


def backend_with(kind: str = "AdamW", rates: tuple[float, ...] = (0.1, 0.3), **options: Any) -> FakeBackend:
    """Two named groups, ``body`` and ``head``, and one dropout module per rate."""
    module = nn.Sequential(nn.Linear(3, 4), *(nn.Dropout(rate) for rate in rates), nn.Linear(4, 2))
    groups = [{"params": module[0].parameters(), "name": "body"}, {"params": module[-1].parameters(), "name": "head"}]
    defaults = {"lr": 0.1, "weight_decay": 0.02} | ({"momentum": 0.8} if kind == "SGD" else {})
    return FakeBackend(module, getattr(torch.optim, kind)(groups, **(defaults | options)))


def genes_of(genes: dict[str, dict], backend: FakeBackend, setters: dict | None = None) -> tuple[Gene, ...]:
    return bind_genes(ClanConfig(population_size=2, genes=genes).genes, backend, setters or {})


def expression_of(
    genes: dict[str, dict], backend: FakeBackend, values: dict[str, float], setters: dict | None = None
) -> Expression:
    expression = Expression(genes_of(genes, backend, setters), backend, setters or {})
    expression.express(values)
    return expression


def plain(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the user sees in the groups."""
    ours = ("params", REFERENCE_KEY)
    return [{key: value for key, value in group.items() if key not in ours} for group in groups]


@pytest.mark.parametrize(
    "kind, target, entry, value, key, expected",
    [
        ("AdamW", "lr", {}, 3.0, "lr", 0.3),
        ("AdamW", "lr", {"mode": "absolute"}, 0.7, "lr", 0.7),
        ("AdamW", "weight_decay", {}, 2.0, "weight_decay", 0.04),
        ("AdamW", "weight_decay", {"mode": "absolute"}, 0.5, "weight_decay", 0.5),
        ("AdamW", "beta1", {}, 0.8, "betas", (0.8, 0.999)),
        ("AdamW", "beta2", {}, 0.95, "betas", (0.9, 0.95)),
        ("AdamW", "eps", {}, 1e-5, "eps", 1e-5),
        ("AdamW", "eps", {"mode": "relative"}, 100.0, "eps", 1e-6),
        ("SGD", "momentum", {}, 0.6, "momentum", 0.6),
    ],
)
def test_a_gene_holds_in_all_groups_during_the_update_and_not_after(kind, target, entry, value, key, expected):
    backend = backend_with(kind)
    before = plain(backend.param_groups())
    expression = expression_of({target: entry}, backend, {target: value})
    assert plain(backend.param_groups()) == before
    seen = backend.update(expression)
    assert [group[key] for group in seen] == [pytest.approx(expected)] * 2
    for group in plain(seen):
        others = {name: held for name, held in group.items() if name != key}
        assert others == {name: held for name, held in before[0].items() if name != key} | {"name": group["name"]}
    assert plain(backend.param_groups()) == before


def test_the_update_itself_is_made_with_the_gene():
    backend = backend_with("SGD", momentum=0.0, weight_decay=0.0)
    start = backend.module[0].weight.detach().clone()
    backend.update(expression_of({"lr": {}}, backend, {"lr": 3.0}))
    # 0.1 x 3 times a gradient of one; the subtraction rounds in float32.
    assert torch.allclose(start - backend.module[0].weight, torch.full_like(start, 0.3), atol=1e-6)


def test_betas_are_written_one_at_a_time():
    backend = backend_with()
    seen = backend.update(expression_of({"beta1": {}, "beta2": {}}, backend, {"beta1": 0.7, "beta2": 0.9}))
    assert seen[0]["betas"] == (0.7, 0.9)


def test_a_gene_with_groups_is_written_to_those_alone_and_composes_with_one_for_all():
    backend = backend_with()
    genes = {"lr": {}, "lr:head": {"groups": ["head"]}, "beta1:body": {"groups": ["body"]}}
    seen = backend.update(expression_of(genes, backend, {"lr": 2.0, "lr:head": 5.0, "beta1:body": 0.6}))
    assert [group["lr"] for group in seen] == pytest.approx([0.2, 1.0])
    assert [group["betas"][0] for group in seen] == [0.6, 0.9]


def test_groups_without_a_name_go_by_their_index():
    backend = backend_with()
    for group in backend.param_groups():
        del group["name"]
    seen = backend.update(expression_of({"lr:last": {"groups": ["1"]}}, backend, {"lr:last": 4.0}))
    assert [group["lr"] for group in seen] == pytest.approx([0.1, 0.4])


@pytest.mark.parametrize("entry, value, expected", [({}, 3.0, 0.3), ({"mode": "absolute"}, 0.7, 0.7)])
def test_a_learning_rate_that_is_a_tensor_is_not_written_in_place(entry, value, expected):
    rate = torch.tensor(0.1)
    backend = backend_with(lr=rate, foreach=False)
    seen = backend.update(expression_of({"lr": entry}, backend, {"lr": value}), lr_factor=0.5)
    assert all(isinstance(group["lr"], torch.Tensor) for group in seen)
    assert [float(group["lr"]) for group in seen] == pytest.approx([0.5 * expected] * 2)
    assert all(group["lr"] is rate for group in backend.param_groups()) and float(rate) == pytest.approx(0.1)


def test_a_chained_scheduler_does_not_compound_the_gene():
    backend = backend_with()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(backend.optimizer, gamma=0.5)
    expression = expression_of({"lr": {}}, backend, {"lr": 3.0})
    rates = []
    for _ in range(4):
        rates.append(backend.update(expression)[0]["lr"])
        scheduler.step()
    assert rates == pytest.approx([0.3, 0.15, 0.075, 0.0375])
    assert backend.param_groups()[0]["lr"] == pytest.approx(0.1 * 0.5**4)


@pytest.mark.parametrize("genes, values, expected", [
    ({}, {}, 0.025),
    ({"lr": {}}, {"lr": 2.0}, 0.05),
    ({"lr": {"mode": "absolute"}}, {"lr": 0.8}, 0.2),
])  # fmt: skip
def test_the_strategys_factor_multiplies_every_learning_rate(genes, values, expected):
    backend = backend_with()
    expression = expression_of(genes, backend, values)
    assert [group["lr"] for group in backend.update(expression, lr_factor=0.25)] == pytest.approx([expected] * 2)
    assert expression.learning_rate(0.25) == pytest.approx(expected)
    assert backend.param_groups()[0]["lr"] == 0.1


# From the third step on, a rate is the smaller of the schedule's (times 0.1) and 0.05 x factor.
SCHEDULED = (1.0, 0.5, 0.5, 0.4, 0.1, 0.0, 0.3)
FACTORS = (1.0, 1.0, 0.8, 0.6, 0.4, 0.3, 0.2)
RATES = (0.1, 0.05, 0.04, 0.03, 0.01, 0.0, 0.01)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("value", [None, 3.0])
def test_the_final_decay_bounds_the_users_schedule_and_does_not_multiply_it(value, as_tensor):
    backend = backend_with(lr=torch.tensor(0.1) if as_tensor else 0.1, foreach=False)
    scheduler = torch.optim.lr_scheduler.LambdaLR(backend.optimizer, SCHEDULED.__getitem__)
    genes, values = ({}, {}) if value is None else ({"lr": {}}, {"lr": value})
    expression = expression_of(genes, backend, values)
    rates = []
    for step, factor in enumerate(FACTORS):
        # Asking moves nothing, whatever the factor asked with.
        expression.learning_rate(1.0), expression.learning_rate(0.01)
        assert expression.scheduled_rate == pytest.approx(0.1 * SCHEDULED[step])
        asked = expression.learning_rate(factor)
        rates.append(float(backend.update(expression, lr_factor=factor)[0]["lr"]))
        assert asked == rates[-1]
        if step < len(SCHEDULED) - 1:
            scheduler.step()
    assert rates == pytest.approx([(value or 1.0) * rate for rate in RATES])
    expression.restore()
    assert not any(REFERENCE_KEY in group for group in backend.param_groups())


def test_an_absolute_gene_takes_the_factor_in_its_groups_alone():
    backend = backend_with()
    genes = {"lr:head": {"groups": ["head"], "mode": "absolute", "bounds": [1e-3, 1]}}
    expression = expression_of(genes, backend, {"lr:head": 0.8})
    backend.update(expression)
    for group in backend.param_groups():
        group["lr"] = 0.02  # the user's schedule is far below the line
    assert [group["lr"] for group in backend.update(expression, lr_factor=0.5)] == pytest.approx([0.02, 0.4])


def test_the_decays_reference_goes_with_the_optimizers_state():
    first, second = backend_with(), backend_with()
    first.update(expression_of({}, first, {}))
    for group in first.param_groups():
        group["lr"] = 0.05
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    rates = [expression_of({}, backend, {}).learning_rate(0.4) for backend in (first, second)]
    assert rates == pytest.approx([0.04, 0.04])  # 0.1 x 0.4, and not 0.05 x 0.4


def test_an_update_that_fails_leaves_the_scheduled_values():
    backend = backend_with()
    expression = expression_of({"lr": {}}, backend, {"lr": 2.0})
    with pytest.raises(ZeroDivisionError), expression.during_update(0.5):
        raise ZeroDivisionError
    assert backend.param_groups()[0]["lr"] == 0.1


def test_a_value_that_something_else_writes_over_is_found():
    backend = backend_with()
    expression = expression_of({"lr:head": {"groups": ["head"]}}, backend, {"lr:head": 2.0})

    def overwrite(group: int, rate: float) -> None:
        backend.param_groups()[group]["lr"] = rate

    # A group that the gene does not name is nobody's business.
    handle = backend.optimizer.register_step_pre_hook(lambda *_: overwrite(0, 0.5))
    backend.update(expression)
    handle.remove()
    backend.optimizer.register_step_pre_hook(lambda *_: overwrite(1, 0.5))
    message = r"gene 'lr:head' wrote 0\.2 to the optimizer's lr and read back 0\.5 after the update\. .* remove it"
    with pytest.raises(ClanError, match=message):
        backend.update(expression)
    assert [group["lr"] for group in backend.param_groups()] == [0.1, 0.1]


def test_clip_dropout_accumulation_and_setters_hold_between_steps_and_are_put_back():
    backend = backend_with(rates=(0.1, 0.3))
    smoothing = []
    entry = {"kind": "specialized", "scale": "linear", "bounds": [0.0, 0.5], "initial": 0.1}
    genes = {"clip": {}, "dropout": {}, "accumulation": {}, "smoothing": entry}
    values = {"clip": 0.4, "dropout": 0.2, "accumulation": 3.4, "smoothing": 0.25}
    expression = expression_of(genes, backend, values, {"smoothing": smoothing.append})
    assert (backend.clip, backend.accumulation, smoothing) == (0.4, 3, [0.25])
    assert [backend.module[1].p, backend.module[2].p] == [0.2, 0.2]
    backend.update(expression)
    assert backend.clip == 0.4
    expression.restore()
    assert (backend.clip, backend.accumulation, smoothing) == (1.0, 2, [0.25])
    assert [backend.module[1].p, backend.module[2].p] == [0.1, 0.3]


def test_a_relative_dropout_gene_keeps_the_proportions_of_the_users_rates():
    backend = backend_with(rates=(0.1, 0.3, 0))
    expression = expression_of({"dropout": {"mode": "relative"}}, backend, {"dropout": 1.0})
    rates = [backend.module[i] for i in (1, 2, 3)]
    assert [part.p for part in rates] == [0.1, 0.3, 0]
    expression.express({"dropout": 2.0})
    assert [part.p for part in rates] == pytest.approx([0.2, 0.6, 0])
    expression.express({"dropout": 100.0})
    assert [part.p for part in rates] == [1.0, 1.0, 0]
    backend.module(torch.zeros(1, 3))


def test_a_relative_clip_gene_multiplies_the_configured_threshold_once():
    backend = backend_with()
    backend.clip = 0.5
    expression = expression_of({"clip": {"mode": "relative"}}, backend, {"clip": 2.0})
    expression.express({"clip": 3.0})
    assert backend.clip == pytest.approx(1.5)


@pytest.mark.parametrize("genes, value, expected", [
    ({}, {}, 2),
    ({"accumulation": {}}, {"accumulation": 2.6}, 3),
    ({"accumulation": {}}, {"accumulation": 0.2}, 1),
    ({"accumulation": {"mode": "relative"}}, {"accumulation": 1.8}, 4),
])  # fmt: skip
def test_accumulation_is_a_whole_number_times_the_batch_factor(genes, value, expected):
    backend = backend_with()
    expression = expression_of(genes, backend, value)
    assert expression.accumulation(value) == backend.accumulation == expected
    expression.express(value, batch_factor=4)
    assert backend.accumulation == 4 * expected
    expression.express(value)
    assert backend.accumulation == expected


def test_a_setter_goes_before_what_the_package_would_do():
    backend = backend_with()
    seen: list[float] = []
    genes = {"lr": {"mode": "absolute"}, "dropout": {}}
    expression = expression_of(genes, backend, {"lr": 0.3, "dropout": 0.4}, {"lr": seen.append, "dropout": seen.append})
    assert seen == [0.3, 0.4] and backend.module[1].p == 0.1
    assert backend.update(expression)[0]["lr"] == 0.1


def test_absolute_genes_start_at_the_engines_own_values():
    backend = backend_with()
    backend.clip, backend.accumulation = 0.7, 5
    names = {name: {} for name in ("beta1", "eps", "clip", "accumulation", "dropout")}
    starts = {gene.name: gene.initial for gene in genes_of({"lr": {"mode": "absolute"}} | names, backend)}
    expected = {"lr": 0.1, "beta1": 0.9, "eps": 1e-8, "clip": 0.7, "accumulation": 5, "dropout": 0.2}
    assert starts == pytest.approx(expected)
    (head,) = genes_of({"lr:head": {"groups": ["head"], "mode": "absolute", "bounds": [1e-3, 1]}}, backend)
    assert head.initial == 0.1 and head.groups == ("head",)


OWN = {"kind": "optimizer", "scale": "log", "bounds": [0.1, 10.0], "initial": 1.0}


@pytest.mark.parametrize(
    "backend, genes, message",
    [
        (backend_with(), {"lr:nose": {"groups": ["nose"]}}, "gene 'lr:nose' .* called nose; there are body, head"),
        (backend_with(), {"momentum": {}}, "gene 'momentum' .*the optimizer has no momentum; its groups hold .*betas"),
        (backend_with("SGD"), {"beta1": {}}, "gene 'beta1' .*the optimizer has no betas"),
        (backend_with(weight_decay=0.0), {"weight_decay": {}}, "gene 'weight_decay' .*0 in every group; set a"),
        (backend_with(rates=()), {"dropout": {}}, "gene 'dropout' .*no dropout module"),
        (backend_with(rates=(0.0,)), {"dropout": {"mode": "relative"}}, "gene 'dropout' .*rates that are 0"),
        (backend_with(), {"smoothing": OWN}, r"gene 'smoothing' .*pass gene_setters=\{'smoothing': \.\.\.\}"),
    ],
)
def test_a_gene_that_sets_nothing_warns_by_name_and_is_left_out(backend, genes, message):
    with pytest.warns(NoEffectWarning, match=message):
        assert [gene.name for gene in genes_of({**genes, "lr": {}}, backend)] == ["lr"]


def test_a_gene_that_nobody_asked_for_is_left_out_without_a_word(recwarn):
    configs = ClanConfig(population_size=2, genes={"lr": {}, "weight_decay": {}}).genes
    backend = backend_with(weight_decay=0.0)
    assert [gene.name for gene in bind_genes(configs, backend, {}, quiet={"weight_decay"})] == ["lr"]
    assert not recwarn.list


@pytest.mark.parametrize("entry", [{}, {"mode": "relative"}, {"mode": "relative", "initial": 2.0}])
def test_a_clip_gene_with_clipping_off_warns(entry):
    backend = backend_with()
    backend.clip = 0.0
    with pytest.warns(NoEffectWarning, match="gene 'clip' has no effect: gradient_clipping is off"):
        assert genes_of({"clip": entry}, backend) == ()


def test_a_clip_gene_may_turn_clipping_on():
    backend = backend_with()
    backend.clip = 0.0
    expression = expression_of({"clip": {"initial": 2.0}}, backend, {"clip": 2.0})
    assert backend.clip == 2.0
    expression.restore()
    assert backend.clip == 0.0


def test_a_group_name_that_does_not_exist_warns_beside_one_that_does():
    backend = backend_with()
    with pytest.warns(NoEffectWarning, match="gene 'lr:some' has no effect on nose: no parameter group has that name"):
        (gene,) = genes_of({"lr:some": {"groups": ["head", "nose"]}}, backend)
    assert gene.groups == ("head", "nose")


def test_a_setter_that_no_gene_calls_warns():
    with pytest.warns(NoEffectWarning, match=r"gene_setters\['temperature'\] has no effect: no gene sets it"):
        genes_of({"lr": {}}, backend_with(), {"temperature": print})


def test_an_unknown_target_without_a_description_is_an_error_not_a_warning():
    with pytest.raises(ConfigError, match="'learning_rate', which is none of lr, .*add kind, scale, bounds, initial"):
        genes_of({"learning_rate": {}}, backend_with())
