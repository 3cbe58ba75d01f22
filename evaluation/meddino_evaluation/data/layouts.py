"""A data set from its folder, whichever layout it is in."""

from pathlib import Path

from meddino.core.errors import ConfigError
from meddino_evaluation.data.dataset import LabelledDataset
from meddino_evaluation.data.msd import is_msd, read_msd
from meddino_evaluation.data.nnunet_raw import read_dataset_json, read_nnunet_raw
from meddino_evaluation.data.table import TABLE_FILE, read_case_table


def open_dataset(root: Path) -> LabelledDataset:
    """Read a data set in nnU-Net's raw layout, in the Decathlon's, or as folders with a cases.csv.

    Raises:
        ConfigError: It is none of them, or what describes it is wrong.
        VolumeError: A file is missing.
    """
    if root.is_dir() and not (root / "dataset.json").is_file():
        if (root / TABLE_FILE).is_file():
            return read_case_table(root)
        raise ConfigError(
            f"{root} is no data set: neither dataset.json (nnU-Net's raw layout, the Decathlon's) nor {TABLE_FILE} "
            "(case, image, label) is in it"
        )
    content = read_dataset_json(root)
    return read_msd(root, content) if is_msd(content) else read_nnunet_raw(root)
