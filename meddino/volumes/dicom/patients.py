"""Words that stand in place of a patient's id and name nobody."""

import re

_NOBODY = {
    "anonymous", "anonymized", "anonymised", "anon", "unknown", "none", "null", "na", "nan", "patient", "test", "phantom",
    "deidentified", "deid", "removed", "hidden", "noid", "nopatientid", "noname", "notavailable", "x", "xx", "xxx", "xxxx",
}  # fmt: skip
_TOKENS = re.compile(r"[^\W\d_]+|\d+")


def is_nobody(written: str) -> bool:
    """Tell whether an id is a word that stands for none, such as "ANONYMOUS"."""
    return "".join(_TOKENS.findall(written.casefold())) in _NOBODY | {"", "0"}
