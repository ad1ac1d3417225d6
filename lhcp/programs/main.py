"""The console program: it finds the command, which reads the rest of the line."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from lhcp.console import escape_unprintable

COMMANDS = {
    "train": "train a recipe: lighthouse, then dense",
    "export": "write a trained model in the layout of Hugging Face's Llama",
    "overhead": "what does sharing a sequence cost these ranks, for sizes of yours?",
    "calibrate": "measure the table by which a rotation is chosen on these ranks",
    "doctor": "what does this machine have, what would be chosen, and what is wrong?",
}

USAGE = """usage: lhcp COMMAND ...    (on several ranks: torchrun ... -m lhcp COMMAND ...)

{commands}

lhcp COMMAND --help says more; lhcp --version. All of them need pip install 'lhcp[train]'."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name; None: those of this process."""
    escape_unprintable()
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help", "help"):
        rows = "\n".join(f"  {command:<11}{said}" for command, said in COMMANDS.items())
        print(USAGE.format(commands=rows))
    elif name == "--version":
        print(version("lhcp"))
    elif name not in COMMANDS:
        sys.exit(f"lhcp {name}: no such command; there are {', '.join(COMMANDS)}")
    else:
        run(name, rest)


def run(name: str, rest: Sequence[str]) -> None:
    """Import a command and start it."""
    try:
        command = import_module(f"lhcp.programs.{name}")
    except ModuleNotFoundError as error:
        # One of ours that is missing is our own mistake.
        if error.name is None or error.name.split(".")[0] == "lhcp":
            raise
        sys.exit(f"lhcp {name} needs the package {error.name}: pip install 'lhcp[train]'")
    command.start(rest)
