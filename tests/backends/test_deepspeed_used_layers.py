"""Members on DeepSpeed that use different layers in one step: averaged layer by layer, or told."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clantune_scale.distributed.world import ClanGroups
from clantune_scale.errors import ClanError, DivergenceError
from clantune_scale.gradients.probe import GradientProbe
from tests.backends.small_runs import MICRO, ds_config, in_member_worlds
from tests.backends.torch.test_used_layers import ROUTES, Experts, _data
from tests.ranks import run_ranks

RATE, STEPS = 0.1, 3


def _by_hand() -> list[list[float]]:
    """Weights after each step on the mean gradient of both ranks; a layer that one did not use has zeros there."""
    model, found = Experts(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        for rank in range(2):
            model.which = ROUTES[step][rank]
            (model(_batch(step, rank)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]).tolist())
    return found


def _batch(step: int, rank: int) -> torch.Tensor:
    return _data()[MICRO * rank + step : MICRO * rank + step + MICRO]


def _engine(stage: int, **zero: Any) -> Any:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = ds_config(stage, optimizer={"type": "SGD", "params": {"lr": RATE}})
    config["zero_optimization"] |= zero
    model = Experts()
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def _trained(rank: int, stages: dict[str, tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    from clantune_scale.backends.deepspeed import DeepSpeedBackend
    from clantune_scale.distributed import world

    joined = world.join(2, timeout_s=60)
    found: dict[str, Any] = {}
    for name, (stage, zero) in stages.items():
        engine, probe = _engine(stage, **zero), GradientProbe()
        backend = DeepSpeedBackend(engine)
        backend.share_gradients(lambda: (0, 1), ClanGroups(joined, "cpu"), probe)
        found[name] = []
        for step in range(STEPS):
            probe.is_active = step == STEPS - 1
            engine.module.which = ROUTES[step][rank]
            engine.backward(engine(_batch(step, rank)))
            try:
                engine.step()
            except DivergenceError as error:
                found[name].append(str(error))
                break
            if stage < 2:
                found[name].append(torch.cat([p.detach().flatten() for p in engine.module.parameters()]).tolist())
        joined.replica_group.gather_json(None)
        backend.detach()
    engine = _engine(1)
    backend = DeepSpeedBackend(engine)
    backend.share_gradients(lambda: (0, 1), ClanGroups(joined, "cpu"))
    try:
        engine.step()
    except ClanError as error:
        found["skipped"] = str(error)
    return found


def test_zero_0_and_1_average_layer_by_layer_and_the_others_say_that_layers_differ():
    stages: dict[str, tuple[int, dict[str, Any]]] = {"0": (0, {}), "1": (1, {}), "2": (2, {}), "3": (3, {})}
    expected = _by_hand()
    for found in run_ranks(2, in_member_worlds, _trained, stages):
        for stage in ("0", "1"):
            for weights, wanted in zip(found[stage], expected, strict=True):
                assert weights == pytest.approx(wanted, abs=1e-6), stage
        for stage in ("2", "3"):
            (said,) = found[stage]
            assert "averaged their gradients in different orders in a step of this phase" in said
        assert "this member shared no gradient in optimizer step 1" in found["skipped"]
