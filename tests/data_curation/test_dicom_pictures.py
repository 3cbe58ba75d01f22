"""Radiographs, mammograms, ultrasound and OCT as DICOM come in as pictures; what says that text is burned in stays out."""

import json

import numpy as np
import pyarrow.parquet as pq
from meddino_data_curation.cli import main
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DigitalMammographyXRayImageStorageForPresentation,
    OphthalmicTomographyImageStorage,
    UltrasoundImageStorage,
)
from scipy.ndimage import gaussian_filter

from meddino.data.corpus import Corpus
from tests.data_curation.dicom_files import ct_slice


def brightness(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = 3 * gaussian_filter(rng.normal(size=(96, 80)), 6) + gaussian_filter(rng.normal(size=(96, 80)), 1.5)
    return ((values - values.min()) / np.ptp(values) * 4000).astype(np.int16)


def write(folder, name: str, seed: int, kind: str, code: str, **changes) -> None:
    own = {"SOPClassUID": kind, "Modality": code, "RescaleIntercept": 0, "RescaleSlope": 1, **changes}
    item = ct_slice(brightness(seed), 0.0, series=f"series-{seed}", patient=f"Name{seed}", **own)
    item.file_meta.MediaStorageSOPClassUID = kind
    item.PixelData = brightness(seed).astype("<u2").tobytes()
    item.PixelRepresentation = 0
    item.save_as(folder / name)


def test_build__dicom_pictures_are_read_with_their_own_range_and_burned_in_text_is_refused(tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    write(scans, "a.dcm", 0, ComputedRadiographyImageStorage, "CR")
    write(scans, "Smith_John", 1, DigitalMammographyXRayImageStorageForPresentation, "MG")
    write(scans, "c.dcm", 2, OphthalmicTomographyImageStorage, "OPT")
    write(scans, "d.dcm", 3, UltrasoundImageStorage, "US", BurnedInAnnotation="YES")
    config = {"sources": [{"name": "own", "path": str(scans), "modality": "image"}], "workers": 1}
    (tmp_path / "sources.yaml").write_text(json.dumps(config))
    assert main(["build", "--config", str(tmp_path / "sources.yaml"), "--out", str(tmp_path / "corpus")]) == 0
    rows = pq.read_table(tmp_path / "corpus" / "volumes.parquet").to_pylist()
    assert sorted(row["status"] for row in rows) == ["accepted"] * 3 + ["rejected"]
    assert [row["reason"] for row in rows if row["reason"]] == ["DICOM: text is burned into the picture"]
    assert len({row["patient_key"] for row in rows}) == 4 and "Smith" not in str(rows)
    corpus = Corpus(tmp_path / "corpus")
    assert corpus.modalities == ("image",)
    for index in range(3):
        values, (low, high) = corpus.read(index), corpus.value_range(index)
        assert values.dtype == np.uint16 and any(np.array_equal(values, brightness(seed)) for seed in range(3))
        assert low > 0 and 3000 < high < 4001


def test_build__colour_dicom_and_the_pictures_of_an_npz_are_read_one_by_one(tmp_path):
    scans, rng = tmp_path / "scans", np.random.default_rng(5)
    scans.mkdir()
    colours = [np.stack([brightness(10 * seed + c) // 17 for c in range(3)], axis=-1).astype(np.uint8) for seed in range(4)]
    changes = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PhotometricInterpretation": "RGB", "BitsAllocated": 8}
    item = ct_slice(brightness(0), 0.0, SOPClassUID=UltrasoundImageStorage, Modality="US", BitsStored=8, HighBit=7, **changes)
    item.PixelData = colours[0].tobytes()
    item.save_as(scans / "us.dcm", enforce_file_format=True)
    write(scans, "cmyk.dcm", 1, UltrasoundImageStorage, "US", SamplesPerPixel=4, PhotometricInterpretation="CMYK")
    np.savez_compressed(scans / "Smith_John.npz", images=np.stack(colours[1:]), labels=np.zeros((3, 1), np.uint8))
    np.savez(scans / "floats.npz", images=rng.normal(size=(2, 64, 64)))
    (scans / "broken.npz").write_bytes(b"PK no archive")
    config = {"sources": [{"name": "own", "path": str(scans), "modality": "image"}], "workers": 1}
    (tmp_path / "sources.yaml").write_text(json.dumps(config))
    assert main(["build", "--config", str(tmp_path / "sources.yaml"), "--out", str(tmp_path / "corpus")]) == 0
    rows = pq.read_table(tmp_path / "corpus" / "volumes.parquet").to_pylist()
    reasons = sorted(row["reason"] for row in rows if row["reason"])
    for found, words in zip(reasons, ("kind of colour that is not read", "arrays cannot be read", "float64"), strict=True):
        assert words in found
    accepted = [row for row in rows if row["status"] == "accepted"]
    assert len(accepted) == 4 and len({row["patient_key"] for row in accepted}) == 4 and "Smith" not in str(rows)
    assert sum("hold no pictures: 1" in (row["notes"] or "") for row in accepted) == 3
    corpus = Corpus(tmp_path / "corpus")
    read = [corpus.read(index) for index in range(4)]
    for colour in colours:
        assert any(np.array_equal(colour, each) for each in read)
    assert {corpus.value_range(index) for index in range(4)} == {(0.0, 255.0)}
    (tmp_path / "list.txt").write_text("Smith_John.npz#images#1\n")
    arguments = ["--config", str(tmp_path / "sources.yaml"), "--exclude", str(tmp_path / "list.txt")]
    assert main(["build", "--out", str(tmp_path / "less"), *arguments]) == 0
    less = Corpus(tmp_path / "less")
    assert len(less) == 3 and not any(np.array_equal(colours[2], less.read(index)) for index in range(3))


def test_build__pictures_of_one_uid_are_told_apart_and_a_copy_is_found_by_its_pixels(tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    one = {"SOPInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2", "PatientID": "p", "StudyInstanceUID": "1"}
    for name, seed in (("a.dcm", 0), ("b.dcm", 1), ("c.dcm", 2), ("copy.dcm", 2)):
        write(scans, name, seed, ComputedRadiographyImageStorage, "CR", **one)
    config = {"sources": [{"name": "own", "path": str(scans), "modality": "image"}], "workers": 1}
    (tmp_path / "sources.yaml").write_text(json.dumps(config))
    assert main(["build", "--config", str(tmp_path / "sources.yaml"), "--out", str(tmp_path / "corpus")]) == 0
    rows = pq.read_table(tmp_path / "corpus" / "volumes.parquet").to_pylist()
    assert len({row["volume_id"] for row in rows}) == 4
    assert sorted((row["status"], row["duplicate_kind"]) for row in rows if row["status"] != "accepted") == [
        ("duplicate", "exact")
    ]
