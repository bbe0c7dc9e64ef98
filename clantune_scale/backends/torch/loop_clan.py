"""A clan in a loop of the user's own. Attaching to PyTorch's modules makes one, and to a DeepSpeed engine."""

from __future__ import annotations

import torch

from clantune_scale.backends.torch.engine import LoopBackend
from clantune_scale.runtime.clan import Clan


class LoopClan(Clan):
    """A clan in a loop of the user's own; see :func:`clantune_scale.attach`."""

    backend: LoopBackend

    def clip_grad_norm_(self) -> torch.Tensor:
        """[] the gradient norm of the member; scales gradients down to the threshold in effect.

        Use it in place of torch's: the threshold may be a gene, and only some parameters may be tensor-parallel. If
        the loop does not call it, the clan clips just before the optimizer's update.
        """
        return self.backend.clip_gradients()
