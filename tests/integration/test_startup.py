"""The core starts quickly: what only some users need is imported where it is asked for."""

import subprocess
import sys

import pytest


def _imported_by(module: str) -> set[str]:
    code = f"import {module}, sys; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("meddino.core.config", {"timm", "torchvision", "torch", "SimpleITK", "matplotlib"}),
        ("meddino_pretrain.config", {"timm", "torch", "numpy", "jaxtyping", "matplotlib", "transformers"}),
        ("meddino_pretrain.bench.commands", {"timm", "torch", "matplotlib", "transformers"}),
        ("meddino_pretrain.show", {"timm", "torch", "numpy", "matplotlib", "transformers"}),
        ("meddino.demo", {"timm", "torchvision", "torch", "SimpleITK", "matplotlib"}),
        ("meddino.models.vision_transformer", {"timm", "torchvision", "SimpleITK", "matplotlib", "transformers", "sklearn"}),
        ("meddino.losses", {"timm", "torchvision", "SimpleITK", "matplotlib", "transformers", "sklearn"}),
        ("meddino_pretrain.cli", {"timm", "torchvision", "SimpleITK", "pydicom", "matplotlib", "monai", "sklearn"}),
        ("meddino_data_curation.cli", {"timm", "torch", "matplotlib", "monai", "sklearn", "tensorboard"}),
        ("meddino_data_curation.corpus.build", {"timm", "torch", "monai", "sklearn", "tensorboard"}),
        ("meddino_evaluation.cli", {"timm", "torchvision", "matplotlib", "monai", "tensorboard"}),
        ("meddino.checkpoints.cli", {"timm", "torchvision", "SimpleITK", "matplotlib", "transformers", "onnx"}),
    ],
)
def test_import__brings_nothing_that_others_need(module, absent):
    assert not _imported_by(module) & absent
