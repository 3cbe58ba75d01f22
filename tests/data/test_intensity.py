"""The modality as data: which member a mapping means, and what is refused."""

import subprocess
import sys

import pytest

from meddino.core.errors import ConfigError
from meddino.data.intensity import CTIntensity, ImageIntensity, MRIntensity, read_intensity


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, CTIntensity()),
        ({"hu_min": -160.0, "hu_max": 240.0}, CTIntensity(hu_min=-160.0, hu_max=240.0)),
        ({"modality": "ct", "channels": 1}, CTIntensity(channels=1)),
        ({"modality": "mr"}, MRIntensity()),
        ({"modality": "image", "mean": [0.5], "std": [0.25]}, ImageIntensity(mean=(0.5,), std=(0.25,))),
    ],
)
def test_read_intensity__member_of_the_modality(values, expected):
    assert read_intensity(values, "here") == expected


def test_read_intensity__what_was_written_before_there_were_modalities_is_ct():
    written = {"channels": 3, "hu_max": 1000.0, "hu_min": -1000.0, "mean": 65.108, "std": 178.017}
    assert read_intensity(written, "config.json") == CTIntensity()


@pytest.mark.parametrize("member", [CTIntensity(mean=1.0), MRIntensity(std=2.0), ImageIntensity(mean=(0.1,), std=(0.2,))])
def test_read_intensity__reads_back_what_a_member_writes(member):
    assert read_intensity(member.model_dump(mode="json"), "here") == member


@pytest.mark.parametrize(
    ("values", "key", "value"),
    [
        ({"modality": "pet"}, "input_contract", "ct, mr or image"),
        ({"modality": "mr", "hu_min": -100.0}, "'input_contract.hu_min'", "channels, mean, modality, std"),
        ({"hu_mn": 1.0}, "'input_contract.hu_mn'", "'hu_min'"),
        ({"std": -1.0}, "'input_contract.std'", "-1.0"),
        ({"hu_min": 5.0, "hu_max": 5.0}, "hu_min 5.0", "hu_max 5.0"),
        ({"modality": "image", "mean": [0.5]}, "mean has 1", "std 3"),
        ({"modality": "image", "mean": [0.5, 0.5], "std": [1.0, 1.0]}, "mean has 2", "both have 1 or both have 3"),
        ("ct", "input_contract", "ct"),
    ],
)
def test_read_intensity__names_key_and_value(values, key, value):
    with pytest.raises(ConfigError) as error:
        read_intensity(values, "model/config.json")
    assert key in str(error.value) and value in str(error.value) and "model/config.json" in str(error.value)


def test_intensity__schema_needs_no_torch():
    code = "import sys, meddino.data.intensity; sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'jaxtyping')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
