"""Label maps as DICOM Segmentation objects, which viewers lay over the series they were made from (highdicom)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from meddino.core.errors import ConfigError
from meddino.core.files import atomic_write


def write_dicom_seg(path: Path, masks: Mapping[str, NDArray[np.bool_]], files: Sequence[Path], version: str) -> None:
    """Write one binary segment a label; those without a voxel are left out, unless all are empty.

    Args:
        path: File; its folder is made.
        masks: By the label's name: [Z, Y, X], slice z over file z.
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
    sources = [pydicom.dcmread(file) for file in files]
    algorithm = hd.AlgorithmIdentificationSequence(name="MedDINO", version=version, family=codes.cid7162.ArtificialIntelligence)
    present = [name for name, mask in masks.items() if mask.any()] or list(masks)[:1]
    descriptions: list[Any] = [
        hd.seg.SegmentDescription(
            segment_number=place + 1,
            segment_label=name[:64],
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for place, name in enumerate(present)
    ]
    pixels = np.stack([masks[name] for name in present], axis=-1).astype(np.uint8)
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
