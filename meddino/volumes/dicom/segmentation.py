"""Label maps as DICOM Segmentation objects, which viewers lay over the series they were made from (highdicom)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from meddino.core.errors import ConfigError
from meddino.core.files import atomic_write
from meddino.volumes.archives import open_file
from meddino.volumes.dicom.elements import silent_pydicom


def write_dicom_seg(path: Path, masks: Mapping[str, NDArray[np.bool_]], files: Sequence[Path], version: str) -> None:
    """Write one binary segment a label, always under the label's own number; one without a voxel has no frames.

    Args:
        path: File; its folder is made.
        masks: Of every label of the scheme, by name: [Z, Y, X], slice z over file z. The first is segment 1, found or not:
            numbers that went by what was found would mean something else in each case.
        files: The series that was segmented.
        version: Of MedDINO.

    Raises:
        ConfigError: highdicom is not installed.
    """
    try:
        import highdicom as hd
        from pydicom.sr.codedict import codes
    except ImportError as error:
        raise ConfigError(
            "--format dicomseg needs highdicom, which is not installed: pip install 'meddino[dicomseg]'"
        ) from error
    with silent_pydicom():  # highdicom, too, quotes a patient's name that is not written as it should be
        _write(path, masks, files, version, hd, codes)


def _write(
    path: Path, masks: Mapping[str, NDArray[np.bool_]], files: Sequence[Path], version: str, hd: Any, codes: Any
) -> None:
    sources = []
    for file in files:
        with open_file(file) as stream:
            sources.append(pydicom.dcmread(stream))
    algorithm = hd.AlgorithmIdentificationSequence(name="MedDINO", version=version, family=codes.cid7162.ArtificialIntelligence)
    descriptions: list[Any] = [
        hd.seg.SegmentDescription(
            segment_number=place + 1,
            segment_label=name[:64],
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for place, name in enumerate(masks)
    ]
    pixels = np.stack(list(masks.values()), axis=-1).astype(np.uint8)
    segmentation = hd.seg.Segmentation(
        source_images=sources,
        pixel_array=pixels,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=descriptions,
        series_instance_uid=hd.UID(),
        series_number=900,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="MedDINO",
        manufacturer_model_name="meddino-eval predict",
        software_versions=version,
        device_serial_number="0",
        omit_empty_frames=bool(pixels.any()),
    )
    with atomic_write(path) as stream:
        segmentation.save_as(stream)
