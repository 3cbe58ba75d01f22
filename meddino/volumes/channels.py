"""nnU-Net's names `<case>_0000`, `<case>_0001`: a channel's number where the set of names says so, else a case's own."""

import re
from collections import defaultdict
from collections.abc import Iterable

_NUMBERED = re.compile(r"(.+)_(\d{4})")
_MOST_CHANNELS = 16


def case_names(stems: Iterable[str], channels: int | None = None) -> dict[str, str]:
    """Return the case of each file of a folder.

    The four digits at the end number channels where they begin at 0000 without a gap, and it is the only channel, the number
    of channels that is known, or the same set for another case: word_0001 to word_0006 are six patients.

    Args:
        stems: File names without their ending.
        channels: How many a case has, where something says it.
    """
    listed = list(stems)
    numbers: dict[str, set[int]] = defaultdict(set)
    for stem in listed:
        if match := _NUMBERED.fullmatch(stem):
            numbers[match[1]].add(int(match[2]))
    sets = [frozenset(found) for found in numbers.values()]

    def is_channels(found: set[int]) -> bool:
        count = len(found)
        if found != set(range(count)) or count > _MOST_CHANNELS:
            return False
        return count in (1, channels) or sets.count(frozenset(found)) > 1

    return {
        stem: match[1] if (match := _NUMBERED.fullmatch(stem)) and is_channels(numbers[match[1]]) else stem for stem in listed
    }
