"""The command's entry: the table of commands, each module imported only when it is the one to run."""

from __future__ import annotations

import importlib
import sys

import typer

from sailfish.cli import aliases, errors
from sailfish.version import __version__

COMMANDS = {
    "serve": "Serve a model over HTTP with OpenAI's API.",
    "generate": "Continue a prompt, or answer a batch of JSON lines.",
    "chat": "Talk to a model in the terminal.",
    "build": "Turn a checkpoint into an engine directory.",
    "compress": "Turn a checkpoint into a smaller one, and tell what it cost.",
    "distill": "Train a pruned model or a draft on what a teacher finds likely.",
    "recipe": "List, print and compare the recipes of compress.",
    "plan": "Show the memory a model needs, here or on another device.",
    "explain": "Show every setting and op as asked for, as active, and why.",
    "eval": "Measure perplexity, the distance to a parent, and scores on tasks.",
    "convert": "Write a quantised checkpoint in another tool's format, exactly.",
    "inspect": "Describe a checkpoint or an engine directory.",
    "verify": "Check every byte of an engine directory.",
    "doctor": "Check this machine; say what to fix and how.",
    "bench": "Measure a model's speed and memory; store the figures.",
    "walk": "Print the code that one request passes through.",
    "demo": "Build, serve and ask the packaged model: the place to start.",
    "version": "Print the version.",
}

_EPILOG = """Begin with `sailfish demo`; `sailfish COMMAND --help` tells what a command does and takes.
Exit status: 2 for what you can mend, 3 when a build failed, 4 when an engine did, else 0 or 1."""


def application(argv: list[str]) -> typer.Typer:
    """Return the command line: the command that `argv` names is loaded, the others are only named."""
    app = typer.Typer(
        name="sailfish",
        help="Serve Hugging Face language models over HTTP, or use them here in the terminal.",
        epilog=_EPILOG,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    wanted = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        if name == wanted:
            module = importlib.import_module(f"sailfish.cli.{name}")
            found = getattr(module, name)
            if isinstance(found, typer.Typer):
                app.add_typer(found, name=name, short_help=summary)
            else:
                app.command(name, short_help=summary)(found)
        else:
            app.command(name, short_help=summary)(_unloaded)
    app.callback()(_root)
    return app


def _unloaded() -> None:
    """Stand in the list of commands for one that this call does not run."""


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"sailfish {__version__}")
        raise typer.Exit


def _root(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error; works anywhere."),
    version: bool = typer.Option(
        False, "--version", "-V", help="Print the version and exit.", callback=_print_version, is_eager=True
    ),
) -> None:
    """Declare the flags that every command shares; `main` and the callbacks act on them."""


def main() -> None:
    """Run the command line of this process and exit with its status."""
    argv = [word for word in sys.argv[1:] if word != "--debug"]
    debug = len(argv) < len(sys.argv) - 1
    with errors.shown(debug=debug):
        words = aliases.translate(argv)
        application(words)(words, prog_name="sailfish")


if __name__ == "__main__":
    main()
