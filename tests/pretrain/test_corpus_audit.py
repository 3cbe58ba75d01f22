"""A run says what its corpus was audited against, and does not start on one that is known to hold held-out data."""

import json
import logging
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from meddino_pretrain.cli import main
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.run.config import CorpusConfig
from meddino_pretrain.run.corpus_audit import check_audit, check_slices
from meddino_pretrain.run.folder import open_run

from meddino.checkpoints.export.lineage import corpus_lineage
from meddino.core.config import load_config
from meddino.core.errors import ConfigError
from meddino.core.files import write_json
from meddino.data.corpus import Corpus
from meddino.data.intensity import ImageIntensity

TINY = Path(__file__).with_name("tiny.yaml")


def entry(name: str, overlaps: int, **changes) -> dict:
    """What `meddino-curate audit` records of one data set."""
    values = {
        "name": name, "volumes": 30, "no_ct": 0, "unread": 0, "content_hash": "0" * 64, "overlaps": overlaps,
        "overlaps_by_kind": {"near": overlaps} if overlaps else {}, "overlapping_volumes": ["v000"][:overlaps],
        "compared": {"exact": 30, "near": 30, "series": 30, "study": 30, "patient": 30}, "not_compared": {},
    }  # fmt: skip
    return {**values, **changes}


@pytest.fixture
def audited(make_corpus_once, tmp_path):
    """A function that returns the folder of a corpus with given audits."""

    def make(*audits: dict) -> Path:
        folder = shutil.copytree(make_corpus_once, tmp_path / "audited", dirs_exist_ok=True)
        info = json.loads((folder / "corpus.json").read_text())
        write_json(folder / "corpus.json", {**info, "audit": list(audits)})
        return folder

    return make


def test_check_audit__says_what_it_was_compared_with(audited, caplog):
    with caplog.at_level(logging.INFO):
        check_audit(Corpus(audited(entry("btcv-test", 0), entry("amos22-test", 0))), CorpusConfig())
    assert [record.getMessage() for record in caplog.records] == [
        "corpus audited against btcv-test: 0 overlaps with 30 volumes; "
        "compared by exact (30), near (30), series (30), study (30), patient (30)",
        "corpus audited against amos22-test: 0 overlaps with 30 volumes; "
        "compared by exact (30), near (30), series (30), study (30), patient (30)",
    ]


def test_check_audit__says_what_could_not_be_compared(audited, caplog):
    compared = {"exact": 28, "near": 27, "series": 0, "study": 0, "patient": 12}
    why_not = dict.fromkeys(("series", "study"), "no DICOM") | {"patient": "18 of its 30 volumes lack an id"}
    found = audited(entry("btcv-test", 0, volumes=28, unread=2, compared=compared, not_compared=why_not))
    check_audit(Corpus(found), CorpusConfig())
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "corpus audited against btcv-test: 0 overlaps with 28 volumes; 2 MORE COULD NOT BE READ; compared by exact (28), "
        "near (27), patient (12); NOT by series, study: no DICOM; only in part by patient: 18 of its 30 volumes lack an id"
    )
    assert corpus_lineage(Corpus(found))["audited_against"] == ["btcv-test (2 volumes unread)"]


def test_check_audit__one_that_read_nothing_is_none(audited, caplog):
    corpus = Corpus(audited(entry("truncated", 0, volumes=0, unread=1)))
    check_audit(corpus, CorpusConfig())
    (record,) = caplog.records
    assert "audited against nothing" in record.getMessage()
    assert corpus_lineage(corpus)["audited_against"] == []
    # What its ids told all the same is an overlap.
    with pytest.raises(ConfigError, match=r"truncated \(1\)"):
        check_audit(Corpus(audited(entry("truncated", 1, volumes=0, unread=1))), CorpusConfig())


def test_check_audit__never_audited_is_a_warning(audited, caplog):
    check_audit(Corpus(audited()), CorpusConfig())
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "audited against nothing" in record.getMessage()
    assert "meddino-curate audit" in record.getMessage()


def test_check_audit__known_overlap_is_refused_unless_the_config_accepts_it(audited, caplog):
    corpus = Corpus(audited(entry("btcv-test", 0), entry("amos22-test", 2)))
    with pytest.raises(ConfigError, match=r"amos22-test \(2\); .*corpus\.allow_known_overlap=true"):
        check_audit(corpus, CorpusConfig())
    caplog.clear()
    check_audit(corpus, CorpusConfig(allow_known_overlap=True))
    assert caplog.records[-1].levelno == logging.WARNING
    assert "amos22-test (2)" in caplog.records[-1].getMessage()


def test_pretrain__known_overlap_is_one_line_and_no_run_begins(audited, tmp_path, capsys):
    corpus = audited(entry("amos22-test", 1))
    assert main([str(TINY), "--corpus", str(corpus), "--out", str(tmp_path / "run")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("meddino-pretrain: error:")]
    assert "overlaps with held-out data: amos22-test (1)" in line
    assert not (tmp_path / "run").exists()


def test_run__accepting_an_overlap_later_goes_on_with_the_same_run(make_corpus_once, tmp_path):
    corpus = Corpus(make_corpus_once)
    for override in ("corpus.allow_known_overlap=false", "corpus.allow_known_overlap=true"):
        config = load_config(PretrainConfig, [TINY], [override])
        with open_run(tmp_path / "run", config, corpus) as run:
            assert run.corpus_hash == corpus.content_hash


def test_run__begun_before_the_key_existed_goes_on(make_corpus_once, tmp_path):
    corpus, config = Corpus(make_corpus_once), load_config(PretrainConfig, [TINY])
    with open_run(tmp_path / "run", config, corpus):
        pass
    path = tmp_path / "run" / "config.yaml"
    text = path.read_text()
    older = re.sub(r"^corpus:\n(  .*\n)+", "", text, flags=re.MULTILINE)
    assert older != text
    path.write_text(older)
    with open_run(tmp_path / "run", config, corpus):
        pass


def test_lineage__carries_what_the_corpus_was_audited_against(audited):
    lineage = corpus_lineage(Corpus(audited(entry("btcv-test", 0), entry("amos22-test", 2))))
    assert lineage["audited_against"] == ["btcv-test", "amos22-test (2 overlaps)"]
    assert corpus_lineage(Corpus(audited()))["audited_against"] == []
    nobody = entry("word-test", 0, compared={"exact": 30, "near": 30, "series": 0, "study": 0, "patient": 0})
    assert corpus_lineage(Corpus(audited(nobody)))["audited_against"] == ["word-test (patients not compared)"]


def changed(corpus: Path, **columns) -> Corpus:
    """Return a corpus some of whose slices say something else."""
    opened = Corpus(corpus)
    for name, values in columns.items():
        place = opened.slices.schema.get_field_index(name)
        filled = values + opened.slices.column(name).to_pylist()[len(values) :]
        field = opened.slices.schema.field(place)
        opened.slices = opened.slices.set_column(place, field, pa.array(filled, field.type))
    return opened


def test_slices__what_becomes_of_small_and_coloured_ones_is_said(make_corpus_once, caplog):
    grey = [ImageIntensity(mean=(0.5,), std=(0.5,))]
    columns = {"modality": ["image"] * 3, "channels": [3, 3, 1], "value_low": [0.0] * 3, "value_high": [255.0] * 3}
    check_slices(changed(make_corpus_once, **columns), grey, 88)
    assert "2 slices have colour and the contract has 1 channel" in caplog.text
    assert "24 of 24 slices are smaller than a crop of 88 px (the smallest: 80 px)" in caplog.text
    caplog.clear()
    check_slices(Corpus(make_corpus_once), grey, 64)
    assert not caplog.text


def test_slices__without_a_unit_or_a_range_are_refused(make_corpus_once):
    with pytest.raises(ConfigError, match=r"2 slices of modality mr \(first: s00000\) have no value_low and value_high"):
        check_slices(changed(make_corpus_once, modality=["mr", "mr"]), [], 64)
