"""Gram anchoring against loops over pairs of patches; gradients against autograd's."""

import pytest
import torch

from meddino.losses import gram
from meddino.losses.gram import gram_loss, resize_patch_map


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def slow(student, teacher, per_image, negatives):
    if not per_image:
        student, teacher = student.flatten(0, 1)[None], teacher.flatten(0, 1)[None]
    squares = []
    for own, aim in zip(student.double(), teacher.double(), strict=True):
        for i in range(len(own)):
            for j in range(len(own)):
                one, other = cosine(own[i], own[j]), cosine(aim[i], aim[j])
                if negatives != "keep":
                    other = max(other, 0.0)
                if negatives == "remove":
                    one = max(one, 0.0)
                squares.append((one - other) ** 2)
    return sum(squares) / len(squares)


def dense(student, teacher, per_image, negatives):
    student, teacher = (torch.nn.functional.normalize(tokens, dim=-1) for tokens in (student, teacher))
    if not per_image:
        student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
    one, other = student @ student.transpose(-1, -2), teacher @ teacher.transpose(-1, -2)
    other = other if negatives == "keep" else other.clamp(min=0)
    one = one.clamp(min=0) if negatives == "remove" else one
    return torch.nn.functional.mse_loss(one, other)


@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("negatives", ["keep", "remove", "remove_teacher"])
@pytest.mark.parametrize("together", [False, True])
def test_gram_loss__equals_the_slow_loop_and_autograds_gradient(monkeypatch, per_image, negatives, together):
    if together:  # as on an accelerator: several images in one product
        monkeypatch.setitem(gram.ELEMENTS, "cpu", 2 * 5 * 5)
    student, teacher = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 5, 4)
    loss = gram_loss(student, teacher, per_image=per_image, negatives=negatives)
    assert loss.item() == pytest.approx(slow(student.detach(), teacher, per_image, negatives), rel=1e-5)
    (found,) = torch.autograd.grad(loss * 3, student)
    (expected,) = torch.autograd.grad(dense(student, teacher, per_image, negatives) * 3, student)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_gram_loss__scalar_products():
    student, teacher = torch.randn(1, 3, 2), torch.randn(1, 3, 2)
    expected = (student[0] @ student[0].T - teacher[0] @ teacher[0].T).square().mean()
    torch.testing.assert_close(gram_loss(student, teacher, normalise=False), expected)


def test_gram_loss__equal_tokens_and_teacher_without_gradient():
    tokens = torch.randn(2, 4, 3, requires_grad=True)
    loss = gram_loss(tokens.detach(), tokens)
    assert float(loss) == pytest.approx(0.0, abs=1e-12)
    assert not loss.requires_grad


def test_gram_loss__refuses_another_grid():
    with pytest.raises(ValueError, match="resize its map"):
        gram_loss(torch.zeros(1, 4, 3), torch.zeros(1, 16, 3))


def cubic(distance, a=-0.75):
    distance = abs(distance)
    if distance <= 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    return a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a if distance < 2 else 0.0


def test_resize_patch_map__is_bicubic_without_antialiasing():
    line = torch.randn(8, dtype=torch.float64)
    found = resize_patch_map(line[None, None, :, None].expand(1, 1, 8, 8), (4, 4))[0, 0, :, 0]
    for place in range(4):
        centre = (place + 0.5) * 2 - 0.5
        taps = range(int(centre) - 1, int(centre) + 3)
        expected = sum(cubic(centre - tap) * float(line[min(max(tap, 0), 7)]) for tap in taps)
        assert float(found[place]) == pytest.approx(expected, abs=1e-9)
