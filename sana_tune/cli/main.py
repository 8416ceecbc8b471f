"""The command line. Answers at once: torch, diffusers and the run itself are imported only by what needs them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from sana_tune import __version__
from sana_tune.config.files import examples_dir, list_examples
from sana_tune.errors import Interrupted, OthersFailed, UserError, gather
from sana_tune.ranks import Ending, Rank, live_with_launcher, own_rank, told_in

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Train NVIDIA's Sana on your own pictures, from config.json and multidatabackend.json.",
)  # fmt: skip
examples = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List and copy the packaged examples.")
app.add_typer(examples, name="examples")
cache = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None,
    help="Fill, look over, verify and clear the caches of a run. Takes what train takes, --key value too.",
)  # fmt: skip
app.add_typer(cache, name="cache")
checkpoints = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None,
    help="List and verify the checkpoints of a run: of a folder DIR, or of the run that a config names.",
)  # fmt: skip
app.add_typer(checkpoints, name="checkpoint")

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
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show every setting and where it comes from, and end.")
    ] = False,
) -> None:
    """Train. Every setting of config.json can be given as --key value or key=value and wins over the file.

    Without --config, --env or --example: CONFIG_PATH, ./config.json, config/config.json, in this order
    (or .toml, .yaml, .env).
    """
    from sana_tune.cli.loading import load_asked  # pydantic: not for --help

    loaded, notes = load_asked(context.args, config, env, example)
    if print_config:
        from sana_tune.cli.print_config import config_lines

        return typer.echo("\n".join(config_lines(loaded)))
    from sana_tune.launch import is_wanted, launch

    if is_wanted(loaded):
        named = {"--config": config, "--env": env, "--example": example}
        flags = [word for flag, value in named.items() if value is not None for word in (flag, value)]
        return launch(loaded, ["train", *flags, *context.args], notes=notes, restart=restart)
    from sana_tune.run import run  # seconds of torch: only now that the files are known to be right

    run(loaded, notes=notes, restart=restart)


@app.command("options", context_settings={"ignore_unknown_options": True})  # so that --learning_rate is a NAME too
def options(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Settings, by any name.")] = None,
    group: Annotated[str | None, typer.Option(metavar="GROUP", help="List one group of settings.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print all as the page docs/options.md.")] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of config or multidatabackend (NAME).")
    ] = False,
) -> None:
    """List the settings; explain those named, SimpleTuner's names included."""
    from sana_tune.cli.options import show  # pydantic: not for --help

    typer.echo(show(names or [], group=group, as_markdown=markdown, as_schema=schema), nl=False)


@app.command()
def configure(
    images: Annotated[str | None, typer.Option(metavar="DIR", help="Folder of the pictures.")] = None,
    model: Annotated[str | None, typer.Option(metavar="ID", help="Hub id or folder of the model, or nano.")] = None,
    captions: Annotated[str | None, typer.Option(help="textfile, filename or instanceprompt.")] = None,
    subject: Annotated[str | None, typer.Option(metavar="TEXT", help="The caption of instanceprompt.")] = None,
    vram: Annotated[str | None, typer.Option(metavar="GB", help="Memory of the GPU that will train, or cpu.")] = None,
    adapter: Annotated[str | None, typer.Option(help="full: every weight is trained.")] = None,
    resolution: Annotated[str | None, typer.Option(metavar="PX", help="Size, or several: 1024,512.")] = None,
    steps: Annotated[str | None, typer.Option(metavar="N", help='Length in steps, or "20 epochs".')] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Prompt of the previews.")] = None,
    tracking: Annotated[str | None, typer.Option(help="none, wandb, tensorboard or both: wandb,tensorboard.")] = None,
    output: Annotated[str | None, typer.Option(metavar="DIR", help="Folder of the run.")] = None,
    config: Annotated[str | None, typer.Option(metavar="PATH", help="Config file to make or change.")] = None,
    env: Annotated[str | None, typer.Option(metavar="NAME", help="Make or change config/NAME/config.json.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: flags, and defaults for the rest.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
) -> None:
    """Make config.json and multidatabackend.json by a few questions, or by flags; then check them.

    A config that is there already is changed: its values are the defaults, and what is not asked is kept.
    """
    from sana_tune.cli.wizard import Wishes
    from sana_tune.cli.wizard import configure as ask

    flags = {
        "pictures": images, "model": model, "captions": captions, "subject": subject, "target": vram,
        "adapter": adapter, "resolutions": resolution, "length": steps, "prompt": prompt, "tracking": tracking,
        "output": output,
    }  # fmt: skip
    given = {key: text for key, text in flags.items() if text is not None}
    raise typer.Exit(ask(Wishes(given, config, env, yes, overwrite)))


@app.command(context_settings=PASS_THROUGH)
def check(
    context: typer.Context,
    config: Annotated[str | None, typer.Option(metavar="PATH", help="Config file.")] = None,
    env: Annotated[str | None, typer.Option(metavar="NAME", help="Check config/NAME/config.json.")] = None,
    example: Annotated[
        str | None, typer.Option("--example", "-e", metavar="NAME", help="Check a packaged example.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")] = False,
    images: Annotated[
        bool, typer.Option("--images", help="Read every picture whole: torn files, equal ones, near-duplicates.")
    ] = False,
    left_out: Annotated[
        bool, typer.Option("--left-out", help="Print the paths of the pictures that are left out, and nothing else.")
    ] = False,
) -> None:
    """Look a whole run over and end: all that is wrong, and all that will happen. Needs no GPU and no network.

    Takes what train takes, --key value too. Exit code 0 when nothing is wrong, else 1.
    """
    from sana_tune.cli.check import check_asked  # pydantic: not for --help

    raise typer.Exit(check_asked(context.args, config, env, example, as_json=json, images=images, left_out=left_out))


Config = Annotated[str | None, typer.Option("--config", metavar="PATH", help="Config file.")]
Env = Annotated[str | None, typer.Option("--env", metavar="NAME", help="The run of config/NAME/config.json.")]
Example = Annotated[str | None, typer.Option("--example", "-e", metavar="NAME", help="A packaged example.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


@cache.command("warm", context_settings=PASS_THROUGH)
def cache_warm(context: typer.Context, config: Config = None, env: Env = None, example: Example = None) -> None:
    """Make all that the caches lack, and end: what train does before its first step."""
    from sana_tune.cli.loading import load_asked

    loaded, notes = load_asked(context.args, config, env, example)
    from sana_tune.run import warm  # seconds of torch: only now that the files are known to be right

    warm(loaded, notes=notes)


@cache.command("stats", context_settings=PASS_THROUGH)
def cache_stats(
    context: typer.Context, config: Config = None, env: Env = None, example: Example = None, json: Json = False
) -> None:
    """What the caches hold, and what of it this run needs."""
    from sana_tune.cli import cache as told

    with told.asked(context.args, config, env, example) as loaded:
        told.tell_stats(loaded, as_json=json)


@cache.command("verify", context_settings=PASS_THROUGH)
def cache_verify(
    context: typer.Context,
    config: Config = None,
    env: Env = None,
    example: Example = None,
    json: Json = False,
    aside: Annotated[
        bool, typer.Option("--set-aside", help="Set damaged files aside: the next run makes again what is lost.")
    ] = False,
) -> None:
    """Read the caches whole and compare every checksum; exit code 1 when anything is damaged."""
    from sana_tune.cli import cache as told

    with told.asked(context.args, config, env, example) as loaded:
        raise typer.Exit(told.tell_verified(loaded, as_json=json, aside=aside))


@cache.command("gc", context_settings=PASS_THROUGH)
def cache_gc(
    context: typer.Context,
    config: Config = None,
    env: Env = None,
    example: Example = None,
    keep: Annotated[
        list[str] | None, typer.Option("--keep", metavar="CONFIG", help="Keep what this other config needs, too.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove it; without this, it is only said.")] = False,
) -> None:
    """Remove what this run does not need from its caches, and damaged files that were set aside."""
    from sana_tune.cli import cache as told

    with told.asked(context.args, config, env, example) as loaded:
        told.clear(loaded, keep or (), for_good=yes)


@cache.command("explain", context_settings=PASS_THROUGH)
def cache_explain(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A picture, by its path or its name.")],
    config: Config = None,
    env: Env = None,
    example: Example = None,
    json: Json = False,
) -> None:
    """What the cache keys of a picture are made of, and why they hit or miss."""
    from sana_tune.cli import cache as told

    with told.asked(context.args, config, env, example) as loaded:
        raise typer.Exit(told.tell_explained(loaded, file, as_json=json))


Stored = Annotated[
    str, typer.Option("--checkpoint", metavar="PATH", help="A checkpoint: a path, its folder's name, or latest.")
]


@app.command(context_settings=PASS_THROUGH)
def validate(
    context: typer.Context,
    config: Config = None,
    env: Env = None,
    example: Example = None,
    checkpoint: Stored = "latest",
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="Draw this instead of the config's prompts.")
    ] = None,
) -> None:
    """Draw the validation pictures of a checkpoint into the run's folder, as training draws them.

    Takes what train takes, --key value too. Exit code 1 when a picture could not be drawn.
    """
    from sana_tune.cli.draw import validate_asked

    raise typer.Exit(validate_asked(context.args, config, env, example, checkpoint, prompt or ()))


@app.command(context_settings=PASS_THROUGH)
def generate(
    context: typer.Context,
    config: Config = None,
    env: Env = None,
    example: Example = None,
    checkpoint: Stored = "latest",
    ema: Annotated[bool, typer.Option("--ema", help="Draw with the averaged weights.")] = False,
    seed: Annotated[str | None, typer.Option(metavar="N", help="Seed of the first picture.")] = None,
    steps: Annotated[str | None, typer.Option(metavar="N", help="Steps of the sampler.")] = None,
    guidance: Annotated[str | None, typer.Option(metavar="X", help="Guidance scale.")] = None,
    negative: Annotated[str | None, typer.Option(metavar="TEXT", help="Negative prompt.")] = None,
    resolution: Annotated[str | None, typer.Option(metavar="SIZE", help="N or WxH px, comma separated.")] = None,
    images: Annotated[str | None, typer.Option(metavar="N", help="Pictures per prompt, seeds counted up.")] = None,
    output: Annotated[str | None, typer.Option(metavar="PATH", help="A folder, or the file of one picture.")] = None,
) -> None:
    """Draw "a prompt" (or several) with a checkpoint's weights. What is not given is as the config says."""
    from sana_tune.cli.draw import generate_asked

    flags = {
        "validation_seed": seed, "validation_num_inference_steps": steps, "validation_guidance": guidance,
        "validation_negative_prompt": negative, "validation_resolution": resolution, "num_validation_images": images,
    }  # fmt: skip
    generate_asked(context.args, config, env, example, checkpoint, ema=ema, output=output, flags=flags)


@app.command(context_settings=PASS_THROUGH)
def export(
    context: typer.Context,
    config: Config = None,
    env: Env = None,
    example: Example = None,
    checkpoint: Stored = "latest",
    output: Annotated[str | None, typer.Option(metavar="DIR", help="Folder of the pipeline, to be made.")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="The averaged weights in place of the raw ones.")] = False,
    merge: Annotated[bool, typer.Option("--merge", help="An adapter as part of the weights: a pipeline.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a pipeline that is there.")] = False,
) -> None:
    """Write a checkpoint as a complete pipeline for diffusers. The datasets need not be there.

    Without --config, --env or --example, a checkpoint's path is enough: its run's own config.json is beside it.
    """
    from sana_tune.cli.export import export_asked

    how = {"ema": ema, "merge": merge, "overwrite": overwrite}
    export_asked(context.args, config, env, example, checkpoint, output, **how)


Where = Annotated[list[str] | None, typer.Argument(metavar="[DIR | --key value ...]", help="Folder of a run.")]


@checkpoints.command("list", context_settings={"ignore_unknown_options": True})
def checkpoint_list(
    words: Where = None, config: Config = None, env: Env = None, example: Example = None, json: Json = False
) -> None:
    """Step, epoch, date, size and content of each checkpoint, and why it is kept. Incomplete ones are named."""
    from sana_tune.cli import checkpoint as told

    with told.interruptible():
        told.tell_list(words or (), config, env, example, json)


@checkpoints.command("verify", context_settings={"ignore_unknown_options": True})
def checkpoint_verify(
    words: Where = None, config: Config = None, env: Env = None, example: Example = None, json: Json = False
) -> None:
    """Read the checkpoints whole and compare every checksum; exit code 1 when anything is wrong."""
    from sana_tune.cli import checkpoint as told

    with told.interruptible():
        raise typer.Exit(told.tell_verified(words or (), config, env, example, json))


@app.command()
def bench(
    model: Annotated[str, typer.Option(metavar="NAME", help="sana-1.6b-1024, sana-600m-512 …, or nano.")] = "nano",
    batch: Annotated[str, typer.Option(metavar="N,N", help="Pictures per step.")] = "1",
    resolution: Annotated[int | None, typer.Option(metavar="PX", help="Side; default the model's own.")] = None,
    tokens: Annotated[int, typer.Option(min=1, max=300, metavar="N", help="Text tokens of the longest caption.")] = 300,
    variants: Annotated[
        str, typer.Option(metavar="NAMES", help="Some of diffusers, eager, compiled.")
    ] = "diffusers,eager,compiled",
    optimizers: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Names, with :bf16, :release (:clip in two passes), :ema or :ema_cpu: bnb-lion8bit:bf16:release.",
        ),
    ] = "optimi-adamw",
    intervals: Annotated[
        str, typer.Option(metavar="N,N", help="Blocks recomputed: 0 none, n every n-th, selective.")
    ] = "0,1",
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Steps that are timed, after three.")] = 10,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    json: Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the numbers there too.")] = None,
) -> None:
    """Time training steps of a model with random weights: speed, memory, what compiling brings. Downloads nothing."""
    from sana_tune.bench import Asked
    from sana_tune.cli.bench import bench_asked, listed, numbers

    asked = Asked(
        model, numbers(batch, "--batch"), listed(variants), listed(optimizers), listed(intervals), resolution, tokens,
        steps, device,
    )  # fmt: skip
    bench_asked(asked, typer.echo, Path(json) if json else None)


@app.command()
def fit(
    vram: Annotated[
        str | None, typer.Option(metavar="GB", help="Memory of the card; default: of the GPU that is here.")
    ] = None,
    config: Annotated[str | None, typer.Option(metavar="PATH", help="Config file to make fit.")] = None,
    env: Annotated[str | None, typer.Option(metavar="NAME", help="Make config/NAME/config.json fit.")] = None,
    model: Annotated[str | None, typer.Option(metavar="ID", help="Make a config from nothing for this model.")] = None,
    resolution: Annotated[int | None, typer.Option(metavar="PX", help="With --model: size of the pictures.")] = None,
    output: Annotated[
        str | None, typer.Option(metavar="PATH", help="Config to write; default: beside the other, named by the card.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    tries: Annotated[
        bool | None,
        typer.Option("--try/--no-try", help="Do a step on the GPU before writing; default: where there is one."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to try: auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Find settings with which full-rank training fits a card, by the plan's estimates, and write a config.

    What costs least comes first: blocks recomputed; fewer pictures at a time, accumulated; the EMA in main memory; bf16
    weights with Kahan summation; gradients released one by one; optimizer states of 8 bits; 8-bit Lion paged to main
    memory; fewer pictures a step.
    """
    from sana_tune.cli.fit import Asked, fit_asked  # pydantic: not for --help

    asked = Asked(vram, config, env, model, resolution, output, overwrite, tries, device)
    raise typer.Exit(fit_asked(asked, typer.echo))


@app.command()
def report(
    folders: Annotated[list[str], typer.Argument(metavar="DIR...", help="Folders of runs: their output_dir.")],
    output: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Where to write it; default report.html, or report_compared.html, in DIR."),
    ] = None,
) -> None:
    """Write the report of a run, or of several beside each other, as one file for a browser. Needs no network.

    A run writes its own while it goes on; this writes it anew, of a run that failed or was moved, too.
    """
    from sana_tune.cli.report import report_asked

    typer.echo(f"wrote {report_asked([Path(folder) for folder in folders], Path(output) if output else None)}")


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
    if (folder := told_in()) is not None:
        sys.exit(launched(folder, arguments))
    sys.exit(exit_code(arguments))


def launched(folder: Path, arguments: Sequence[str] | None = None) -> int:
    """`exit_code` of a process that `train` launched: what it has to say is said by the launcher, once for all.

    To leave after a signal is no failure: the launcher would end the others for that.
    """
    live_with_launcher()
    rank = (own_rank() or Rank()).rank
    try:
        app(args=None if arguments is None else list(arguments), prog_name="sana_tune")
        ending = Ending(rank, 0)
    except SystemExit as ended:
        ending = Ending(rank, int(ended.code or 0))
    except UserError as error:
        ending = Ending(rank, 1, error.problems, lost=isinstance(error, OthersFailed))
    except Interrupted as error:
        ending = Ending(rank, error.exit_code)
    ending.write(folder)
    return 0 if ending.code > 128 else ending.code


def exit_code(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and answer its exit code: 0 done, 1 a mistake or failure, 128 + n ended by signal n."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="sana_tune")
        return 0
    except SystemExit as ended:
        return 1 if ended.code == 2 else int(ended.code or 0)  # a usage error is the user's mistake like any other
    except UserError as error:
        if _is_told_by_another():
            return 1
        if len(error.problems) > 1:
            _say(f"{len(error.problems)} things are wrong; nothing was started")
        for problem in error.problems:
            _say(f"error: {problem}")
        return 1
    except Interrupted as error:
        _say(str(error))
        return error.exit_code


def _is_told_by_another() -> bool:
    """Whether a process beside this one finds the same and tells it: until the processes of a run (`torchrun`) are
    connected to each other, the first one of each machine speaks."""
    rank = gather([], own_rank) or Rank()
    torch = sys.modules.get("torch")
    return rank.local > 0 and not (torch is not None and torch.distributed.is_initialized())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
