"""Recorded losses, head and resize: the functions written plainly, and the forms that training uses."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from meddino.layers.projection_head import ProjectionHead
from meddino.losses.dino import dino_terms
from meddino.losses.gram import gram_loss, resize_patch_map
from meddino.losses.ibot import ibot_term, mask_weights_of
from meddino.losses.koleo import koleo_loss
from meddino.losses.sinkhorn import TeacherLogits, sinkhorn_targets
from tests.reference.plain import dino_loss, ibot_loss
from tests.reference.records import Records, part, stated
from tests.reference.report import Item, scaled

TOLERANCE = 1e-5
OVERFLOWED = "not finite in the records (no maximum subtracted there); compared with float64 instead"
GRAM_VARIANTS: dict[str, dict[str, Any]] = {
    "loss_image_level": {},
    "loss_batch_level": {"per_image": False},
    "loss_remove_negative": {"negatives": "remove"},
    "loss_remove_teacher_negative": {"negatives": "remove_teacher"},
}


@torch.no_grad()
def compare_losses(records: Records) -> list[Item]:
    """Compare whatever the losses file holds."""
    described, tensors = records.described["losses"], records.tensors("losses")
    teacher_temperature = stated(described, "teacher_temperature", r"teacher temperature ([0-9.]+\d)", 0.04)
    student_temperature = stated(described, "student_temperature", r"student temperature ([0-9.]+\d)", 0.1)
    iterations = int(stated(described, "sinkhorn_iterations", r"(\w+) Sinkhorn", 3))
    sections: dict[str, Callable[[dict[str, Tensor]], list[Item]]] = {
        "dino": lambda given: _dino(given, teacher_temperature, student_temperature, iterations),
        "ibot": lambda given: _ibot(given, teacher_temperature, student_temperature, iterations),
        "koleo": lambda given: [_item("koleo loss", koleo_loss(given["features"]), given["loss"])],
        "gram": _gram,
        "head": _head,
    }
    found = {name: part(tensors, f"{name}.") for name in sections}
    return [item for name, compare in sections.items() if found[name] for item in compare(found[name])]


def float64_sinkhorn(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """Sinkhorn-Knopp step by step as RECIPE writes it, in the logarithm and in float64."""
    log_q = logits.double().t() / temperature  # [K, n]
    log_q = log_q - log_q.logsumexp((0, 1))
    prototypes, count = log_q.shape
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(1, keepdim=True) - torch.log(torch.tensor(float(prototypes)))
        log_q = log_q - log_q.logsumexp(0, keepdim=True) - torch.log(torch.tensor(float(count)))
    return (log_q.exp() * count).t()


def _item(name: str, found: Tensor, recorded: Tensor, note: str = "") -> Item:
    return scaled(name, found, recorded, TOLERANCE, note)


def _assignments(name: str, logits: Tensor, recorded: Tensor, temperature: float, iterations: int) -> tuple[list[Item], Tensor]:
    """Compare Sinkhorn-Knopp, and return the assignments that the cross-entropies are to be compared on."""
    note = ""
    if not recorded.isfinite().all():
        recorded, note = float64_sinkhorn(logits, temperature, iterations).float(), OVERFLOWED
    found = sinkhorn_targets(TeacherLogits(logits), temperature, iterations).probabilities()
    return [_item(f"sinkhorn-knopp of {name}", found, recorded, note)], recorded


def _dino(given: dict[str, Tensor], teacher_temperature: float, student_temperature: float, iterations: int) -> list[Item]:
    logits, students, locals_ = given["teacher_logits"], given["student_global_logits"], given["student_local_logits"]
    items, probabilities = _assignments("dino", logits, given["teacher_probabilities"], teacher_temperature, iterations)
    crops, batch, prototypes = students.shape
    teacher = probabilities.view(-1, batch, prototypes)
    for name, student, ignore in (
        ("loss_global", students, False),
        ("loss_global_ignore_diagonal", students, True),
        ("loss_local", locals_, False),
    ):
        note, recorded = "", given[name]
        if not recorded.isfinite():
            recorded, note = dino_loss(student.double(), teacher.double(), student_temperature, ignore).float(), OVERFLOWED
        items.append(_item(f"dino {name}", dino_loss(student, teacher, student_temperature, ignore), recorded, note))
    if len(logits) == crops * batch and crops > 1:
        # With the identity as prototypes the form that training uses takes logits for a bottleneck.
        targets = sinkhorn_targets(TeacherLogits(logits), teacher_temperature, iterations)
        terms = dino_terms(students, locals_, torch.eye(prototypes), targets, student_temperature)
        for name, found in (("loss_global_ignore_diagonal", terms.global_crops), ("loss_local", terms.local_crops)):
            if given[name].isfinite():
                items.append(_item(f"dino {name}, chunked", found, given[name]))
    return items


def _ibot(given: dict[str, Tensor], teacher_temperature: float, student_temperature: float, iterations: int) -> list[Item]:
    logits, student, masks, weights = (given[key] for key in ("teacher_logits", "student_logits", "masks", "mask_weights"))
    items, probabilities = _assignments("ibot", logits, given["teacher_probabilities"], teacher_temperature, iterations)
    items.append(_item("ibot mask weights", mask_weights_of(masks), weights))
    note, recorded = "", given["loss"]
    if not recorded.isfinite():
        log_probs = torch.log_softmax(student.double() / student_temperature, dim=-1)
        each = -(float64_sinkhorn(logits, teacher_temperature, iterations) * log_probs).sum(-1)
        recorded, note = ((each * weights).sum() / len(masks)).float(), OVERFLOWED
    found = ibot_loss(student, probabilities, weights, len(masks), student_temperature)
    targets = sinkhorn_targets(TeacherLogits(logits), teacher_temperature, iterations)
    chunked = ibot_term(student, torch.eye(student.shape[1]), targets, weights, len(masks), student_temperature)
    return [*items, _item("ibot loss", found, recorded, note), _item("ibot loss, chunked", chunked, recorded, note)]


def _gram(given: dict[str, Tensor]) -> list[Item]:
    items = [
        _item(f"gram {name}", gram_loss(given["student"], given["teacher"], **arguments), given[name])
        for name, arguments in GRAM_VARIANTS.items()
        if name in given
    ]
    if "resize_input" in given:
        rows, columns = given["resize_output"].shape[-2:]
        items.append(_item("gram resize", resize_patch_map(given["resize_input"], (rows, columns)), given["resize_output"]))
    return items


def _head(given: dict[str, Tensor]) -> list[Item]:
    head = head_of_weights(part(given, "weights."))
    return [_item("projection head", head(given["input"]), given["output"])]


def head_of_weights(weights: dict[str, Tensor]) -> ProjectionHead:
    """Return the head that a state dict belongs to, loaded."""
    prototypes, bottleneck = weights["last_layer.weight"].shape
    layers = [name for name in weights if name.startswith("mlp") and name.endswith("weight")]
    first = min(layers, key=lambda name: [int(piece) for piece in name.split(".") if piece.isdigit()])
    hidden, dim = weights[first].shape
    head = ProjectionHead(dim, prototypes, hidden, bottleneck, len(layers))
    head.load_state_dict(weights)
    return head
