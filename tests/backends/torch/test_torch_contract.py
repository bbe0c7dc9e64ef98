"""What the backends use of torch beyond its documentation exists in the installed version, and is what it was.

FSDP2 says nowhere in public over which group it shards, and DDP not whether it has a hook. When torch is upgraded, a
failure here names what moved before a training run finds out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import Variable
from torch.distributed import c10d_logger
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from clantune_scale.backends.torch.fsdp import _groups_of
from tests.backends.small_runs import Net, batch, in_member_worlds
from tests.ranks import run_ranks

ON_GROUP = ("_all_reduce_hook", "_is_hsdp", "_module_fqn", "fsdp_params", "gradient_divide_factor", "mesh_info")
ON_MESH = ("shard_mesh_rank", "shard_mesh_size", "shard_process_group")


def _look_at(rank: int) -> dict[str, Any]:
    dist.init_process_group("gloo")
    model = fully_shard(Net())
    (group,) = _groups_of(model)
    shards = []
    model.set_all_reduce_hook(shards.append)
    at_end = []
    handle = model.last.register_full_backward_hook(
        lambda *_: Variable._execution_engine.queue_callback(lambda: at_end.append(len(shards)))
    )
    model(*batch(0, 0, rank)).backward()
    handle.remove()
    gradient = next(model.parameters()).grad.to_local()
    is_view = shards[0].untyped_storage().data_ptr() == gradient.untyped_storage().data_ptr()
    model.eval()
    with torch.no_grad():
        model(*batch(0, 0, rank))
    ddp = DistributedDataParallel(Net(), find_unused_parameters=True)  # then it has a map of them
    ddp.register_comm_hook(None, allreduce_hook)
    parameter = group.fsdp_params[0]
    return {
        "group": [name for name in ON_GROUP if hasattr(group, name)],
        "mesh": [name for name in ON_MESH if hasattr(group.mesh_info, name)],
        "parameters": [shard.sharded_param.shape[0] for shard in group.fsdp_params],
        "offload": parameter.offload_to_cpu,
        "cut": (parameter.fsdp_placement.dim, tuple(parameter._orig_size)),
        "num_shards": len(shards),
        "at_end": at_end,
        "is_view": is_view,
        "ddp": [hook.__name__ for hook, _ in ddp._comm_hooks],
        "used": ddp.reducer._get_local_used_map().numel() - len(ddp.parameters_to_ignore),
        "logger": c10d_logger._get_msg_dict("all_reduce")["func_name"],
        "caches": [part._non_persistent_buffers_set for part in model.modules()],
        "mixed": ddp.mixed_precision,
    }


def test_torch_holds_what_we_look_for_also_on_one_rank():
    (found,) = run_ranks(1, in_member_worlds, _look_at)
    version = f"torch {torch.__version__}"
    assert found["group"] == list(ON_GROUP), f"{version}: an FSDP2 group lacks {set(ON_GROUP) - set(found['group'])}"
    assert found["mesh"] == list(ON_MESH), f"{version}: its mesh lacks {set(ON_MESH) - set(found['mesh'])}"
    assert found["parameters"] == [24, 24, 24, 24, 8, 8] and found["offload"] is False
    assert found["cut"] == (0, (24, 16)), f"{version}: FSDP2 cuts {found['cut']} in place of rows"
    assert found["num_shards"] == 1, f"{version}: the all-reduce hook is not called where one rank holds all"
    assert found["at_end"] == [1], f"{version}: a callback queued in backward does not run at its end"
    assert found["is_view"], f"{version}: gradients no longer lie in the memory that the hook is given"
    assert found["used"] == 6, f"{version}: DDP's map of used parameters has {found['used']} entries for 6"
    assert found["logger"] == "all_reduce" and found["caches"] == [set()] * 5
    assert found["ddp"] == ["allreduce_hook"] and found["mixed"] is None
