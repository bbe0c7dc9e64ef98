"""The arguments that name a model and a config, shared by the commands that look ahead."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from clantune_scale.config.deepspeed_file import load_ds_config
from clantune_scale.errors import ClanError

if TYPE_CHECKING:
    from clantune_scale.planning.model_spec import LoadedModel

# Ours first, then Megatron's own.
_PIPELINE = ("--pipeline-parallel-size", "--pipeline-model-parallel-size")
_TENSOR = ("--tensor-parallel-size", "--tensor-model-parallel-size")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG, ``--world-size``, the degrees of a member, ``--model`` and ``--model-args``."""
    parser.add_argument("config", metavar="CONFIG", help="a DeepSpeed config with its clantune block")
    parser.add_argument("--world-size", type=int, required=True, metavar="N", help="ranks that the launcher starts")
    for names, what in ((_PIPELINE, "pipeline stages"), (_TENSOR, "tensor shards")):
        parser.add_argument(
            *names, type=int, default=1, metavar="N", help=f"{what} of a member, if the script sets them (Megatron)"
        )
    parser.add_argument("--model", metavar="MODULE:FACTORY", help="builds the model; also path/to/file.py:FACTORY")
    parser.add_argument("--model-args", type=json_object, default={}, metavar="JSON", help="for the factory")


def read_config(arguments: argparse.Namespace) -> dict[str, Any]:
    """The DeepSpeed config that CONFIG names.

    Raises:
        ClanError: if it cannot be read, or ``--world-size`` or a degree is no number of ranks.
    """
    if arguments.world_size < 1:
        raise ClanError(f"--world-size is {arguments.world_size}. Give the number of ranks, at least 1.")
    for option, degree in (
        (_PIPELINE[0], arguments.pipeline_parallel_size),
        (_TENSOR[0], arguments.tensor_parallel_size),
    ):
        if degree < 1:
            raise ClanError(f"{option} is {degree}. Give a number of at least 1.")
    return load_ds_config(arguments.config)


def read_model(arguments: argparse.Namespace) -> LoadedModel | None:
    """The model that ``--model`` names, on the meta device; None if it is left out."""
    if arguments.model is None:
        return None
    # torch takes a second to import, and a config can be checked without it.
    from clantune_scale.planning.model_spec import load_model

    return load_model(arguments.model, arguments.model_args)


def json_object(text: str) -> dict[str, Any]:
    """An object in JSON, as argparse takes a type."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not an object")
    return value
