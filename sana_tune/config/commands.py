"""Commands of the user's with {placeholders}: split into words once, then filled in, and never read by a shell."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping

from sana_tune.config.values import nearest

_PLACE = re.compile(r"\{([A-Za-z_]+)\}")


def words_of(command: str, values: Mapping[str, str]) -> list[str]:
    """The words of a command, with their placeholders filled in: a value is a part of one word, whatever is in it.

    A command that is no such thing (see `wrong_with`) raises ValueError or KeyError.
    """
    return [_PLACE.sub(lambda found: values[found[1]], word) for word in shlex.split(command)]


def wrong_with(command: str, known: Collection[str]) -> str | None:
    """What is wrong with a command, None when nothing is. known: the placeholders that there are."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        return f"its quotes do not match ({str(error).lower()})"
    if not words:
        return "it is empty"
    strange = next((name for word in words for name in _PLACE.findall(word) if name not in known), None)
    if strange is None:
        return None
    guess = nearest(strange, known)
    hint = f"did you mean {{{guess}}}? " if guess else ""
    return f"there is no placeholder {{{strange}}}; {hint}there are {', '.join(f'{{{name}}}' for name in known)}"
