"""A rank's random streams, from which dropout and augmentation draw, as bytes and numbers. Nothing is pickled."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

_ENGINE = "engine."


class RandomState(Protocol):
    """Random streams of this rank beside torch's, numpy's and Python's own; often there are none.

    Attributes:
        device: of the parameters.
    """

    @property
    def device(self) -> torch.device: ...

    def random_streams(self) -> dict[str, torch.Tensor]:
        """uint8 states, by name."""

    def load_random_streams(self, streams: Mapping[str, torch.Tensor]) -> None:
        """Takes over such states."""


@dataclass(frozen=True)
class RandomStreams:
    """The state of every stream.

    Attributes:
        tensors: uint8, by name: torch's on the host and on the device, numpy's words, the engine's own.
        numbers: the rest of numpy's and Python's states; JSON-serializable.
    """

    tensors: dict[str, torch.Tensor]
    numbers: dict[str, Any]

    @classmethod
    def capture(cls, backend: RandomState) -> RandomStreams:
        """The present state of every stream."""
        name, words, place, has_gauss, gauss = np.random.get_state(legacy=True)
        assert isinstance(words, np.ndarray), "legacy states are tuples of a name, words and counts"
        version, inner, gauss_next = random.getstate()
        tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(words.copy().view(np.uint8))}
        if backend.device.type == "cuda":
            tensors["cuda"] = torch.cuda.get_rng_state(backend.device)
        tensors |= {_ENGINE + key: state.cpu().clone() for key, state in backend.random_streams().items()}
        numbers = {
            "numpy": [name, int(place), int(has_gauss), float(gauss)],
            "python": [version, list(inner), gauss_next],
        }
        return cls(tensors, numbers)

    def restore(self, backend: RandomState) -> None:
        """Sets every stream to this state."""
        torch.set_rng_state(self.tensors["torch"])
        if "cuda" in self.tensors and backend.device.type == "cuda":
            torch.cuda.set_rng_state(self.tensors["cuda"], backend.device)
        name, place, has_gauss, gauss = self.numbers["numpy"]
        words = self.tensors["numpy"].numpy().view(np.uint32)
        np.random.set_state((name, words, place, has_gauss, gauss))
        version, inner, gauss_next = self.numbers["python"]
        random.setstate((version, tuple(inner), gauss_next))
        backend.load_random_streams(_of_engine(self.tensors))


def _of_engine(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix(_ENGINE): state for key, state in tensors.items() if key.startswith(_ENGINE)}
