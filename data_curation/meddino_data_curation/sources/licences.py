"""Which licences may be used without asking anybody: those that are known to allow it. All others need a decision."""

import re

NOT_STATED = "not stated"  # what manifests say of a source for which nobody named a licence
# What allows use, changed copies and commerce, however it is written; or data that are the user's own.
_FREE = re.compile(
    r"cc ?0( \d \d)?( universal)?|cc zero|public domain( mark)?( \d \d)?|unlicense"
    r"|cc by( sa)?( \d \d)?( international| unported| [a-z]{2})?"
    r"|creative commons attribution( share ?alike)?( \d \d)?( international| unported)?( license| licence)?"
    r"|pddl( \d \d)?|odc by( \d \d)?|odbl( \d \d)?|cdla (permissive|sharing) \d \d"
    r"|apache( license| licence)?( \d( \d)?)?|mit( license| licence)?|(0bsd|bsd)( [23] clause)?|isc"
    r"|(our )?own( data| scans| images)?|in ?house( data)?"
)
# What a remark behind a free licence may take back.
_RESTRICTED = re.compile(
    r"\b(nc|nd|non ?commercial\w*|no ?deriv\w*|not? (for )?commercial\w*|only|proprietary|confidential|all rights reserved"
    r"|on request|restricted|unclear|unknown|(not|none) stated)\b"
)


def needs_decision(licence: str | None) -> bool:
    """Tell whether a licence forbids commercial use or is unclear, so that somebody has to allow it by name.

    What is not known to allow it is unclear: a licence can be written in more ways than a list of forbidden words foresees.

    Args:
        licence: SPDX id or words; a remark in parentheses may follow. None where nobody named one, as for one's own scans.
    """
    if licence is None:
        return False
    words = _words(licence)
    return _FREE.fullmatch(_words(licence.partition("(")[0])) is None or _RESTRICTED.search(words) is not None


def _words(text: str) -> str:
    """Return a text in small letters, with one space for everything between letters and digits."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))
