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
