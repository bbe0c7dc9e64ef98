"""The keyword arguments that the front doors share, with their types and their documentation in one place.

``help()`` and ``inspect.signature()`` show them at each front door as if they were written there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar, cast

from torch.utils.data import Dataset
from typing_extensions import TypedDict

from clantune_scale.config.deepspeed_file import ConfigSource
from clantune_scale.runtime.genome_application import Setter
from clantune_scale.runtime.line.members import TrainStep
from clantune_scale.runtime.steps import Watch
from clantune_scale.runtime.validation_window import Evaluate

Function = TypeVar("Function", bound=Callable[..., Any])


class ClanArguments(TypedDict, total=False):
    """Of ``initialize``, ``attach`` and ``attach_megatron``.

    Attributes:
        evaluate: ``(model, batch) -> loss`` in place of the model's own output, or None. The model is what the loop
            calls: the engine with ``initialize``. With ``attach_megatron`` it replaces ``forward_step`` and runs on all
            pipeline stages at once, and the last stage's result counts.
        gene_setters: by target name, a function that puts a gene's value into effect.
    """

    evaluate: Evaluate | None
    gene_setters: Mapping[str, Setter] | None


class _Required(TypedDict):
    config: ConfigSource
    eval_data: Dataset[Any]


class LoopArguments(_Required, ClanArguments, total=False):
    """Of ``attach`` and ``attach_megatron``, whose loop is the user's own.

    Attributes:
        config: a DeepSpeed-style config with a ``"clantune"`` block (a dict or a JSON file), or the block itself. From
            the config come ``train_micro_batch_size_per_gpu``, ``gradient_accumulation_steps``, ``train_batch_size``
            (the whole clan's) and ``gradient_clipping``, unless a keyword gives them.
        eval_data: map-style dataset on which selection compares members. Keep a test split apart from it.
        micro_batch_size: samples per rank and backward pass; None takes the config's.
        collate_fn: joins validation samples to a batch; torch's default if None.
        total_steps: optimizer steps of the whole run, if the block does not say.
        num_samples: of the training data. Weight decay is a gene by default if no sample is seen twice.
        train_step: for members on the line whose loop does not take its steps from ``clan.steps()``: does one optimizer
            step, as the loop does, on the micro-batches that it gets, each the (args, kwargs) of a forward pass of the
            model. Competitors of a competitive phase are trained with it, on batches that the loop has drawn.
        watch: for a loop whose micro-batches are more than the arguments of the model's forward pass (labels that go
            to a loss function, a count of tokens): called with ``on_batch(args, kwargs)`` and ``on_loss(loss)``, hooks
            the loop so that it calls them for each micro-batch, and returns a function that undoes that.
            ``train_step`` then gets what ``on_batch`` got. None watches the forward pass.
    """

    micro_batch_size: int | None
    collate_fn: Callable[[list[Any]], Any] | None
    total_steps: int | None
    num_samples: int | None
    train_step: TrainStep | None
    watch: Watch | None


def shares(arguments: type[Any]) -> Callable[[Function], Function]:
    """Shows the keys of a ``TypedDict`` as keyword arguments of a function that takes them as ``**arguments``.

    Args:
        arguments: the ``TypedDict``. Its ``Attributes`` take the place of ``{arguments}`` in the docstring.

    Returns:
        A decorator. The function then refuses unknown and missing keywords with a ``TypeError`` before it runs.
    """

    def decorate(function: Function) -> Function:
        signature = _signature(function, arguments)

        @wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            signature.bind(*args, **kwargs)
            return function(*args, **kwargs)

        checked.__signature__ = signature  # type: ignore[attr-defined]
        checked.__doc__ = inspect.cleandoc(function.__doc__ or "").replace("{arguments}", _documentation(arguments))
        return cast(Function, checked)

    return decorate


def _signature(function: Callable[..., Any], arguments: type[Any]) -> inspect.Signature:
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    required = arguments.__required_keys__
    shared = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if name in required else None,
            annotation=getattr(hint, "__forward_arg__", hint),
        )
        for name, hint in sorted(arguments.__annotations__.items(), key=lambda item: item[0] not in required)
    ]
    return signature.replace(parameters=[*own, *shared])


def _documentation(arguments: type[Any]) -> str:
    """The ``Attributes`` of a class and of the classes above it, indented as arguments are."""
    parts = (inspect.getdoc(part) or "" for part in (arguments, *getattr(arguments, "__orig_bases__", ())))
    texts = [text.partition("Attributes:\n")[2] for text in parts]
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    return "\n    ".join(line[4:] for line in lines)
