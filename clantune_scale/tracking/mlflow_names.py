"""Names that MLflow takes, made of names that it may refuse: a gene's, or a parameter group's in it."""

from __future__ import annotations

import hashlib
import re

# MLflow 3.17: MAX_ENTITY_KEY_LENGTH, and the letters of `validate_param_and_metric_name`.
_MAX_LENGTH = 250
_REFUSED = re.compile(r"[^\w./ :-]")


def allowed(name: str) -> str:
    """The name itself if MLflow takes it, else one that it takes and that no other name gets.

    MLflow allows some letters only, at most 250 of them, and wants a name that would be the same as a normalized path.
    The same name is always spelt alike, so that a resumed run goes on in the same charts.
    """
    parts = _REFUSED.sub("_", name).split("/")
    spelt = "/".join("_" if part in ("", ".", "..") else part for part in parts)
    if spelt == name and len(name) <= _MAX_LENGTH:
        return name
    # Two names must not become one: their values would be mixed in one chart, and a parameter cannot be set twice.
    mark = "-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return spelt[: _MAX_LENGTH - len(mark)] + mark
