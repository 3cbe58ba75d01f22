"""The registry of CT-3M against what RECIPE.md and the sets' own pages say."""

import re

import pytest
from meddino_data_curation.config import SourceConfig
from meddino_data_curation.sources.licences import needs_decision
from meddino_data_curation.sources.path_globs import glob_pattern
from meddino_data_curation.sources.registry import load_registry

from meddino.core.config import shipped_configs
from meddino.core.errors import ConfigError

REGISTRY = {entry.name: entry for entry in load_registry()}

# Written down by hand from the paper's list of sets and the sets' own articles.
VOLUMES = {
    "btcv": 50, "pancreas_ct": 80, "chaos": 40, "lits": 201, "kits": 489, "word": 150, "abdomenct_1k": 1062, "amos22": 500,
    "msd_liver": 201, "msd_lung": 95, "msd_pancreas": 420, "msd_hepatic_vessel": 443, "msd_spleen": 61, "msd_colon": 190,
    "ct_org": 140, "totalsegmentator": 1228, "abdomenatlas3": 9262,
}  # fmt: skip
RESTRICTED = {"abdomenatlas3", "abdomenct_1k", "btcv", "chaos", "kits", "lits", "word"}


def test_registry__holds_the_17_sets_with_their_numbers():
    assert {name: entry.volumes for name, entry in REGISTRY.items()} == VOLUMES
    assert sum(count for name, count in VOLUMES.items() if name.startswith("msd_")) == 1410  # the paper's own figure


def test_registry__restricted_licences_need_a_decision():
    assert {name for name, entry in REGISTRY.items() if needs_decision(entry.licence.id)} == RESTRICTED
    assert {entry.licence.kind for name, entry in REGISTRY.items() if name not in RESTRICTED} == {"permissive"}


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_registry__entry_is_fit_for_use(name):
    entry = REGISTRY[name]
    assert all(re.fullmatch(r"10\.\d{4,9}/\S+", doi) for doi in entry.doi)
    assert entry.doi
    assert entry.url.startswith("http")
    assert all(glob_pattern(part.files) for part in entry.parts)
    SourceConfig(name=entry.name, path=shipped_configs(), patient_pattern=entry.patient_pattern, licence=entry.licence.id)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_registry__what_repackages_comes_after_the_originals(name):
    entry = REGISTRY[name]
    assert all(REGISTRY[other].preference < entry.preference for other in entry.repackages)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("kind: permissive", "kind: unclear"), "does not say that it is unclear"),
        (("repackages: []", "repackages: [amos23]"), "not in the registry"),
        (("name: amos22", "name: amos"), "must be the file's name"),
        (("volume_is: file", "volume_is: fil"), "volume_is"),
        (("not_known:", "not_knwon:"), "did you mean 'not_known'"),
    ],
)
def test_registry__wrong_entry_is_one_clear_line(tmp_path, change, words):
    text = (shipped_configs() / "data_curation" / "ct3m" / "amos22.yaml").read_text()
    assert change[0] in text
    (tmp_path / "amos22.yaml").write_text(text.replace(*change))
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_registry(tmp_path)


def test_registry__empty_folder_is_told(tmp_path):
    with pytest.raises(ConfigError, match="no YAML file there"):
        load_registry(tmp_path)


@pytest.mark.parametrize(
    ("name", "path", "patient"),
    [
        ("kits", "dataset/case_00012/imaging.nii.gz", "00012"),
        ("abdomenct_1k", "Part1/Case_00012_0000.nii.gz", "00012"),
        ("totalsegmentator", "s0011/ct.nii.gz", "s0011"),
        ("abdomenatlas3", "image_only/BDMAP_00000001/ct.nii.gz", "BDMAP_00000001"),
        ("pancreas_ct", "Pancreas-CT/PANCREAS_0001/x/y/1-001.dcm", "PANCREAS_0001"),
    ],
)
def test_registry__patient_of_a_path(name, path, patient):
    assert re.search(REGISTRY[name].patient_pattern, path).group(1) == patient
