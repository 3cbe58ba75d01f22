"""What a notebook does with a model: volumes in, tokens with their places out; arrays of all kinds; DINO's layers."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import meddino
from meddino.checkpoints.export.model import random_model
from meddino.core.errors import ConfigError, MedDINOError, VolumeError
from meddino.data.intensity import CTIntensity, ImageIntensity, MRIntensity
from meddino.models.vision_transformer import ViTConfig
from meddino.volumes.geometry import Geometry
from meddino.volumes.volume import Volume
from meddino.volumes.writing import write_volume

SMALL = ViTConfig(embed_dim=32, depth=4, num_heads=2, patch_size=8, num_registers=4, layerscale_init=None)
UPRIGHT = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])


@pytest.fixture(scope="module")
def model():
    return random_model(SMALL, seed=1)


def ct(shape=(3, 21, 30), axes=UPRIGHT, spacing=(5.0, 0.8, 1.1), **facts) -> Volume:
    hu = np.random.default_rng(0).integers(-1000, 400, shape).astype(np.int16)
    return Volume(hu, Geometry(shape, spacing, (-30.0, 12.0, 700.0), axes), modality="CT", **facts)


def oblique() -> np.ndarray:
    """Array axes to Right, Inferior, Anterior or so, turned by eleven degrees about two axes."""
    a, b = np.radians(11), np.radians(-7)
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    return np.array([[-1.0, 0, 0], [0, 0, -1.0], [0, -1.0, 0]]) @ about_x.T @ about_z.T


def test_affine__of_a_volume_is_nibabels(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    volume = ct(axes=oblique())
    write_volume(tmp_path / "a.nii.gz", volume.voxels, volume.geometry)
    read = meddino.read_volume(tmp_path / "a.nii.gz")
    theirs = nibabel.load(tmp_path / "a.nii.gz").affine
    np.testing.assert_allclose(np.diag([-1, -1, 1, 1]) @ read.affine[:, [2, 1, 0, 3]], theirs, atol=1e-3)
    assert read.spacing_mm == pytest.approx(volume.spacing_mm) and np.array_equal(np.asarray(read), volume.voxels)
    assert "int16 [3, 21, 30], 5 x 0.8 x 1.1 mm" in repr(read)


@pytest.mark.parametrize(("axes", "size_px"), [(UPRIGHT, None), (oblique(), None), (oblique(), 60)])
def test_encode_volume__the_token_that_a_voxel_moves_lies_where_the_voxel_does(model, axes, size_px):
    volume = ct(shape=(18, 26, 21), axes=axes, spacing=(1.5, 2.0, 0.9))
    volume.voxels[:] = -1000
    empty = model.encode_volume(volume, size_px=size_px)
    generator = np.random.default_rng(3)
    for _ in range(4):
        at = tuple(int(generator.integers(size)) for size in volume.voxels.shape)
        marked = Volume(volume.voxels.copy(), volume.geometry, modality="CT")
        marked.voxels[at] = 1000
        change = (model.encode_volume(marked, size_px=size_px).tokens - empty.tokens).norm(dim=-1)
        token = np.unravel_index(int(change.argmax()), change.shape)
        where = (volume.affine @ [*at, 1])[:3]
        inside = np.linalg.inv(empty.affine) @ [*where, 1]  # the voxel in the tokens' own indices
        assert np.abs(inside[:3] - token).max() <= 0.5 + 1e-6, (at, token, inside)
        assert (change > 0).any(dim=(1, 2)).sum() == 1  # no slice but its own


def test_encode_volume__equals_a_slice_at_a_time_whatever_the_batch(model, tmp_path):
    volume = ct()
    write_volume(tmp_path / "a.nii.gz", volume.voxels, volume.geometry)
    encoded = model.encode_volume(tmp_path / "a.nii.gz", batch=2)
    assert encoded.tokens.shape == (3, 3, 4, 32) and encoded.cls_tokens.shape == (3, 32) and encoded.body.shape == (3, 3, 4)
    for z in range(3):
        hu = torch.full((24, 32), -1000.0)
        hu[:21, :30] = torch.from_numpy(volume.voxels[z].astype(np.float32))
        output = model.forward_features(model.preprocess(hu)[None])
        torch.testing.assert_close(encoded.tokens[z], output.patch_map[0].movedim(0, -1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(encoded.cls_tokens[z], output.cls_token[0], atol=1e-5, rtol=1e-5)
    assert encoded.geometry.spacing_mm == pytest.approx((5.0, 6.4, 8.8))
    assert any("padded from 21 x 30 to 24 x 32 px with -1000 HU" in note for note in encoded.notes)
    assert "tokens [3, 3, 4, 32]" in repr(encoded) and "padded" in repr(encoded)


def test_encode_volume__what_cannot_be_read_or_is_of_another_modality(model, tmp_path):
    with pytest.raises(VolumeError, match="does not exist"):
        model.encode_volume(tmp_path / "absent.nii.gz")
    volume = ct()
    with pytest.raises(ConfigError, match=r"contract is for CT.*the data are MR"):
        model.encode_volume(Volume(volume.voxels, volume.geometry, modality="MR"))
    holes = volume.voxels.astype(np.float32)
    holes[0, 0, 0] = np.nan
    with pytest.raises(VolumeError, match="no numbers"):
        model.encode_volume(Volume(holes, volume.geometry))
    with pytest.raises(MedDINOError, match="batch is 0"):
        model.encode_volume(volume, batch=0)
    said = model.encode_volume(Volume(volume.voxels + 1000, volume.geometry)).notes
    assert any("is it in Hounsfield units" in note for note in said)


def test_preprocess__numpy_tensor_and_volume_are_the_same(model):
    volume = ct(shape=(2, 16, 24))
    images = model.preprocess(volume)
    assert images.shape == (2, 3, 16, 24)
    assert torch.equal(images, model.preprocess(volume.voxels))
    assert torch.equal(images, model.preprocess(torch.from_numpy(volume.voxels)))
    assert torch.equal(images, model.preprocess(volume.voxels.astype(">i2")[:, ::-1])[:, :, torch.arange(15, -1, -1)])


def test_preprocess__pads_with_air_at_the_end_and_says_so(model):
    hu = torch.zeros(2, 17, 30)
    with pytest.warns(UserWarning, match="padded from 17 x 30 to 24 x 32 px with -1000 HU at the bottom and right"):
        images = model.preprocess(hu)
    air = (-1000 - 65.108) / 178.017
    assert images.shape == (2, 3, 24, 32)
    assert torch.equal(images[..., :17, :30], model.preprocess(torch.zeros(2, 24, 32))[..., :17, :30])
    torch.testing.assert_close(images[..., 17:, :], torch.full((2, 3, 7, 32), air))
    torch.testing.assert_close(images[..., :, 30:], torch.full((2, 3, 24, 2), air))


@pytest.mark.parametrize("contract", [MRIntensity(), ImageIntensity()])
def test_preprocess__arbitrary_units_come_with_a_range_or_are_refused(contract):
    model = random_model(SMALL, contract=contract)
    volume = Volume(np.linspace(0, 900, 2 * 16 * 16).reshape(2, 16, 16), Geometry((2, 16, 16), (1, 1, 1), (0, 0, 0), UPRIGHT))
    with pytest.raises(ConfigError, match=r"values go from 0 to 900"):
        model.preprocess(volume.voxels)
    low, high = np.percentile(volume.voxels, (0.5, 99.5))
    expected = model.preprocess(((volume.voxels - low) / (high - low)).clip(0, 1))
    torch.testing.assert_close(model.preprocess(volume).double(), expected.double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.preprocess(volume.voxels, (low, high)).double(), expected.double(), atol=1e-5, rtol=0)


def test_get_intermediate_layers__as_in_dinos(model):
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    whole = model(images)
    (last,) = model.get_intermediate_layers(images)
    assert torch.equal(last, whole.patch_tokens)
    pairs = model.get_intermediate_layers(images, n=2, return_class_token=True)
    assert torch.equal(pairs[1][0], whole.patch_tokens) and torch.equal(pairs[1][1], whole.cls_token)
    maps = model.get_intermediate_layers(images, n=[3, 1], reshape=True, norm=False)
    assert [one.shape for one in maps] == [(2, 32, 2, 3)] * 2
    # A slow way round: hooks on the blocks.
    seen = {}
    hooks = [
        block.register_forward_hook(lambda _m, _a, output, number=number: seen.__setitem__(number, output.reshape(2, -1, 32)))
        for number, block in enumerate(model.backbone.blocks)
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    for found, number in zip(maps, (1, 3), strict=True):
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), seen[number][:, 5:])
    patches, cls_token, registers = model.get_intermediate_layers(
        images, [1], return_class_token=True, return_extra_tokens=True
    )[0]
    normed = torch.nn.functional.layer_norm(seen[1], (32,), model.backbone.norm.weight, model.backbone.norm.bias, 1e-6)
    torch.testing.assert_close(torch.cat([cls_token[:, None], registers, patches], 1), normed, atol=1e-5, rtol=1e-5)
    for wrong in (0, 5, [4], []):
        with pytest.raises(ConfigError, match="4 blocks, numbered from 0 to 3"):
            model.get_intermediate_layers(images, wrong)


def test_get_intermediate_layers__of_timm_models():
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    convolutional = meddino.load("random:timm:resnet10t")
    (patches, cls_token), *_ = convolutional.get_intermediate_layers(images, 1, reshape=True, return_class_token=True)
    torch.testing.assert_close(cls_token, patches.mean((2, 3)))
    vit = random_model("timm:test_vit")
    size = vit.backbone.fixed_px or (64, 64)
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    (patches, cls_token), *_ = vit.get_intermediate_layers(images, 1, return_class_token=True)
    whole = vit(images)
    assert torch.equal(patches, whole.patch_tokens) and torch.equal(cls_token, whole.cls_token)


def test_pca_and_similarity__of_a_volume(model):
    volume = ct(shape=(2, 32, 40))
    volume.voxels[:, :16] = -1000
    encoded = model.encode_volume(volume)
    assert encoded.body.tolist() == [[[False] * 5] * 2 + [[True] * 5] * 2] * 2
    colours = meddino.pca(encoded, upscale=3)
    assert colours.shape == (2, 12, 15, 3) and not colours[:, :6].any() and colours[:, 6:].any()
    near = meddino.similarity(encoded, (1, 3, 2))
    assert near.shape == (2, 4, 5) and near[1, 3, 2].item() == pytest.approx(1)
    one, other = encoded.tokens[0, 1, 4], encoded.tokens[1, 3, 2]
    assert near[0, 1, 4].item() == pytest.approx((one @ other / one.norm() / other.norm()).item(), abs=1e-5)
    torch.testing.assert_close(meddino.similarity(encoded.tokens, encoded.tokens[1, 3, 2]), near)
    output = model(model.preprocess(volume))
    assert meddino.pca(output).shape == (2, 4, 5, 3) and meddino.similarity(output, (0, 1, 1)).shape == (2, 4, 5)
    for wrong in ((0, 1), (2, 0, 0), (0, -1, 0), torch.zeros(7)):
        with pytest.raises(ConfigError, match=r"patch \(|a vector of"):
            meddino.similarity(encoded, wrong)
    with pytest.raises(ConfigError, match="tokens are"):
        meddino.pca(volume)


def test_repr__says_shapes(model):
    said = repr(model)
    for part in ("[B, 3, H, W], H and W multiples of 8", "cls_token [B, 32]", "register_tokens [B, 4, 32]", "Hounsfield units"):
        assert part in said
    assert "patch_tokens [2, 6, 32], grid 2 x 3" in repr(model(torch.zeros(2, 3, 16, 24)))
    assert repr(random_model("timm:resnet10t", contract=CTIntensity())).startswith("Model timm:resnet10t")


def test_namespace__is_clean_and_the_import_light():
    script = (
        "import sys, meddino; assert dir(meddino) == sorted(meddino.__all__), dir(meddino);"
        "heavy = {'torch', 'numpy', 'pydantic', 'SimpleITK', 'importlib.metadata'} & set(sys.modules); assert not heavy, heavy;"
        "import meddino.data.corpus; assert dir(meddino) == sorted(meddino.__all__);"
        "assert meddino.Volume.__name__ == 'Volume' and meddino.pca and meddino.__version__"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = meddino.nothing
