"""Which earlier teacher anchors the patch features in Gram anchoring, measured instead of guessed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from meddino.core.errors import CheckpointError
from meddino_pretrain.methods.dinov3.config import Action, GramChoiceConfig


@dataclass(frozen=True)
class GramChoice:
    """What was measured and what follows.

    Attributes:
        step: Step of the snapshot that becomes the Gram teacher.
        degraded: True if patch quality fell from there to the last snapshot.
        action: What the Gram stage shall do.
        words: Why, in a sentence for people.
        curve: Mean score by step.
    """

    step: int
    degraded: bool
    action: Action
    words: str
    curve: dict[int, float]


def choose_gram_teacher(scores: Mapping[int, Float[Tensor, " n"]], config: GramChoiceConfig) -> GramChoice:
    """Choose the snapshot with the best patch quality, and say whether quality fell after it.

    Args:
        scores: Step to the scores of `snapshot_scores` on the same slices; the last step is the end of the stage.
        config: What counts as a fall.

    Raises:
        CheckpointError: There is no snapshot.
    """
    if not scores:
        raise CheckpointError("the earlier stage kept no snapshots of its EMA teacher to choose a Gram teacher from")
    curve = {step: float(scores[step].double().mean()) for step in sorted(scores)}
    last = max(curve)
    best = max(curve, key=lambda step: (curve[step], step))
    # The same slices in both: their differences know nothing of how hard a slice is.
    loss = (scores[best] - scores[last]).double()
    error = float(loss.std() / math.sqrt(len(loss))) if len(loss) > 1 else 0.0
    fall = float(loss.mean())
    degraded = fall > config.min_loss and fall >= config.min_sure * error
    if degraded:
        words = (
            f"patch consistency fell from {curve[best]:.4f} at step {best} to {curve[last]:.4f} at step {last} "
            f"(by {fall:.4f}, standard error {error:.4f}): the teacher of step {best} anchors"
        )
        return GramChoice(best, True, "run", words, curve)
    what = {"run": "runs all the same, by config", "light": "runs lightly", "skip": "is skipped"}[config.if_not_degraded]
    words = (
        f"patch consistency did not fall: {curve[best]:.4f} at its best (step {best}), {curve[last]:.4f} at step {last} "
        f"(difference {fall:.4f}, standard error {error:.4f}); the Gram stage {what}"
    )
    return GramChoice(best, False, config.if_not_degraded, words, curve)
