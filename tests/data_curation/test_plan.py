"""`meddino-curate plan` on tiny copies of the sets' layouts, made here from what their pages say of them."""

from pathlib import Path

import numpy as np
import pytest
from meddino_data_curation.cli import main
from meddino_data_curation.config import CurationConfig
from meddino_data_curation.sources.plan import find_sets, planned_config
from meddino_data_curation.sources.registry import load_registry

from meddino.core.config import load_config
from meddino.core.errors import ConfigError
from meddino.data.corpus import Corpus
from tests.data_curation.conftest import make_hu, write_volume

# What archives unpack to, with what lies beside the volumes; (path, belongs to (set, part) or None).
FILES = {
    "BTCV/RawData/Training/img/img0001.nii.gz": ("btcv", "train"),
    "BTCV/RawData/Training/label/label0001.nii.gz": None,
    "BTCV/RawData/Testing/img/img0061.nii.gz": ("btcv", "test"),
    "manifest-1599750808610/Pancreas-CT/PANCREAS_0001/11-24-2015-x/Pancreas-99667/1-001.dcm": ("pancreas_ct", "all"),
    "manifest-1599750808610/Pancreas-CT/PANCREAS_0001/11-24-2015-x/Pancreas-99667/1-002.dcm": None,  # the same volume
    "manifest-1599750808610/Pancreas-CT/PANCREAS_0002/11-24-2015-x/Pancreas-18957/1-001.dcm": ("pancreas_ct", "all"),
    "CHAOS_Train_Sets/Train_Sets/CT/1/DICOM_anon/i0000,0000b.dcm": ("chaos", "train"),
    "CHAOS_Train_Sets/Train_Sets/CT/1/Ground/liver_GT_000.png": None,
    "CHAOS_Train_Sets/Train_Sets/MR/1/T2SPIR/DICOM_anon/IMG-0002-00001.dcm": None,
    "CHAOS_Test_Sets/Test_Sets/CT/3/DICOM_anon/i0000,0000b.dcm": ("chaos", "test"),
    "LiTS/Training_Batch1/volume-0.nii": ("lits", "train"),
    "LiTS/Training_Batch1/segmentation-0.nii": None,
    "LiTS/LITS-Challenge-Test-Data/test-volume-0.nii": ("lits", "test"),
    "kits23/dataset/case_00000/imaging.nii.gz": ("kits", "train"),
    "kits23/dataset/case_00000/segmentation.nii.gz": None,
    "WORD-V0.1.0/imagesTr/word_0002.nii.gz": ("word", "train"),
    "WORD-V0.1.0/labelsTr/word_0002.nii.gz": None,
    "WORD-V0.1.0/imagesVal/word_0001.nii.gz": ("word", "val"),
    "WORD-V0.1.0/imagesTs/word_0014.nii.gz": ("word", "test"),
    "AbdomenCT-1K-ImagePart1/AbdomenCT-1K-ImagePart1/Case_00001_0000.nii.gz": ("abdomenct_1k", "all"),
    "AbdomenCT-1K-ImagePart2/Case_00401_0000.nii.gz": ("abdomenct_1k", "all"),
    "AbdomenCT-1K-Mask/Case_00001.nii.gz": None,
    "amos22/imagesTr/amos_0001.nii.gz": ("amos22", "train"),
    "amos22/imagesTr/amos_0500.nii.gz": ("amos22", "train"),
    "amos22/imagesTr/amos_0507.nii.gz": None,  # MRI
    "amos22/imagesVa/amos_0008.nii.gz": ("amos22", "val"),
    "amos22/imagesTs/amos_0111.nii.gz": ("amos22", "test"),
    "amos22/labelsTr/amos_0001.nii.gz": None,
    "msd/Task03_Liver/imagesTr/liver_0.nii.gz": ("msd_liver", "train"),
    "msd/Task03_Liver/imagesTr/._liver_0.nii.gz": None,  # in the archives, from a Mac
    "msd/Task03_Liver/imagesTs/liver_132.nii.gz": ("msd_liver", "test"),
    "msd/Task06_Lung/imagesTr/lung_001.nii.gz": ("msd_lung", "train"),
    "msd/Task07_Pancreas/imagesTr/pancreas_001.nii.gz": ("msd_pancreas", "train"),
    "msd/Task08_HepaticVessel/imagesTr/hepaticvessel_001.nii.gz": ("msd_hepatic_vessel", "train"),
    "nnUNet_raw/Dataset009_Spleen/imagesTr/spleen_2_0000.nii.gz": ("msd_spleen", "train"),
    "msd/Task10_Colon/imagesTs/colon_002.nii.gz": ("msd_colon", "test"),
    "CT-ORG/OrganSegmentations/volume-20.nii.gz": ("ct_org", "test"),
    "CT-ORG/OrganSegmentations/volume-21.nii.gz": ("ct_org", "train"),
    "CT-ORG/OrganSegmentations/volume-139.nii.gz": ("ct_org", "train"),
    "CT-ORG/OrganSegmentations/labels-21.nii.gz": None,
    "Totalsegmentator_dataset_v201/s0000/ct.nii.gz": ("totalsegmentator", "all"),
    "Totalsegmentator_dataset_v201/s0011/ct.nii.gz": ("totalsegmentator", "all"),
    "Totalsegmentator_dataset_v201/s0000/segmentations/liver.nii.gz": None,
    "AbdomenAtlas3.0Mini/image_only/BDMAP_00000001/ct.nii.gz": ("abdomenatlas3", "all"),
    "AbdomenAtlas3.0Mini/mask_only/BDMAP_00000001/segmentations/liver.nii.gz": None,
    "own/patient_1.nii.gz": None,
}
META = "image_id;age;split\ns0000;60;train\ns0011;61;test\n"


@pytest.fixture(scope="module")
def ct3m(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("all") / "ct"
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    (root / "Totalsegmentator_dataset_v201" / "meta.csv").write_text(META)
    return root


def counts(found) -> dict[tuple[str, str], int]:
    return {(item.entry.name, part.entry.name): len(part.volumes) for item in found for part in item.parts if part.volumes}


def test_find_sets__every_layout_is_recognised(ct3m):
    expected: dict[tuple[str, str], int] = {}
    for owner in filter(None, FILES.values()):
        expected[owner] = expected.get(owner, 0) + 1
    assert counts(find_sets(ct3m, load_registry(), {})) == expected
    assert len({name for name, _ in expected}) == 17


def test_find_sets__a_set_itself_as_root_and_a_folder_of_another_name(ct3m, tmp_path):
    amos = [entry for entry in load_registry() if entry.name == "amos22"]
    inside = find_sets(ct3m / "amos22", amos, {})
    assert counts(inside) == {("amos22", "train"): 2, ("amos22", "val"): 1, ("amos22", "test"): 1}
    renamed = tmp_path / "challenge-data"
    renamed.symlink_to(ct3m / "amos22")
    assert counts(find_sets(tmp_path, amos, {})) == {}
    assert counts(find_sets(tmp_path, amos, {"amos22": renamed})) == counts(inside)


def test_planned_config__its_globs_match_the_same_files_and_no_test_data(ct3m):
    from meddino_data_curation.sources.candidates import find_files

    found = find_sets(ct3m, load_registry(), {})
    allow = [item.entry.licence.id for item in found]
    planned = planned_config(found, allow, with_test_data=False)
    read = {str(file.path.relative_to(ct3m)) for source in planned.sources for file in find_files(source)}
    wanted = {name for name, owner in FILES.items() if owner and owner[1] != "test"} | {
        "manifest-1599750808610/Pancreas-CT/PANCREAS_0001/11-24-2015-x/Pancreas-99667/1-002.dcm"
    }
    assert read == wanted
    out = {str(file.path.relative_to(ct3m)) for source in planned.held_out for file in find_files(source)}
    tests = {name for name, owner in FILES.items() if owner and owner[1] == "test"}
    assert out == tests | {"Totalsegmentator_dataset_v201/s0011/ct.nii.gz"}
    whole = planned_config(found, allow, with_test_data=True)
    assert {str(file.path.relative_to(ct3m)) for source in whole.sources for file in find_files(source)} == wanted | tests
    assert whole.held_out == ()


def test_planned_config__missing_table_of_test_volumes_is_refused(ct3m, tmp_path):
    (tmp_path / "totalseg" / "s0000").mkdir(parents=True)
    (tmp_path / "totalseg" / "s0000" / "ct.nii.gz").write_bytes(b"x")
    found = find_sets(tmp_path, load_registry(), {})
    with pytest.raises(ConfigError, match=r"meta\.csv names its test volumes"):
        planned_config(found, (), with_test_data=False)
    assert len(planned_config(found, (), with_test_data=True).sources) == 1
    (tmp_path / "totalseg" / "meta.csv").write_text("id;part\ns0000;test\n")
    with pytest.raises(ConfigError, match="lacks the column image_id"):
        find_sets(tmp_path, load_registry(), {})


def test_plan__prints_found_missing_and_licences(ct3m, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["plan", "--root", str(ct3m / "amos22")]) == 0
    printed = capsys.readouterr().out
    assert "train 2/200, val 1/100, test 1/200" in printed
    assert "1 of 17 sets lie there, 4 volumes; 16 are missing" in printed
    assert "https://github.com/neheller/kits23" in printed
    assert main(["plan", "--root", str(ct3m), "licences.allow=[CC-BY-NC-SA-4.0]"]) == 0
    printed = capsys.readouterr().out
    assert "non-commercial: needs licences.allow" in printed  # WORD
    assert "allowed" in printed  # KiTS
    assert "ct_org brings scans of lits again" in printed
    assert "abdomenct_1k, not known: which case comes from which set" in printed
    assert main(["plan", "--root", str(tmp_path)]) == 0
    assert "0 of 17 sets lie there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "OUT"], "unclear: abdomenatlas3 (CC-BY-NC-SA-4.0: non-commercial)"),
        (["--out", "OUT", "--sets", "amos22,kits"], "say licences.allow=[CC-BY-NC-SA-4.0]"),
        (["--out", "OUT", "--sets", "kits", "licences.allow=[CC-BY-4.0]"], "say licences.allow=[CC-BY-NC-SA-4.0]"),
        (["--sets", "amos23"], "no such set in the registry"),
        (["--at", "amos22"], "write SET=DIR"),
        (["--at", "amos23=/tmp"], "no such set in the registry"),
        (["--at", "amos22=/nowhere/at/all"], "no such file or folder"),
    ],
)
def test_plan__wrong_input_is_one_clear_line(ct3m, tmp_path, capsys, arguments, words):
    out = tmp_path / "planned.yaml"
    assert main(["plan", "--root", str(ct3m), *(str(out) if word == "OUT" else word for word in arguments)]) == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


def test_plan__what_it_writes_builds_a_corpus_without_the_test_data(tmp_path, salt_file):
    amos, atlas = tmp_path / "ct" / "amos22", tmp_path / "ct" / "AbdomenAtlas3.0Mini" / "image_only"
    for seed, place in enumerate(("imagesTr/amos_0001", "imagesVa/amos_0008", "imagesTs/amos_0111")):
        write_volume(amos / f"{place}.nii.gz", make_hu(seed))
    write_volume(atlas / "BDMAP_00000001" / "ct.nii.gz", make_hu(0), orientation="RAS")  # the training scan again
    write_volume(atlas / "BDMAP_00000002" / "ct.nii.gz", make_hu(2).astype(np.float32))  # the test scan again: the leak
    write_volume(atlas / "BDMAP_00000003" / "ct.nii.gz", make_hu(3))
    out, corpus = tmp_path / "planned.yaml", tmp_path / "corpus"
    assert main(["plan", "--root", str(tmp_path / "ct"), "--out", str(out), "licences.allow=[CC-BY-NC-SA-4.0]"]) == 0
    config = load_config(CurationConfig, ["default", out], kind="data_curation")
    assert [source.name for source in config.sources] == ["abdomenatlas3", "amos22"]
    command = ["build", "--config", str(out), "--out", str(corpus), f"privacy.salt_file={salt_file}", "workers=1"]
    assert main(command) == 0
    rows = Corpus(corpus).volumes.to_pylist()
    assert sorted((row["dataset"], row["status"]) for row in rows) == [
        ("abdomenatlas3", "accepted"),
        ("abdomenatlas3", "duplicate"),  # of amos22: its own set is preferred
        ("abdomenatlas3", "rejected"),
        ("amos22", "accepted"),
        ("amos22", "accepted"),
    ]
    (entry,) = Corpus(corpus).info["audit"]
    assert (entry["name"], entry["overlaps"], entry["left_out"]) == ("amos22-test", 0, 1)
    assert Corpus(corpus).info["licences"] == ["CC-BY-4.0", "CC-BY-NC-SA-4.0"]
    assert "10.5281/zenodo.7262581" in (corpus / "report.html").read_text()
