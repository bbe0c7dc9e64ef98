"""``python -m tests.hidden_packages A,B SCRIPT [ARGUMENTS]``: runs a script as if packages A and B were not there."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class WithoutSome(PathFinder):
    """Python's own search along ``sys.path``, which finds some packages nowhere."""

    hidden: frozenset[str] = frozenset()

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        is_hidden = fullname.partition(".")[0] in cls.hidden
        return None if is_hidden else super().find_spec(fullname, path, target)


if __name__ == "__main__":
    WithoutSome.hidden = frozenset(sys.argv[1].split(","))
    sys.meta_path[:] = [WithoutSome if finder is PathFinder else finder for finder in sys.meta_path]
    del sys.argv[:2]
    runpy.run_path(sys.argv[0], run_name="__main__")
