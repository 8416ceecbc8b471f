"""The pages: generated ones are fresh; commands, settings, JSON and links in them exist; every error is explained."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from jsonschema import Draft202012Validator

from sana_tune.cli.main import app, exit_code
from sana_tune.config import choices, legacy
from sana_tune.config.caption_edits import CaptionShuffle
from sana_tune.config.datasets import DATASET_KINDS
from sana_tune.config.describe import SCHEMAS, schema_path
from sana_tune.config.json_schema import json_schema
from sana_tune.config.load import load
from sana_tune.config.lycoris import LycorisFile, Override, lycoris_of
from sana_tune.config.prompt_library import PromptEntry, read_library
from sana_tune.config.schema import section_of
from sana_tune.config.sources import FILTER_KEYS, HUB_KEYS, TABLE_KEYS
from sana_tune.config.validation_rules import SCRIPT_PLACEHOLDERS
from sana_tune.config.watching import WEBHOOK_KEYS
from scripts import build_docs
from tests.journeys import test_mistakes as mistakes
from tests.journeys.kit import pictures, small_run

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
READMES = (ROOT / "README.md", *sorted((ROOT / "config" / "examples").glob("*/README.md")))
PAGES = (*sorted(DOCS.glob("*.md")), *READMES)
TROUBLE = DOCS / "troubleshooting.md"
FENCE = re.compile(r"^```(\S*) ?(\S*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
KEYS = {*section_of(), *(key for kind in DATASET_KINDS.values() for key in kind.model_fields)}
KNOWN_KEYS = KEYS | legacy.known_foreign_keys()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# ---- what scripts/build_docs.py writes ----


def test_the_generated_files_are_fresh(capsys):
    assert build_docs.main(["--check"]) == 0, f"run scripts/build_docs.py\n{capsys.readouterr().out}"
    assert set(build_docs.pages()) == {DOCS / "options.md", *map(schema_path, SCHEMAS)}


def test_an_old_or_missing_file_is_seen_and_written(tmp_path, monkeypatch, capsys):
    pages = {tmp_path / "docs" / "new.md": "text\n", tmp_path / "old.md": "now\n", tmp_path / "right.md": "same\n"}
    (tmp_path / "old.md").write_text("then\n")
    (tmp_path / "right.md").write_text("same\n")
    monkeypatch.setattr(build_docs, "ROOT", tmp_path)
    monkeypatch.setattr(build_docs, "pages", lambda: pages)
    assert build_docs.main(["--check"]) == 1
    assert capsys.readouterr().out.splitlines() == ["out of date: docs/new.md", "out of date: old.md"]
    assert not (tmp_path / "docs").exists()
    assert build_docs.main([]) == 0 and build_docs.main(["--check"]) == 0
    assert (tmp_path / "docs" / "new.md").read_text() == "text\n"


def test_the_wheel_holds_the_schemas():
    """The wheel takes all of sana_tune/ (test_packaging.py looks into it), so it is enough that they are in there."""
    for name in SCHEMAS:
        assert schema_path(name).relative_to(ROOT / "sana_tune").parts[0] == "assets"
        assert json.loads(text_of(schema_path(name))) == json_schema(name)


# ---- JSON in the pages ----


def json_blocks() -> list[tuple[str, str, str]]:
    """(page, kind, text) of every block of JSON; kind is the word behind `json`."""
    return [(name_of(page), kind, text) for page in PAGES for tongue, kind, text in FENCE.findall(text_of(page))
            if tongue == "json"]  # fmt: skip


def test_how_much_json_there_is():
    kinds = [kind for _, kind, _ in json_blocks()]
    assert set(kinds) == {"config", "datasets", "prompts", "lycoris"} and len(kinds) >= 10


@pytest.mark.parametrize("page, kind, text", json_blocks())
def test_json_in_the_pages_is_right(page, kind, text, tmp_path):
    content = json.loads(text)
    config: dict[str, Any] = {"pretrained_model_name_or_path": "nano", "data_backend_config": str(tmp_path / "d.json")}
    entries: Any = [{"id": "stand-in", "instance_data_dir": "datasets/stand-in"}]
    if kind == "lycoris":
        assert lycoris_of(content, page).algo == "lokr"
        return
    if kind == "prompts":
        (tmp_path / "p.json").write_text(text)
        assert read_library(str(tmp_path / "p.json"), "validation")
        return
    schema = Draft202012Validator(json_schema("config" if kind == "config" else "multidatabackend"))
    if kind == "config":
        config = {**config, **content, "data_backend_config": str(tmp_path / "d.json")}
        assert [error.message for error in schema.iter_errors(config)] == []
    else:
        entries = content
        assert [error.message for error in schema.iter_errors(entries)] == []
    (tmp_path / "d.json").write_text(json.dumps(entries))
    (tmp_path / "c.json").write_text(json.dumps(config))
    assert load(tmp_path / "c.json", {}, {"PICTURES": "pictures"}).datasets


# ---- commands and settings in the pages ----


def commands() -> list[tuple[str, str]]:
    """(page, command) of every command of ours, in blocks of bash and in the text."""
    found = []
    for page in PAGES:
        text = text_of(page)
        lines = [line for tongue, _, block in FENCE.findall(text) if tongue == "bash" for line in block.splitlines()]
        lines += re.findall(
            r"`((?:sana_tune|\./train\.sh|\./scripts)[^`\n]*)`",
            re.sub(r"^>.*", "", FENCE.sub("", text), flags=re.MULTILINE),
        )
        found += [(name_of(page), line.partition(" #")[0].strip()) for line in lines]
    ours = re.compile(r"(sana_tune|\./train\.sh|\./?scripts/\S+|python scripts/\S+)(\s|$)")
    return [(page, command) for page, command in dict.fromkeys(found) if ours.match(command)]


def test_how_many_commands_there_are():
    names = {command.split()[1] for _, command in commands() if command.startswith("sana_tune ")}
    assert names >= {"train", "check", "configure", "options", "examples"} and len(commands()) >= 40


@pytest.mark.parametrize("page, command", commands())
def test_a_command_in_the_pages_exists(page, command):
    words = shlex.split(command)
    program = words.pop(0)
    if program == "python" or program.startswith("./scripts"):
        script = words.pop(0) if program == "python" else program
        assert (ROOT / script).is_file()
        return
    if program == "./train.sh":
        words.insert(0, "train")
    here: Any = typer.main.get_command(app)
    while "commands" in vars(here) and words and not words[0].startswith("-"):
        assert words[0] in here.commands, f"{page}: there is no command {words[0]}"
        here = here.commands[words.pop(0)]
    flags = {flag for parameter in here.params for flag in parameter.opts} | {"--help"}
    takes_settings = here.context_settings.get("ignore_unknown_options")
    for word in words:
        flag = word.partition("=")[0]
        if flag.startswith("-") and flag not in flags:
            assert takes_settings and flag.removeprefix("--") in KEYS, f"{page}: {here.name} has no {flag}"


# Names with an underscore that are no settings.
OTHER_NAMES = frozenset({
    "sana_tune", "text_embeds", "pixel_area", "constant_with_warmup", "user_prompt_library", "transformer_ema",
    "validation_images", "huggingface_hub", "cosine_with_restarts", "cosine_with_warmup", "image_embeds",
    "instance_prompt", "save_to_disk", "ema_only",
    # of the numbers of a step, of raw messages and of trackers
    "grad_norm", "step_s", "job_id", "image_names", "eta_seconds", "is_final", "init_text_embed_cache",
    "init_vae_cache", "init_resume_checkpoint", "benchmark_base_model", "final_validation",
    "training_complete", "training_abort",
    "distributed_type", "fsdp_config", "fsdp_version", "gpu_ids", "fully_shard", "fsdp_reshard_after_forward",
    "memory_bytes", "by_sigma", "first_batches", "rank_dropout", "module_dropout", "use_scalar", "train_norm",
})  # fmt: skip
# Keys inside of blocks.
BLOCK_KEYS = {*TABLE_KEYS, *HUB_KEYS, *FILTER_KEYS, *WEBHOOK_KEYS, *(field.name for field in fields(CaptionShuffle)),
              *LycorisFile.model_fields, *Override.model_fields, "apply_preset",
              *PromptEntry.model_fields, *SCRIPT_PLACEHOLDERS}  # fmt: skip


def test_settings_in_the_pages_exist():
    """Whatever looks like a setting in the text is one, of ours or of SimpleTuner's."""
    named = re.compile(r'"?(?:--)?([a-z]+(?:_[a-z0-9]+)+)"?(?::.*)?')
    values = {
        value
        for table in (legacy.LATER_VALUES, legacy.SAME_VALUE, legacy.REFUSED_VALUES)
        for names in table.values()
        for value in names
    } | {name for table in vars(choices).values() if isinstance(table, dict) for name in table}
    seen: set[str] = set()
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", FENCE.sub("", text_of(page))):
            match = named.fullmatch(code)
            if match:
                seen.add(match[1])
                assert match[1] in KNOWN_KEYS | OTHER_NAMES | BLOCK_KEYS | values, f"{name_of(page)}: {code}"
    assert len(seen & KEYS) >= 70 and len(seen - KEYS) >= 180


# ---- links and places ----


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(page))):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_file(), f"{name_of(page)}: {target}"
        assert not anchor or anchor in anchors(linked), f"{name_of(page)}: {target}"


def test_every_page_is_reached():
    index = text_of(DOCS / "index.md")
    names = {page.name for page in DOCS.glob("*.md")} - {"index.md"}
    assert names >= {"install.md", "quickstart.md", "datasets.md", "options.md", "troubleshooting.md", "first-run.md",
                     "coming-from-simpletuner.md"}  # fmt: skip
    assert [name for name in names if f"]({name})" not in index] == []
    assert "docs/index.md" in text_of(ROOT / "README.md")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_place_of_a_machine(page):
    assert re.findall(r"(?<![\w.{}])/(?:work|home|root|opt|tmp|mnt|Users)/\S*", text_of(page)) == []


def test_the_quickstart_answers_every_section_of_the_guide():
    assert re.findall(r"^## (.+)$", text_of(DOCS / "quickstart.md"), re.MULTILINE) == [
        "Hardware", "Prerequisites and installing", "Configuration", "Scheduled sampling", "Validation prompts",
        "CLIP scores, evaluation loss, previews", "Flow shift", "Datasets", "Logging in", "Running",
        "Notes of the guide",
    ]  # fmt: skip


# ---- troubleshooting ----


# How pydantic begins, once build.py has reworded it; the mistakes below are really made.
PYDANTIC = ("must be a valid ", "must be a finite number", "must be greater than ", "must be less than ")


def sections() -> dict[str, list[str]]:
    """Section → the messages it quotes."""
    parts = re.split(r"^## (.+)$", text_of(TROUBLE), flags=re.MULTILINE)
    return {
        head: re.findall(r"^> `(.+)`$", body, re.MULTILINE) for head, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def pieces(quote: str) -> list[str]:
    """What a quoted message says literally: what stands between the dots."""
    return [piece for piece in re.split("…", quote.replace("{…}", "\0")) if piece.strip(" ;:,.()\0")]


def as_pattern(quote: str) -> re.Pattern[str]:
    return re.compile(".*?".join(map(re.escape, quote.split("…"))), re.DOTALL)


@cache
def sources() -> tuple[str, ...]:
    """Every text in the code but docstrings, f-strings in their parts; and pydantic's messages as we word them."""
    found = set(PYDANTIC)
    for path in (ROOT / "sana_tune").rglob("*.py"):
        tree = ast.parse(text_of(path))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docs)
        found |= {text for text in texts if isinstance(text, str)}
    return tuple(text.replace("{…}", "\0") for text in found)


def is_said(piece: str) -> bool:
    """Whether the code holds this piece of a message: within one text, or the end of one and the begin of another."""
    if any(piece.strip() in text for text in sources()):
        return True
    halves = [(piece[:at].strip(), piece[at:].strip()) for at, letter in enumerate(piece) if letter == " "]
    return any(
        any(text.rstrip().endswith(first) for text in sources()) and any(text.startswith(rest) for text in sources())
        for first, rest in halves
        if min(len(first), len(rest)) >= 6
    )


def quotes() -> Iterator[tuple[str, str]]:
    return ((head, quote) for head, found in sections().items() for quote in found)


def test_every_section_is_in_the_table_and_quotes_messages():
    heads = list(sections())
    table = re.findall(r"^\| .+ \| \[(.+)\]\(#.+\) \|$", text_of(TROUBLE), re.MULTILINE)
    assert table == heads and len(heads) >= 12
    assert [head for head, found in sections().items() if not found] == []
    assert len(list(quotes())) >= 80


@pytest.mark.parametrize("head, quote", list(quotes()))
def test_a_quoted_message_is_one_that_is_printed(head, quote):
    assert sum(map(len, pieces(quote))) >= 10, "too little to find a message by"
    assert [piece for piece in pieces(quote) if not is_said(piece)] == []


def test_an_invented_message_is_seen():
    assert not is_said("the picture is too pretty") and not is_said("there is no such options")
    assert is_said("there is no such setting") and is_said("the folder does not exist")


def test_every_mistake_is_explained(tmp_path, monkeypatch, capsys):
    """What the table of mistakes makes the program say, message by message, is quoted in some section."""
    patterns = {as_pattern(quote): head for head, quote in quotes()}
    unexplained: list[str] = []
    used: set[str] = set()
    for number, (change, flags, _) in enumerate(mistakes.MISTAKES.values()):
        folder = tmp_path / str(number)
        pictures(folder / "pictures", 3)
        small_run(folder)
        monkeypatch.chdir(folder)
        change(folder)
        assert exit_code(["train", *flags.split()]) == 1
        for message in capsys.readouterr().err.split("error: ")[1:]:
            said = message.split("\n  → ")[0]
            heads = {head for pattern, head in patterns.items() if pattern.search(said)}
            used |= heads
            unexplained += [] if heads else [said]
    assert unexplained == []
    assert len(mistakes.MISTAKES) >= 80 and len(used) >= 10
