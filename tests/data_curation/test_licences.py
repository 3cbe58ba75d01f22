"""What may be used without asking: known free licences and one's own scans; everything else needs a decision by name."""

import pytest
from meddino_data_curation.cli import main
from meddino_data_curation.sources.licences import needs_decision

from meddino.data.corpus import Corpus
from tests.data_curation.conftest import make_hu, write_volume


@pytest.mark.parametrize(
    "licence",
    [
        None, "CC0-1.0", "CC-BY-4.0", "CC BY 3.0", "cc-by-sa-4.0", "CC_BY_4.0",
        "Creative Commons Attribution 4.0 International",
        "Creative Commons Attribution-ShareAlike 4.0", "Apache-2.0", "Apache License 2.0", "MIT", "BSD-3-Clause", "ODC-By-1.0",
        "PDDL-1.0", "CDLA-Permissive-2.0", "public domain", "own", "own data", "in-house",
        "Apache-2.0 (computer-made; no patient)",
    ],
)  # fmt: skip
def test_needs_decision__free_licences_and_own_data_do_not(licence):
    assert not needs_decision(licence)


@pytest.mark.parametrize(
    "licence",
    [
        "CC-BY-NC-4.0", "CC BY NC SA 4.0", "cc_by_nc_nd_4.0", "CC-BY-ND-4.0", "non-commercial", "non commercial",
        "noncommercial",
        "Non_Commercial use", "Creative Commons Attribution-NonCommercial 4.0", "not for commercial use", "no commercial use",
        "research only", "Research Use Only", "for research purposes only", "only for academic research", "academic use only",
        "internal use only", "proprietary", "Proprietary licence", "all rights reserved", "confidential", "on request",
        "restricted",
        "unknown", "UNKNOWN", "unclear", "not stated", "none stated", "none", "n/a", "tbd", "?", "", "-", "custom", "other",
        "data use agreement", "LicenseRef-BTCV-unclear", "CC-BY-4.0 (non-commercial)", "CC-BY-4.0 for research only", "CC",
        "CC-BY-4.0 or as agreed", "GPL-3.0 or what the hospital says", "own (research only)", "CC-BY-NC-4.0 AND MIT",
    ],
)  # fmt: skip
def test_needs_decision__everything_else_does(licence):
    assert needs_decision(licence)


@pytest.mark.parametrize("licence", ["non commercial", "research only", "proprietary", "unknown"])
def test_build__such_a_licence_is_refused_until_it_is_allowed(tmp_path, salt_file, capsys, licence):
    write_volume(tmp_path / "in" / "a.nii.gz", make_hu(0))
    config = tmp_path / "config.yaml"
    config.write_text(f"sources:\n- {{name: set, path: {tmp_path / 'in'}, licence: {licence}}}\n")
    command = ["build", "--config", str(config), "--out", str(tmp_path / "out"), f"privacy.salt_file={salt_file}", "workers=1"]
    assert main(command) == 2
    assert f"unclear: {licence}; name those you may use in licences.allow" in capsys.readouterr().err
    assert main([*command, f"licences.allow=[{licence}]"]) == 0
    assert Corpus(tmp_path / "out").info["licences"] == [licence]


def test_build__own_scans_need_no_licence_and_it_is_said(tmp_path, salt_file, capsys):
    write_volume(tmp_path / "in" / "a.nii.gz", make_hu(0))
    out = tmp_path / "out"
    assert main(["build", str(tmp_path / "in"), "--out", str(out), f"privacy.salt_file={salt_file}", "workers=1"]) == 0
    assert "source-1: no licence named, recorded as 'not stated'" in capsys.readouterr().err
    corpus = Corpus(out)
    assert corpus.info["licences"] == ["not stated"]
    assert corpus.volumes.column("licence").to_pylist() == ["not stated"]
    assert "nobody named one" in (out / "report.html").read_text()
