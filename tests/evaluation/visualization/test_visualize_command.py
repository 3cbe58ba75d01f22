import numpy as np
import pytest
from meddino_evaluation.backbones.contract import ImageContract
from meddino_evaluation.backbones.load import load_backbone
from meddino_evaluation.cli import main
from PIL import Image

from meddino.data.intensity import MRIntensity


@pytest.fixture
def words(tmp_path):
    values = np.random.default_rng(0).integers(-500, 500, (64, 64)).astype(np.int16)
    np.savez(tmp_path / "slices.npz", one=values)
    image = f"{tmp_path / 'slices.npz'}#one"
    return ["visualize", "--model", "random:vitnano8", "--image", image, "--size", "64", "--out", str(tmp_path / "out")]


def test_visualize__writes_over_its_own_pictures_alone(words, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    mine = tmp_path / "out" / "pca.png"
    Image.new("L", (4, 4)).save(mine)
    before = mine.read_bytes()
    assert main(words) == 2
    assert "holds 'pca.png', and no visualization was begun there" in capsys.readouterr().err
    assert mine.read_bytes() == before and len(list(mine.parent.iterdir())) == 1
    mine.unlink()
    assert main(words) == 0
    assert main(words) == 0


def test_visualize__a_model_of_mr_on_ct_is_told_in_the_log_and_on_the_page(words, tmp_path, capsys, monkeypatch):
    assert main(words) == 0
    page = tmp_path / "out" / "similarity.html"
    assert "scaled to its range" not in page.read_text()
    found = load_backbone("random:vitnano8")
    monkeypatch.setattr(found, "contract", ImageContract(multiple_px=8, native_size_px=64, own=MRIntensity()), raising=False)
    monkeypatch.setattr("meddino_evaluation.backbones.load.load_backbone", lambda _: found)
    assert main(words) == 0
    note = "the model's input contract is for"
    assert note in capsys.readouterr().err and "scaled to its range" in page.read_text()
