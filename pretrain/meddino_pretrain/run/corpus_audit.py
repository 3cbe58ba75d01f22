"""What a corpus holds, and what it was compared with, before anything is learnt from it."""

import logging
from collections.abc import Sequence

import numpy as np

from meddino.core.errors import ConfigError
from meddino.core.logging import get_logger
from meddino.data.audits import audit_text, lists_text, says_something
from meddino.data.corpus import Corpus
from meddino.data.intensity import Intensity
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.data.intensities import Intensities
from meddino_pretrain.data.sampler import sample_order, slices_left_out
from meddino_pretrain.monitoring.labelled_probe import check_probe_data
from meddino_pretrain.run.config import CorpusConfig

_logger = get_logger(__name__)


def check_corpus(corpus: Corpus, config: PretrainConfig, crop_px: int) -> None:
    """Refuse a corpus that a run cannot, or must not, learn from, before anything is begun: for runs and plans alike.

    Args:
        corpus: One, or several that are read as one. Every process has to call this.
        config: The recipe.
        crop_px: Side of the largest crop.

    Raises:
        ConfigError: As the checks one by one: of audits, labelled data, modalities, slices and weights.
    """
    check_audit(corpus, config.corpus)
    check_probe_data(corpus, config.monitoring)
    Intensities(config.contracts).check(corpus.modalities)
    check_slices(corpus, config.contracts, crop_px)
    sample_order(corpus, config.corpus.sampling, seed=0, global_batch=1)  # names that weights are given for
    for line in weight_warnings(corpus, config):
        _logger.warning("%s", line)


def weight_warnings(corpus: Corpus, config: PretrainConfig) -> list[str]:
    """Return what weights of 0 leave out of training, and whether the export will be for a modality it has never seen.

    Args:
        corpus: What is learnt from.
        config: The recipe.
    """
    sampling, own = config.corpus.sampling, config.input_contract.modality
    out = slices_left_out(corpus, sampling)
    lines = []
    if out.any():
        given = ", ".join(sampling.zero_weights)
        lines.append(f"{out.sum():,} of {len(out):,} slices are left out by corpus.sampling (weight 0: {given})")
    if not ((corpus.slices.column("modality").to_numpy() == own) & ~out).any():
        lines.append(
            f"input_contract.modality is {own}, and no slice that is learnt from is: the export will be for data that it has "
            "never seen"
        )
    return lines


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


def check_slices(corpus: Corpus, contracts: Sequence[Intensity], crop_px: int) -> None:
    """Refuse slices whose values mean nothing, and say what becomes of colour and of slices smaller than a crop.

    Args:
        corpus: Its slice manifest is read.
        contracts: Of the recipe.
        crop_px: Side of the largest crop.

    Raises:
        ConfigError: Slices without a unit have no range of values.
    """
    names = ("key", "modality", "channels", "value_low", "value_high", "rows", "cols")
    column = {name: corpus.slices.column(name).to_numpy() for name in names}
    lost = (column["modality"] != "ct") & (np.isnan(column["value_low"]) | np.isnan(column["value_high"]))
    if lost.any():
        raise ConfigError(
            f"corpus {corpus.location}: {lost.sum()} slices of modality {column['modality'][lost][0]} (first: "
            f"{column['key'][lost][0]}) have no value_low and value_high, and without them no value means anything; curate "
            "them again"
        )
    grey = [contract.modality for contract in contracts if contract.channels == 1]
    if coloured := int(((column["channels"] == 3) & np.isin(column["modality"], grey)).sum()):
        _logger.warning(
            "corpus %s: %d slices have colour and the contract has 1 channel: they become grey", corpus.location, coloured
        )
    shorter = np.minimum(column["rows"], column["cols"])
    if small := int((shorter < crop_px).sum()):
        _logger.warning(
            "corpus %s: %d of %d slices are smaller than a crop of %d px (the smallest: %d px): their crops are enlarged",
            corpus.location, small, len(corpus), crop_px, shorter.min(),
        )  # fmt: skip


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
