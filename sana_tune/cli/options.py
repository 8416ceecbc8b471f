"""What `sana_tune options` prints: the settings, one of them, or all of them as the page docs/options.md. No torch."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence

from sana_tune.config import legacy
from sana_tune.config.arguments import plain as plain_key
from sana_tune.config.describe import FILES, SCHEMAS, Foreign, Option, foreign_keys, groups, options, told
from sana_tune.config.json_schema import json_schema
from sana_tune.config.values import nearest
from sana_tune.errors import Problem, UserError

WIDTH = 80
COMMAND = "sana_tune options"

# What becomes of SimpleTuner's keys, in the order of the page: fate → (title, what that means).
FATES: dict[str, tuple[str, str]] = {
    "renamed": ("Renamed", "Read under the new name. Both names at once are a mistake."),
    "later": (
        "Not built yet, and refused",
        "They change what is trained, so a run that would pass over them would be another run than the one asked "
        "for. A value that means off (`false`, `0`, `null`, `\"\"`, `\"none\"`) passes.",
    ),
    "later output": (
        "Not built yet, and without effect",
        "They add output alone: accepted, with a note at start.",
    ),
    "no effect": ("Without effect", "There is nothing to set here; the reason is said at start."),
    "refused": ("Refused", "Refused unless off; what to do instead is said."),
}  # fmt: skip

INTRODUCTIONS: dict[str, str] = {
    "config": "`config.json`",
    "dataset": "`multidatabackend.json`, an entry for pictures; it also takes the settings marked ◆ above.",
    "conditioning": '`multidatabackend.json`, an entry with `"dataset_type": "conditioning"`; pictures name it.',
    "text_embeds": '`multidatabackend.json`, the entry with `"dataset_type": "text_embeds"`; it may be left out.',
}


def show(names: Sequence[str], *, group: str | None, as_markdown: bool, as_schema: bool) -> str:
    """What the command prints, by its arguments. Raises UserError for what cannot be combined or is not known."""
    asked = [flag for flag, given in (("--group", group is not None), ("--markdown", as_markdown)) if given]
    asked += ["--schema"] if as_schema else ["NAME"] if names else []
    if len(asked) > 1:
        raise UserError(Problem(COMMAND, f"{' and '.join(asked)} cannot be combined", "ask for one of them"))
    if as_markdown:
        return markdown()
    if as_schema:
        return schema_text(names)
    return ("\n\n".join(map(detail, names)) if names else listing(group)) + "\n"


def schema_text(names: Sequence[str]) -> str:
    """The JSON Schema of "config" (no name) or "multidatabackend", as it stands in assets/schemas."""
    name = names[0] if names else "config"
    if len(names) > 1 or name not in SCHEMAS:
        raise UserError(Problem("--schema", f"there are schemas of {' and '.join(SCHEMAS)}", "name one of them"))
    return json.dumps(json_schema(name), indent=1, ensure_ascii=False) + "\n"


def listing(group: str | None = None) -> str:
    """All settings by group, or those of one group, for a terminal. Raises UserError for a group that is none."""
    titles = groups()
    if group is not None and group not in titles:
        guess = nearest(group, titles)
        fix = f"did you mean {guess}? " if guess else ""
        raise UserError(Problem("--group", f"there is no group {group!r}", f"{fix}known: {', '.join(titles)}"))
    wanted = titles if group is None else {group: titles[group]}
    parts = []
    for name, title in wanted.items():
        lines = [f"{title}  (--group {name})"]
        for option in (option for option in options() if option.group == name):
            lines += [*_headline(option), *_wrapped(option.meaning, "      ")]
        parts.append("\n".join(lines))
    if group is None:
        count = len({option.name for option in options()})
        parts.append("\n".join(_wrapped(f"{count} settings. `{COMMAND} NAME` tells more of one of them.", "")))
    return "\n\n".join(parts)


def _headline(option: Option) -> list[str]:
    """A setting with its default, and what it takes where that fits beside it."""
    line, takes = f"  {option.name} = {option.default_words}", f"  ({option.type_words})"
    if len(option.choices) == 1:  # the default is all there is
        return [line]
    if len(line + takes) <= WIDTH:
        return [line + takes]
    return [line, *_wrapped(takes.strip(), "      ")]


def detail(written: str) -> str:
    """All about one setting, or what becomes of a key of SimpleTuner's. Raises UserError for a name nobody knows."""
    name = plain_key(written)
    old = {foreign.name: foreign for foreign in foreign_keys()}
    parts = [] if name not in old else ["\n".join(_wrapped(f"{name}: {_fate(old[name])}", "", "  "))]
    wanted = old[name].text if name in old and old[name].fate == "renamed" else name
    parts += [_detail(option) for option in options() if option.name == wanted]
    if parts:
        return "\n\n".join(parts)
    if name in groups():
        fix = f"it is a group of settings: {COMMAND} --group {name}"
    else:
        names = list(dict.fromkeys(option.name for option in options()))
        inside = [key for key in names if name in key.split("_")]
        guess = nearest(name, [*names, *old])
        fix = f"did you mean {guess}?" if guess else f"`{COMMAND}` lists them"
        fix = f"it is part of these: {', '.join(inside)}" if inside else fix
    raise UserError(Problem(written, "there is no such setting", fix))


def _detail(option: Option) -> str:
    where = f"{FILES[option.home]}" + ("; a dataset's own value wins" if option.shared else "")
    rows = [("in", where), ("type", option.type + (f" ({option.unit})" if option.unit else ""))]
    if option.range:
        rows.append(("range", option.range))
    rows.append(("default", option.default_words))
    if option.aliases:
        rows.append(("also read as", ", ".join(option.aliases)))
    same = legacy.SAME_VALUE.get(option.name, {})
    rows += [("same value", f"{old} = {new}") for old, new in same.items()]
    rows += [("not built yet", f"{', '.join(values)}: {fix}") for fix, values in _later(option.name).items()]
    lines = [option.name, *_wrapped(option.meaning, "  ")]
    for choice, meaning in option.choices.items():
        lines += _wrapped(f"{choice}: {meaning}" if meaning else choice, "    ", "      ")
    for label, text in rows:
        lines += _wrapped(f"{label:14}{text}", "  ", " " * 16)
    return "\n".join(lines)


def _fate(foreign: Foreign) -> str:
    if not foreign.off:
        return told(foreign)
    off = ", ".join(dict.fromkeys(str(value).lower() for value in foreign.off))
    return f"{told(foreign)} (also off: {off})"


def _wrapped(text: str, indent: str, further: str | None = None) -> list[str]:
    """Lines of at most WIDTH characters; a long word stays whole."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent if further is None else further,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


# ---- docs/options.md ----


def markdown() -> str:
    """The page docs/options.md."""
    return "\n".join([*_head(), *_settings(), *_foreign()]) + "\n"


def _head() -> list[str]:
    return [
        "# Settings",
        "",
        "<!-- written by scripts/build_docs.py; edit schema.py, datasets.py or legacy.py -->",
        "",
        "Every setting of `config.json` and `multidatabackend.json`, and every key of SimpleTuner's files with what",
        f"becomes of it. On the command line: `{COMMAND}`, `{COMMAND} NAME`, `{COMMAND} --group NAME`.",
        "",
        "- Numbers and switches may be written as text (`\"1e-5\"`, `\"false\"`), keys with leading dashes "
        "(`\"--seed\"`).",
        "- `null` and `\"\"` mean *not set*; then the default holds.",
        "- Every setting of `config.json` is also a flag: `sana_tune train --learning_rate 2e-5`. A flag wins over the "
        "file.",
        "- Both files as JSON Schemas, for completion in an editor: "
        "[config](../sana_tune/assets/schemas/config.schema.json), "
        "[multidatabackend](../sana_tune/assets/schemas/multidatabackend.schema.json); "
        f"`{COMMAND} --schema` prints them.",
        "",
    ]  # fmt: skip


def _settings() -> list[str]:
    lines = []
    for name, title in groups().items():
        wanted = [option for option in options() if option.group == name]
        lines += [f"## {title}", "", INTRODUCTIONS[wanted[0].home], ""]
        lines += _table(("setting", "type", "default", "meaning"), (_row(option) for option in wanted))
        if any(option.shared for option in wanted):
            lines += ["", "◆ a dataset may have its own value, which wins for its pictures."]
        lines.append("")
    return lines


def _row(option: Option) -> tuple[str, ...]:
    meaning = option.meaning
    if any(option.choices.values()):
        meaning += "; " + "; ".join(f"`{choice}`: {text}" for choice, text in option.choices.items())
    if option.aliases:
        meaning += "; also read as " + ", ".join(f"`{alias}`" for alias in option.aliases)
    kind = ", ".join(f"`{choice}`" for choice in option.choices) or option.type_words
    default = option.default_words
    told_default = default if option.required or option.default in (None, ()) else f"`{default}`"
    return (f"`{option.name}`" + (" ◆" if option.shared else ""), kind, told_default, meaning)


def _foreign() -> list[str]:
    lines = ["## Keys of SimpleTuner's files", ""]
    for fate, (title, meaning) in FATES.items():
        lines += [f"### {title}", "", meaning, ""]
        wanted = [foreign for foreign in foreign_keys() if foreign.fate == fate]
        if fate in ("later", "later output"):
            lines += textwrap.wrap(", ".join(f"`{foreign.name}`" for foreign in wanted) + ".", 120)
        else:
            heads = {"renamed": ("key", "read as"), "no effect": ("key", "reason"), "refused": ("key", "instead")}[fate]
            rows = ((f"`{one.name}`", f"`{one.text}`" if fate == "renamed" else one.text) for one in wanted)
            lines += _table(heads, rows)
        lines.append("")
    lines += ["### Values of our own settings", "", "Refused with what to use instead; or another spelling.", ""]
    rows = [(f"`{key}`", ", ".join(f"`{value}`" for value in values), f"not built yet: {fix}")
            for key in legacy.LATER_VALUES for fix, values in _later(key).items()]  # fmt: skip
    rows += [(f"`{key}`", f"`{value}`", f"read as `{same}`") for key, values in legacy.SAME_VALUE.items()
             for value, same in values.items()]  # fmt: skip
    rows += [(f"`{key}`", f"`{value}`", reason) for key, values in legacy.REFUSED_VALUES.items()
             for value, reason in values.items()]  # fmt: skip
    return [*lines, *_table(("key", "value", "instead"), sorted(rows))]


def _later(key: str) -> dict[str, list[str]]:
    """What to use instead → the values of a setting that are not built yet."""
    found: dict[str, list[str]] = {}
    for value, fix in legacy.LATER_VALUES.get(key, {}).items():
        found.setdefault(fix, []).append(value)
    return found


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table of Markdown; a bar in a cell is escaped, and so is what Markdown would read as HTML."""
    cells = [[cell.replace("|", "\\|").replace("<", "\\<") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *cells)]
