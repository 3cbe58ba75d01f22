"""What a corpus was compared with before anything is learnt from it."""

import logging

from meddino.core.errors import ConfigError
from meddino.core.logging import get_logger
from meddino.data.audits import audit_text, lists_text, says_something
from meddino.data.corpus import Corpus
from meddino_pretrain.run.config import CorpusConfig

_logger = get_logger(__name__)


def check_audit(corpus: Corpus, config: CorpusConfig) -> None:
    """Say what a corpus, or each of several, was audited against, and refuse one that holds held-out data.

    Args:
        corpus: Its corpus.json carries the audits.
        config: Whether a known overlap is accepted.

    Raises:
        ConfigError: An audit found an overlap, and the config does not accept it.
    """
    for part in corpus.parts:
        _check_one(part, config)


def _check_one(corpus: Corpus, config: CorpusConfig) -> None:
    audits = [entry for entry in corpus.info.get("audit", []) if says_something(entry)]
    if corpus.info.get("exclusion_lists"):
        _logger.info("corpus built without what lists name: %s", lists_text(corpus.info["exclusion_lists"]))
    if not audits:
        _logger.warning(
            "corpus %s was audited against nothing: data that you will test on may be in it; before that: "
            "meddino-curate audit %s --against DATA", corpus.location, corpus.location,
        )  # fmt: skip
        return
    for entry in audits:
        level = logging.WARNING if entry["unread"] else logging.INFO
        _logger.log(level, "corpus audited against %s: %s", entry["name"], audit_text(entry))
    leaking = [f"{entry['name']} ({entry['overlaps']})" for entry in audits if entry["overlaps"]]
    if not leaking:
        return
    found = f"corpus {corpus.location} overlaps with held-out data: {', '.join(leaking)}"
    if not config.allow_known_overlap:
        raise ConfigError(
            f"{found}; build it again with --exclude, or say corpus.allow_known_overlap=true: what is measured on that data "
            "then says nothing"
        )
    _logger.warning("%s; corpus.allow_known_overlap is true: what is measured on that data says nothing", found)
