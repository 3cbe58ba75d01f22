"""Label maps as DICOM Segmentation objects, which viewers lay over the series they were made from (highdicom)."""

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

import meddino
from meddino.core.errors import ConfigError
from meddino.core.files import atomic_write
from meddino_evaluation.data.dicom import DicomSeries
from meddino_evaluation.data.labels import LabelScheme


def write_dicom_seg(path: Path, labels: NDArray[np.int32], scheme: LabelScheme, series: DicomSeries) -> None:
    """Write one binary segment a label.

    Args:
        path: File; its folder is made.
        labels: [Z, Y, X], slice z over file z of the series.
        scheme: Names and values.
        series: What was segmented.

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
    sources = [pydicom.dcmread(file) for file in series.files]
    version = meddino.__version__
    algorithm = hd.AlgorithmIdentificationSequence(name="MedDINO", version=version, family=codes.cid7162.ArtificialIntelligence)
    present = [number for number in range(len(scheme.names)) if scheme.mask(labels, number).any()]
    descriptions: list[Any] = [
        hd.seg.SegmentDescription(
            segment_number=place + 1,
            segment_label=scheme.names[number][:64],
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for place, number in enumerate(present or [0])
    ]
    masks = np.stack([scheme.mask(labels, number) for number in (present or [0])], axis=-1).astype(np.uint8)
    segmentation = hd.seg.Segmentation(
        source_images=sources,
        pixel_array=masks,
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
        omit_empty_frames=bool(masks.any()),
    )
    with atomic_write(path) as stream:
        segmentation.save_as(stream)
