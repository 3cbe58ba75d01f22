"""Fake copies of tasks, each made once."""

from collections.abc import Callable
from pathlib import Path

import pytest
from meddino_evaluation.tasks.fake_data import make_fake

PATIENTS = {"buid": 6, "drive": 6, "jsrt": 2, "prostate_sites": 2}


@pytest.fixture(scope="session")
def fake_root(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def root(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            make_fake(name, made[name], PATIENTS.get(name, 4))
        return made[name]

    return root
