"""The command line. Answers at once: torch, diffusers and the run itself are imported only by what needs them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from sana_tune import __version__
from sana_tune.config.files import examples_dir, find_config, list_examples
from sana_tune.errors import Interrupted, Problem, UserError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Train NVIDIA's Sana on your own pictures, from config.json and multidatabackend.json.",
)  # fmt: skip
examples = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List and copy the packaged examples.")
app.add_typer(examples, name="examples")

ONE = (None, "", "0", "1")  # values of TRAINING_NUM_PROCESSES that ask for one process

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"sana_tune {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", "-v", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


@app.command(context_settings=PASS_THROUGH)
def train(
    context: typer.Context,
    config: Annotated[str | None, typer.Option(metavar="PATH", help="Config file.")] = None,
    env: Annotated[str | None, typer.Option(metavar="NAME", help="Run config/NAME/config.json.")] = None,
    example: Annotated[
        str | None, typer.Option("--example", "-e", metavar="NAME", help="Run a packaged example.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew: set the checkpoints of output_dir aside.")
    ] = False,
) -> None:
    """Train. Every setting of config.json can be given as --key value or key=value and wins over the file.

    Without --config, --env or --example: CONFIG_PATH, ./config.json, config/config.json, in this order.
    """
    from sana_tune.config.load import load, parse_overrides  # pydantic: not for --help

    overrides = parse_overrides(context.args)
    env, example = overrides.pop("env", env), overrides.pop("example", example)
    _check_processes()
    path, notes = find_config(config, env, example, os.environ, Path.cwd())
    loaded = load(path, overrides)
    from sana_tune.run import run  # seconds of torch: only now that the files are known to be right

    run(loaded, notes=notes, restart=restart)


def _check_processes() -> None:
    """Raise UserError where the environment asks for more than this one process."""
    asked = {name: os.environ.get(name) for name in ("TRAINING_NUM_PROCESSES", "TRAINING_NUM_MACHINES")}
    what = "training runs in one process for now; found {}"
    problems = [Problem(name, what.format(value), "unset it") for name, value in asked.items() if value not in ONE]
    if problems:
        raise UserError(*problems)


@examples.command("list")
def examples_list() -> None:
    """The packaged examples, each with the first line of its README."""
    for name in list_examples():
        readme = examples_dir() / name / "README.md"
        lines = readme.read_text(encoding="utf-8").splitlines() if readme.is_file() else []
        title = next((line.lstrip("# ").strip() for line in lines if line.strip()), "")
        typer.echo(f"{name:32} {title}")


@examples.command("copy")
def examples_copy(
    name: Annotated[str, typer.Argument(help="Name of the example.")],
    dest: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder to make; default config/examples/NAME.")
    ] = None,
) -> None:
    """Copy a packaged example to a folder of your own, its paths pointing to the copy."""
    from sana_tune.cli.examples import copy_example

    target = copy_example(name, Path(dest) if dest else None)
    typer.echo(f"copied to {target}; run it with: sana_tune train --config {target / 'config.json'}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: runs the command and turns what went wrong into one message and an exit code (contracts §2)."""
    sys.exit(exit_code(arguments))


def exit_code(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and answer its exit code: 0 done, 1 a mistake or failure, 128 + n ended by signal n."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="sana_tune")
        return 0
    except SystemExit as ended:
        return 1 if ended.code == 2 else int(ended.code or 0)  # a usage error is the user's mistake like any other
    except UserError as error:
        if len(error.problems) > 1:
            _say(f"{len(error.problems)} things are wrong; nothing was started")
        for problem in error.problems:
            _say(f"error: {problem}")
        return 1
    except Interrupted as error:
        _say(str(error))
        return error.exit_code


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
