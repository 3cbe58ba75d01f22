"""Globs on paths inside a folder, with what shells know: **/, *, ?, [0-9] and {a,b}."""

import re
from functools import lru_cache

from meddino.core.errors import ConfigError

_TOKENS = re.compile(r"(\*\*/|\*\*|\*|\?|\[[^\]/]+\]|[{},])")
_KNOWN = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


@lru_cache(maxsize=512)
def glob_pattern(glob: str, ignore_case: bool = False) -> re.Pattern[str]:
    """Return the regular expression of a glob; use its `fullmatch` on a path with slashes.

    Args:
        glob: `**/` stands for any folders, `*` and `?` for anything inside a name, `[0-9]` for one of these characters,
            `{a,b}` for one of these, which may be globs and may be nested.
        ignore_case: Whether capitals and small letters are one.

    Raises:
        ConfigError: Braces or brackets are not closed.
    """
    depth, parts = 0, []
    for token in _TOKENS.split(glob):
        if token in _KNOWN:
            parts.append(_KNOWN[token])
        elif token == "{":
            depth += 1
            parts.append("(?:")
        elif token == "}" and depth:
            depth -= 1
            parts.append(")")
        elif token == "," and depth:
            parts.append("|")
        elif token.startswith("[") and len(token) > 1:
            inside = re.sub(r"([\\\[&~|^])", r"\\\1", token[1:-1])
            parts.append(f"[^{inside[1:]}]" if inside.startswith("!") else f"[{inside}]")
        else:
            parts.append(re.escape(token))
    if depth:
        raise ConfigError(f"glob '{glob}': a brace is not closed")
    try:
        return re.compile("".join(parts), re.IGNORECASE if ignore_case else 0)
    except re.error as error:
        raise ConfigError(f"glob '{glob}' cannot be read ({error})") from error


def escaped(path: str) -> str:
    """Return a glob that matches a path and nothing else."""
    return re.sub(r"([*?\[{},])", r"[\1]", path)
