import pytest
import torch
from meddino_evaluation.segmentation.inference.sliding_window import SlidingWindow, window_starts
from torch import nn

from meddino.core.errors import MedDINOError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 5, padding=2), nn.GELU(), nn.Conv2d(8, 3, 3, padding=1)).eval().requires_grad_(False)


@pytest.mark.parametrize("size", [(32, 32), (50, 61), (20, 45), (17, 19)])
@pytest.mark.parametrize("gaussian", [True, False])
def test_sliding_window__a_pixelwise_network_gives_what_it_gives_at_once(size, gaussian):
    torch.manual_seed(0)
    net, images = nn.Conv2d(1, 3, 1).eval(), torch.randn(3, 1, *size)
    found = SlidingWindow(32, gaussian=gaussian, batch_size=5)(images, net, pad_value=-2.5)
    torch.testing.assert_close(found, net(images), atol=1e-6, rtol=0)


def test_sliding_window__one_window_is_not_weighted_and_the_pad_value_is_seen():
    net, image = network(), torch.randn(1, 1, 20, 32)
    padded = torch.nn.functional.pad(image, (0, 0, 6, 6), value=-2.5)
    assert torch.equal(SlidingWindow(32)(image, net, -2.5), net(padded)[:, :, 6:26])


def test_window_starts__cover_everything_and_end_at_the_border():
    assert window_starts(100, 40, 0.5) == [0, 20, 40, 60]
    assert window_starts(101, 40, 0.5) == [0, 20, 40, 60, 61]
    assert window_starts(40, 40, 0.5) == [0]
    from monai.data.utils import dense_patch_slices

    for size in range(32, 120):  # where training cuts its grid, prediction cuts too
        assert window_starts(size, 32, 0.5) == [one[0].start for one in dense_patch_slices([size], [32], [16])]


def test_mirror__average_of_the_four_mirrorings():
    net, image = network(), torch.randn(1, 1, 32, 32)
    found = SlidingWindow(32, mirror=True)(image, net, 0.0)
    with torch.no_grad():
        wanted = sum(net(image.flip(axes)).flip(axes) for axes in ([], [2], [3], [2, 3])) / 4
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (60, 60)])
def test_out_of_memory__batch_is_halved_and_the_result_the_same(size, caplog):
    net, images = network(), torch.randn(4, 1, *size)

    def greedy(batch):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("pretended")
        return net(batch)

    window = SlidingWindow(32, batch_size=8)
    found = window(images, greedy, 0.0)
    assert window.batch_size == 2
    assert "inference.batch_size=2" in caplog.text
    torch.testing.assert_close(found, SlidingWindow(32, batch_size=8)(images, net, 0.0), atol=1e-5, rtol=1e-5)


def test_out_of_memory__one_window_that_does_not_fit_is_said():
    def never(batch):
        raise torch.OutOfMemoryError("pretended")

    with pytest.raises(MedDINOError, match="32 x 32 pixels"):
        SlidingWindow(32)(torch.zeros(2, 1, 32, 32), never, 0.0)


def test_other_errors__are_not_swallowed():
    def broken(batch):
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"):
        SlidingWindow(32)(torch.zeros(2, 1, 32, 32), broken, 0.0)
