"""A run says what its corpus was audited against, and does not start on one that is known to hold held-out data."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from meddino_pretrain.cli import main
from meddino_pretrain.config import PretrainConfig
from meddino_pretrain.corpus_audit import CorpusConfig, check_audit
from meddino_pretrain.run_folder import open_run

from meddino.checkpoints.corpus_lineage import corpus_lineage
from meddino.core.config import load_config
from meddino.core.errors import ConfigError
from meddino.core.files import write_json
from meddino.data.corpus import Corpus

TINY = Path(__file__).with_name("tiny.yaml")


def entry(name: str, overlaps: int) -> dict:
    """What `meddino-curate audit` records of one data set."""
    return {
        "name": name, "volumes": 30, "unread": 0, "content_hash": "0" * 64, "overlaps": overlaps,
        "overlaps_by_kind": {"near": overlaps} if overlaps else {}, "overlapping_volumes": ["v000"][:overlaps],
    }  # fmt: skip


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
        "corpus audited against btcv-test: 30 volumes, 0 overlaps",
        "corpus audited against amos22-test: 30 volumes, 0 overlaps",
    ]


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
    older = text.replace("corpus:\n  allow_known_overlap: false\n", "")
    assert older != text
    path.write_text(older)
    with open_run(tmp_path / "run", config, corpus):
        pass


def test_lineage__carries_what_the_corpus_was_audited_against(audited):
    lineage = corpus_lineage(Corpus(audited(entry("btcv-test", 0), entry("amos22-test", 2))))
    assert lineage["audited_against"] == ["btcv-test", "amos22-test (2 overlaps)"]
    assert corpus_lineage(Corpus(audited()))["audited_against"] == []
