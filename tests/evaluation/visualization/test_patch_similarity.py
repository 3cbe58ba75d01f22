import re
import subprocess

import numpy as np
import pytest
import torch
from meddino_evaluation.classification.images import SliceStack
from meddino_evaluation.cli import main
from meddino_evaluation.visualization.embedding import tsne
from meddino_evaluation.visualization.patch_similarity import (
    PatchMap,
    patch_map,
    pca_picture,
    similarity_map,
    similarity_page,
    similarity_picture,
)

from meddino.core.errors import ConfigError
from tests.browser import CHROMIUM, QUIET, check_page, needs_chromium


def _stack(side=64):
    values = np.random.default_rng(0).normal(0, 100, size=(3, 1, side, side)).astype(np.int16)
    values[:, :, 16:40, 8:32] += 600
    return SliceStack(values, "hu")


def test_similarity_map__slow_loop(backbone):
    patches = patch_map(backbone, _stack(), 1, 64)
    assert patches.grid == (8, 8)
    found = similarity_map(patches, 2, 5)
    chosen = patches.tokens[:, 2, 5]
    for row in range(8):
        for column in range(8):
            other = patches.tokens[:, row, column]
            assert found[row, column].item() == pytest.approx((chosen @ other / chosen.norm() / other.norm()).item(), abs=1e-5)
    assert found[2, 5].item() == pytest.approx(1)


def test_pictures__size_and_frame(backbone):
    patches = patch_map(backbone, _stack(), 0, 64)
    picture = similarity_picture(patches, 3, 4)
    assert picture.shape == (64, 64, 3)
    assert tuple(picture[24, 32]) == (255, 40, 40)
    assert pca_picture(patches).shape == (64, 64, 3)


def test_patch_map__up_to_2048_px():
    from meddino_evaluation.backbones.load import load_backbone

    vit16 = load_backbone("random:timm:vit_tiny_patch16_224")
    with pytest.raises(ConfigError, match="up to 2048"):
        patch_map(vit16, _stack(), 0, 2064)
    with pytest.raises(ConfigError, match="slices 0 to 2"):
        patch_map(vit16, _stack(), 3, 224)
    with pytest.raises(ConfigError, match="rows go from 0 to 13"):
        similarity_map(patch_map(vit16, _stack(), 0, 224), 14, 0)


@pytest.mark.slow
def test_patch_map__2048_px():
    from meddino_evaluation.backbones.load import load_backbone

    patches = patch_map(load_backbone("random:vitt16"), _stack(), 0, 2048)
    assert patches.grid == (128, 128)
    assert similarity_picture(patches, 0, 0).shape == (2048, 2048, 3)
    assert len(similarity_page(patches, "large", 0, 0)) < 2**23


def test_similarity_page__wide_tokens_are_projected_and_it_says_how_far_off():
    tokens = torch.randn(300, 6, 5, generator=torch.Generator().manual_seed(0))
    page = similarity_page(PatchMap(tokens, np.zeros((96, 80), np.uint8), 16), "wide <b>", 1, 1)
    assert "wide &lt;b&gt;" in page
    off = float(re.search(r"at most ([0-9.]+)", page).group(1))
    assert 0 <= off < 1e-3  # 30 patches span 30 dimensions: 128 hold them all


def _dumped(page, path):
    path.write_text(page)
    more = (f"--user-data-dir={path.parent / 'profile'}", "--virtual-time-budget=4000")
    command = [CHROMIUM, *QUIET, *more, "--dump-dom", path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.browser
@needs_chromium
def test_similarity_page__a_click_shows_that_patchs_map(backbone, tmp_path):
    patches = patch_map(backbone, _stack(), 0, 64)
    page = similarity_page(patches, "page", 2, 5)

    def readout(row, column):
        values = similarity_map(patches, row, column)
        return f"patch {row},{column}: similarity from {values.min():.3f} to {values.max():.3f}, mean {values.mean():.3f}"

    assert readout(2, 5) in _dumped(page, tmp_path / "first.html")
    click = """<script>window.addEventListener("load", () => setTimeout(() => {
      const box = document.getElementById("image").getBoundingClientRect();
      const place = {clientX: box.left + box.width * 1.5 / 8, clientY: box.top + box.height * 6.5 / 8, bubbles: true};
      document.getElementById("image").dispatchEvent(new MouseEvent("click", place)); }, 200));</script></body>"""
    assert readout(6, 1) in _dumped(page.replace("</body>", click), tmp_path / "clicked.html")
    assert check_page(page)["rows"] == [1, 1]  # the map beside the picture, the colours beside the slice
    for window in ("soft-tissue window (level 40, width 400 HU)", "lung window", "bone window"):
        assert window in page


def test_pca_picture__air_is_black(backbone):
    stack = SliceStack(np.where(np.arange(64)[:, None] < 32, -1000, _stack().values), "hu")
    picture = pca_picture(patch_map(backbone, stack, 0, 64))
    assert not picture[:32].any() and picture[32:].any()


def test_tsne__separates_far_clusters_and_repeats():
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(size=(12, 8)) * 0.1 + np.eye(8)[k] * 5 for k in range(2)])
    places = tsne(features, seed=1)
    np.testing.assert_array_equal(places, tsne(features, seed=1))
    within = np.linalg.norm(places[:12] - places[:12].mean(0), axis=1).max()
    assert np.linalg.norm(places[:12].mean(0) - places[12:].mean(0)) > within
    with pytest.raises(ConfigError, match="at least 4"):
        tsne(features[:3])


def test_visualize_command(fake_set, tmp_path, capsys):
    dataset = fake_set("ct_contrast")
    image = dataset.cases[0].source
    words = ["visualize", "--model", "random:vitnano8", "--image", image, "--size", "64", "--out", str(tmp_path)]
    assert main([*words, "--patch", "1,2", "--data", "ct_contrast", "--root", str(dataset.root)]) == 0
    for name in ("pca.png", "similarity.png", "image.png", "similarity.html", "tsne.png", "tsne.html"):
        assert (tmp_path / name).stat().st_size > 0
    assert main([*words, "--patch", "90,2"]) == 2
    assert "rows go from 0 to 7" in capsys.readouterr().err
    assert main([*words[:3], "--out", str(tmp_path)]) == 2
