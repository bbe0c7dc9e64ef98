"""Packages that only some runs need: the extra that brings each, and the error if one is missing."""

from __future__ import annotations

from importlib.util import find_spec

from clantune_scale.errors import ClanError

#: Package as it is imported -> (its name, the extra of ``pyproject.toml`` that brings it).
EXTRAS = {
    "deepspeed": ("DeepSpeed", "deepspeed"),
    "megatron.core": ("Megatron-core", "megatron"),
    "lightning": ("Lightning", "lightning"),
    "mlflow": ("MLflow", "mlflow"),
    "matplotlib": ("matplotlib", "report"),
    "argcomplete": ("argcomplete", "completion"),
    "transformers": ("transformers", "transformers"),
    "accelerate": ("Accelerate", "accelerate"),
}


def is_installed(package: str) -> bool:
    """Whether ``package`` (one of :data:`EXTRAS`) can be imported; only a dotted name's parent is loaded."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        # The parent of a dotted name is not there either.
        return False


def missing(package: str, *, needed_by: str) -> ClanError:
    """The error for a package of :data:`EXTRAS` that is not installed.

    Args:
        package: as it is imported.
        needed_by: what the user asked for that cannot be done without it.
    """
    name, _ = EXTRAS[package]
    return ClanError(f"{needed_by} needs {name}, which is not installed. {remedy(package)}")


def remedy(package: str) -> str:
    """One sentence that says how to install a package of :data:`EXTRAS`."""
    _, extra = EXTRAS[package]
    return f"Run `pip install 'clantune-scale[{extra}]'`."


def require(package: str, *, needed_by: str) -> None:
    """Raises an error if a package of :data:`EXTRAS` is not installed, before it is needed.

    Args:
        package: as it is imported.
        needed_by: what the user asked for that cannot be done without it.

    Raises:
        ClanError: if it is not installed, with the extra that brings it.
    """
    if not is_installed(package):
        raise missing(package, needed_by=needed_by)
