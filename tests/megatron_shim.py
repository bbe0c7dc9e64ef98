"""Lets Megatron-core, which calls CUDA by name, run on the CPU over gloo: for tests, and for them alone.

Tensors that it asks for on CUDA are made on the CPU, CPU tensors tell it CUDA's type names, streams and events do
nothing, and CUDA's random stream is the CPU's. What it computes and sends is its own. Installed in the processes of
test ranks only.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_mode: TorchFunctionMode | None = None


class _OnCpu(TorchFunctionMode):
    """Sends what is asked for on CUDA to the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return function(*args).replace("torch.", "torch.cuda.")
        if function is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return function(*args, **kwargs)


def _names_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


class _Nothing:
    """A stream or an event: every method does nothing, and as a context it is one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *error: Any) -> bool:
        return False


def install() -> None:
    """Puts the bridge in place for the rest of this process's life; a second call does nothing."""
    global _mode
    if _mode is not None:
        return
    import megatron.core.tensor_parallel.random as random

    generator = torch.default_generator
    cuda = torch.cuda
    cuda.manual_seed = lambda seed: generator.manual_seed(int(seed))
    # Each name a function of its own: torch's compiler keeps rules by function, and refuses one under two names.
    cuda.get_rng_state = lambda *args, **kwargs: generator.get_state()
    cuda.random.get_rng_state = lambda *args, **kwargs: generator.get_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: generator.set_state(state)
    random._get_cuda_rng_state = cuda.get_rng_state
    random._set_cuda_rng_state = cuda.set_rng_state
    # It warns that the CPU's stream moved while CUDA's was forked: here they are one.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)
    cuda.current_device = lambda: torch.device("cpu")
    for name in ("synchronize", "empty_cache", "set_device"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.Stream = cuda.Event = _Nothing
    cuda.stream = cuda.current_stream = cuda.default_stream = _Nothing
    _mode = _OnCpu()
    _mode.__enter__()
