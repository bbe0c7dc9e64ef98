"""``clantune completion``: what a shell needs to complete our commands, by argcomplete."""

from __future__ import annotations

import argparse

from clantune_scale.cli.command import Answer, Command
from clantune_scale.core.extras import require


def complete(parser: argparse.ArgumentParser) -> None:
    """Answers the shell if it asks for completions. Without argcomplete it does not ask."""
    try:
        import argcomplete
    except ImportError:
        return
    argcomplete.autocomplete(parser)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def _run(arguments: argparse.Namespace) -> Answer:
    require("argcomplete", needed_by="clantune completion")
    import argcomplete

    code = argcomplete.shellcode(["clantune"], shell=arguments.shell)
    return Answer(code, {"shell": arguments.shell, "code": code})


COMMAND = Command(
    name="completion",
    summary="print what makes a shell complete clantune's commands",
    description="Prints shell code that completes clantune's commands and options.",
    examples="""  eval "$(clantune completion bash)"     # in ~/.bashrc
  clantune completion fish > ~/.config/fish/completions/clantune.fish""",
    add_arguments=_add_arguments,
    run=_run,
)
