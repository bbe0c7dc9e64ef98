"""The parameters of a loop: which of them its optimizers update, and what may happen to them while the clan is on."""

from __future__ import annotations

import torch

from clantune_scale.backends.torch.optimizers import Optimizers
from clantune_scale.backends.torch.refusals import require_known_parameters
from clantune_scale.backends.torch.state import persistent_buffers
from clantune_scale.gradients.clip import local

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
_HALF = (torch.bfloat16, torch.float16)


class Parameters:
    """A module's parameters, as they are when the clan is attached.

    One that trains then counts as trained for good: frozen later, it stands still, and its points with it.

    Args:
        module: the user's.
        optimizers: that update some of its parameters.
        takes_half: whether trained parameters may be in 16 bits. Their averages are kept in fp32.

    Attributes:
        trained: the parameters that the optimizers update, by name.
        fixed: all others.
        names: by id, of all.
        trained_ids: of the trained ones.

    Raises:
        ConfigError: if the optimizers' parameters are not the module's, or in 16 bits against ``takes_half``.
    """

    def __init__(self, module: torch.nn.Module, optimizers: Optimizers, *, takes_half: bool) -> None:
        named = [(plain_name(name), parameter) for name, parameter in module.named_parameters()]
        require_known_parameters(optimizers.param_groups, named, takes_half=takes_half)
        updated = {id(parameter) for group in optimizers.param_groups for parameter in group["params"]}
        self.trained = [(n, p) for n, p in named if id(p) in updated and p.requires_grad]
        self.fixed = [(n, p) for n, p in named if not (id(p) in updated and p.requires_grad)]
        self.device = local(named[0][1]).device
        self.has_half = any(parameter.dtype in _HALF for _, parameter in self.trained)
        self.names = {id(parameter): name for name, parameter in named}
        self.trained_ids = frozenset(id(parameter) for _, parameter in self.trained)
        self._optimizers, self._module = optimizers, module

    @property
    def all(self) -> list[tuple[str, torch.nn.Parameter]]:
        """The trained ones, then all others."""
        return self.trained + self.fixed

    def local(self) -> list[torch.Tensor]:
        """[trained] this rank's live shards."""
        return [local(parameter) for _, parameter in self.trained]

    def groups(self) -> list[int]:
        """[trained] the index of each one's parameter group."""
        places = {id(p): index for index, group in enumerate(self._optimizers.param_groups) for p in group["params"]}
        return [places[id(parameter)] for _, parameter in self.trained]

    def buffers(self) -> list[tuple[str, torch.Tensor]]:
        """The module's persistent ones, by name."""
        return [(plain_name(name), buffer) for name, buffer in persistent_buffers(self._module)]

    def have_masters(self) -> bool:
        """Whether the optimizers' state holds 16-bit weights once more, in higher precision.

        It overwrites the weights with its own copy in the next update.
        """
        return any(parameter.dtype in _HALF and self._has_master(parameter) for _, parameter in self.trained)

    def _has_master(self, parameter: torch.Tensor) -> bool:
        weight = local(parameter)
        copies = [
            local(value)
            for value in self._optimizers.get(parameter, {}).values()
            if torch.is_tensor(value) and value.dtype == torch.float32 and value.shape == parameter.shape
        ]
        return any(weight.any() and torch.equal(copy.to(weight), weight) for copy in copies)


def plain_name(name: str) -> str:
    """A parameter's name without the prefixes of compiled and activation-checkpointed modules."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
