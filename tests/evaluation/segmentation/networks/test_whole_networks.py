import torch
from meddino_evaluation.segmentation.networks.whole_networks import build_unet


def test_build_unet__takes_sides_that_its_strides_do_not_divide():
    network = build_unet(channels=1, num_outputs=3, crop_px=36).eval()  # halved three times: 8 does not divide 36
    images = torch.zeros(1, 1, 36, 44)
    images[..., 10:20, 10:20] = 1.0
    logits = network([], images)
    assert logits.shape == (1, 3, 36, 44)
    # What is padded lies at the ends: an image with zeros there of its own gives the same logits.
    wider = network([], torch.nn.functional.pad(images, (0, 4, 0, 4)))
    assert torch.equal(logits, wider[..., :36, :44])
