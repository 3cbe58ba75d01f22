"""Prompts in volumes: a drawn box means the same place whatever the file's axes are, and points run from training to a mask."""

import csv
import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from meddino_evaluation.cli import main
from meddino_evaluation.data.prepare import GridRule, prepare_volume
from meddino_evaluation.prompts import predict as predict_module
from meddino_evaluation.prompts.config import PromptConfig
from meddino_evaluation.prompts.drawing import Prompt
from meddino_evaluation.prompts.predict import PromptBundle, predict_prompted
from meddino_evaluation.prompts.run import run_task
from meddino_evaluation.tasks.definition import load_task
from meddino_evaluation.tasks.fake_data import make_fake

from meddino.core.device import find_machine
from meddino.volumes.geometry import geometry_from_xyz
from tests.evaluation.prompts.test_prompts import MODEL, QUICK, small_network

DIRECTIONS = {
    "LPS": (1, 0, 0, 0, 1, 0, 0, 0, 1),
    "RAS": (-1, 0, 0, 0, -1, 0, 0, 0, 1),
    "x to the feet": (0, 0, 1, 0, 1, 0, -1, 0, 0),
}


@pytest.mark.parametrize("directions", DIRECTIONS.values(), ids=DIRECTIONS.keys())
def test_predict_prompted__a_box_is_found_where_it_was_drawn_whatever_the_files_axes(directions, monkeypatch):
    """The patient's left, back and head are where x, y and slice grow, so the voxel is known from its place in mm."""
    geometry = geometry_from_xyz((10, 20, 6), (2.0, 1.5, 3.0), (5.0, -7.0, 11.0), directions)
    voxels = np.random.default_rng(0).normal(0, 100, geometry.shape).astype(np.float32)
    case = prepare_volume("one", voxels[None], geometry, GridRule(size_px=48))

    def inside_the_box(network, maps, prompts, plane, source_plane):
        """Say yes to the pixels whose centres lie in the box, as the network sees them."""
        (x0, y0, x1, y1) = prompts[0].box
        rows, cols = source_plane
        y = (np.arange(rows) + 0.5) * plane[0] / rows - 0.5
        x = (np.arange(cols) + 0.5) * plane[1] / cols - 0.5
        found = ((y[:, None] >= y0) & (y[:, None] <= y1)) & ((x[None] >= x0) & (x[None] <= x1))
        return torch.from_numpy(np.where(found, 1.0, -1.0))[None]

    monkeypatch.setattr(predict_module, "predict_prompts", inside_the_box)
    config = PromptConfig(size_px=48)
    bundle = PromptBundle(small_network(), config, {}, find_machine("cpu", "fp32"))
    drawn = (2.9, 3.9, 5.1, 8.1)  # a little more than the centres of pixels 3 to 5 and 4 to 8
    labels = predict_prompted(bundle, case, [(1, Prompt(box=drawn))])
    assert labels.shape == geometry.shape and labels.sum() == 3 * 5
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing((2.0, 1.5, 3.0))
    image.SetOrigin((5.0, -7.0, 11.0))
    image.SetDirection(directions)
    corners = [image.TransformIndexToPhysicalPoint(c) for c in ((0, 0, 0), tuple(s - 1 for s in image.GetSize()))]
    first = np.minimum(*corners)  # the voxel farthest to the right, front and feet
    steps_mm = np.abs(np.array(directions).reshape(3, 3)) @ np.array([2.0, 1.5, 3.0])
    places = [image.TransformIndexToPhysicalPoint(tuple(map(int, one))) for one in np.argwhere(labels)[:, ::-1]]
    numbers = np.rint((np.array(places) - first) / steps_mm).astype(int)
    assert {tuple(one) for one in numbers} == {(x, y, 1) for x in (3, 4, 5) for y in (4, 5, 6, 7, 8)}


def test_run_task__points_in_volumes_from_training_to_a_mask_of_ones_own(tmp_path, capsys):
    make_fake("mmwhs_ct", tmp_path / "root", 4)
    out, own = tmp_path / "out", tmp_path / "own"
    quick = ("training.steps=3", "metrics.surface=false", "prompts.kind=point", "prompts.points=2")
    run_task(load_task("mmwhs_ct"), MODEL, tmp_path / "root", out, (*QUICK, *quick))
    metrics = json.loads((out / "metrics.json").read_text())
    with (out / "cases.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["label"] for row in rows} == set(load_task("mmwhs_ct").labels)
    assert metrics["prompts"]["prompts"]["kind"] == "point" and metrics["unit"] == "mm"
    image = tmp_path / "root/ct_train/ct_train_1001_image.nii.gz"
    words = ["predict", "--results", str(out), "--input", str(image), "--out", str(own)]
    assert main([*words, "--point", "1:20,20", "--point", "2:24,24", "--box", "2:10,10,20,20"]) == 0
    assert main([*words, "--box", "10,10,20,20"]) == 2
    assert "write which, from 0, as slice:10,10,20,20" in capsys.readouterr().err
    found, given = (sitk.ReadImage(str(path)) for path in (own / "ct_train_1001_image.nii.gz", image))
    assert found.GetSize() == given.GetSize() and found.GetSpacing() == given.GetSpacing()
    assert set(np.unique(sitk.GetArrayFromImage(found)[[0, 3]])) == {0}  # only slices that were prompted
    assert (own / "ct_train_1001_image_overlay.png").is_file()
    capsys.readouterr()
    for options, message in ((["--point", "4:20,20"], "slice 4 lies outside"), (["--point", "1:48,2"], "x is 0 to 47")):
        assert main([*words, *options]) == 2
        assert message in capsys.readouterr().err
