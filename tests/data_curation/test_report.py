"""report.html: what it shows, that an audit renews it with its checksum, and that a browser opens it without the network."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from meddino_data_curation.cli import main
from meddino_data_curation.corpus.report import with_audits

from meddino.core.files import sha256_file
from meddino.data.corpus import Corpus
from tests.browser import CHROMIUM, QUIET, check_page, needs_chromium
from tests.data_curation.conftest import make_hu, write_volume

BROWSERS_OWN = ("google.com", "googleapis.com", "gstatic.com")  # what Chromium asks by itself in spite of all flags
SHAPE = (8, 64, 72)


def mri(seed: int) -> np.ndarray:
    return np.clip((make_hu(seed, SHAPE) + 1000) * 0.4 + 5, 0, None).astype(np.float32)


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory, salt_file) -> Path:
    """Two sets: a re-saved and a disguised copy, an MRI, a picture of a screen, a volume with blank slices."""
    root = tmp_path_factory.mktemp("report")
    one, two = root / "one", root / "two"
    for seed in range(3):
        write_volume(one / f"case_{seed}.nii.gz", make_hu(seed, SHAPE))
    gaps = make_hu(3, SHAPE)
    gaps[:2] = -1000
    write_volume(one / "gaps.nii.gz", gaps)
    write_volume(two / "again.nrrd", make_hu(0, SHAPE), orientation="RAS")
    write_volume(two / "guise.mha", np.clip(make_hu(1, SHAPE)[1:, :, ::-1], -160, 240))
    write_volume(two / "mri.nii.gz", mri(4))
    write_volume(two / "screen.nii.gz", np.clip(mri(5) / 5, 0, 255).astype(np.uint8))
    config = root / "config.yaml"
    config.write_text(
        f"sources:\n- {{name: one, path: {one}, licence: CC-BY-4.0, citation: 'Somebody & al., doi:10.1234/x'}}\n"
        f"- {{name: two, path: {two}, licence: CC-BY-NC-SA-4.0, preference: 1}}\nlicences:\n  allow: [CC-BY-NC-SA-4.0]\n"
    )
    command = ["build", "--config", str(config), "--out", str(root / "corpus"), f"privacy.salt_file={salt_file}", "workers=1"]
    assert main(command) == 0
    return root / "corpus"


def section(report: str, title: str) -> str:
    (found,) = re.findall(rf"<section[^>]*><h2>{title}</h2>(.*?)</section>", report, re.DOTALL)
    return found


def rows_of(part: str) -> list[list[str]]:
    """The cells of a section's tables."""
    rows = re.findall(r"<tr>(.*?)</tr>", part, re.DOTALL)
    return [[html.unescape(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)] for row in rows]


def test_report__tells_what_was_found_kept_refused_and_why(corpus_folder):
    report = (corpus_folder / "report.html").read_text()
    sets = {row[0]: row[1:] for row in rows_of(section(report, "Sets"))}
    assert sets["one"] == [
        "4",
        "4",
        "30",
        "3; 1 volumes of unknown patients",
        "0",
        "0",
        "nifti",
    ]  # found, kept, slices, patients, refused, duplicates
    assert sets["two"] == ["4", "0", "0", "0", "2", "2", "metaimage, nifti, nrrd"]
    assert rows_of(section(report, "Licences and citations"))[1:] == [
        ["one", "CC-BY-4.0", "", "Somebody & al., doi:10.1234/x"],
        ["two", "CC-BY-NC-SA-4.0", "allowed by licences.allow", ""],
    ]
    refused = section(report, "Refused volumes")
    assert "looks like MRI" in refused
    assert "8-bit picture" in refused
    assert refused.count("<img") == 1  # the MRI; of the picture of a screen, which may show a name, none
    left_out = section(report, "Slices left out")
    assert ["one", "constant", "2"] in rows_of(left_out)
    assert left_out.count("<img") == 1
    duplicates = section(report, "Duplicates")
    assert rows_of(duplicates)[1:] == [["two", "one", "exact", "1"], ["two", "one", "near", "1"]]
    assert duplicates.count("<img") == 2
    assert section(report, "Hounsfield units and spacing").count("<img") == 1
    assert section(report, "Kept").count("<img") == 4
    assert "Compared with no held-out data" in section(report, "Held-out data")


def test_report__needs_nothing_from_elsewhere(corpus_folder):
    report = (corpus_folder / "report.html").read_text()
    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", report)
    assert sources
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert not re.search(r"<script|<link|<iframe|@import|url\(", report)


def test_report__its_checksum_is_verified(corpus_folder, tmp_path, capsys):
    copy = shutil.copytree(corpus_folder, tmp_path / "copy")
    assert main(["verify", str(copy)]) == 0
    with (copy / "report.html").open("a") as stream:
        stream.write("<!-- changed -->")
    assert main(["verify", str(copy)]) == 2
    assert "report.html: checksum differs" in capsys.readouterr().out


def test_audit__renews_report_and_checksum_together(corpus_folder, salt_file, tmp_path):
    copy = shutil.copytree(corpus_folder, tmp_path / "copy")
    write_volume(tmp_path / "clean" / "x.nii.gz", make_hu(50, SHAPE))
    write_volume(tmp_path / "leak" / "y.nii.gz", make_hu(2, SHAPE)[:, ::-1])
    arguments = ["audit", str(copy), "--salt-file", str(salt_file), "--against"]
    assert main([*arguments, str(tmp_path / "clean"), "--name", "clean.b"]) == 0
    first = (copy / "report.html").read_text()
    assert "clean.b" in section(first, "Held-out data")
    assert "No overlap with the data below is known" in section(first, "Held-out data")
    assert main([*arguments, str(tmp_path / "leak"), "--name", "leaky"]) == 2
    second = (copy / "report.html").read_text()
    told = section(second, "Held-out data")
    assert "holds data that must stay unseen" in told
    assert "clean.b" in told
    (leaking,) = Corpus(copy).info["audit"][1]["overlapping_volumes"]
    assert leaking[:8] in told
    assert "y.nii.gz" not in second
    assert Corpus(copy).info["manifests"]["report.html"] == sha256_file(copy / "report.html")
    assert Corpus(copy).content_hash == Corpus(corpus_folder).content_hash
    assert main(["verify", str(copy)]) == 0
    others = re.compile(r"<!-- audit begins -->.*?<!-- audit ends -->", re.DOTALL)
    assert others.sub("", second) == others.sub("", (corpus_folder / "report.html").read_text())  # nothing else changed


def test_audit__a_name_that_is_no_name_is_one_clear_line(corpus_folder, tmp_path, capsys):
    arguments = ["audit", str(corpus_folder), "--against", str(tmp_path), "--name", "clean <b>"]
    assert main(arguments) == 2
    assert "use up to 64 letters, digits" in capsys.readouterr().err


def test_audit__a_report_without_a_place_for_it_is_left_alone(corpus_folder, salt_file, tmp_path, caplog):
    copy = shutil.copytree(corpus_folder, tmp_path / "copy")
    (copy / "report.html").write_text("<p>mine</p>")
    write_volume(tmp_path / "clean" / "x.nii.gz", make_hu(50, SHAPE))
    assert main(["audit", str(copy), "--salt-file", str(salt_file), "--against", str(tmp_path / "clean")]) == 0
    assert (copy / "report.html").read_text() == "<p>mine</p>"
    assert [entry["name"] for entry in Corpus(copy).info["audit"]] == ["dataset-1"]
    assert with_audits("<p>mine</p>", []) is None


@pytest.mark.browser
@needs_chromium
def test_report__opens_in_a_browser_without_network_or_errors(corpus_folder, tmp_path):
    more = (f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={tmp_path / 'net.json'}", "--enable-logging=stderr")
    # A picture that cannot be decoded has no natural width; the page itself carries no script.
    probe = """<script>window.addEventListener("load", () => {
      const bad = [...document.images].filter(image => !image.naturalWidth).length;
      const sections = document.querySelectorAll("section").length;
      document.title = `${document.images.length} pictures, ${bad} bad, ${sections} sections`;
      console.log("the probe ran"); });</script></body>"""
    page = tmp_path / "report.html"
    page.write_text((corpus_folder / "report.html").read_text().replace("</body>", probe))
    run = subprocess.run(
        [CHROMIUM, *QUIET, *more, "--virtual-time-budget=3000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    assert "<title>9 pictures, 0 bad, 9 sections</title>" in run.stdout
    messages = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    assert len(messages) == 1, messages
    assert "the probe ran" in messages[0]
    requested = re.findall(r'"url":"(?:https?|wss?|ftp)://([^/"]*)', (tmp_path / "net.json").read_text())
    assert {host for host in requested if not host.endswith(BROWSERS_OWN)} == set()
    assert json.loads((tmp_path / "net.json").read_text())["events"]  # it was watched


@pytest.mark.browser
def test_report__fits_its_window_and_shows_nothing_empty(corpus_folder):
    assert len(check_page(corpus_folder / "report.html")["pictures"]) == 9
    assert "soft-tissue window (level 40, width 400 HU)" in section((corpus_folder / "report.html").read_text(), "Kept")
