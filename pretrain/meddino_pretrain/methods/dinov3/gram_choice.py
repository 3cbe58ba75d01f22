"""Which earlier teacher anchors the patch features in Gram anchoring, measured instead of guessed."""

import math
from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from meddino.core.errors import CheckpointError
from meddino_pretrain.methods.base import KeptChoice
from meddino_pretrain.methods.dinov3.config import GramChoiceConfig


def choose_gram_teacher(scores: Mapping[int, Float[Tensor, " n"]], config: GramChoiceConfig) -> KeptChoice:
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
        message = (
            f"patch consistency fell from {curve[best]:.4f} at step {best} to {curve[last]:.4f} at step {last} "
            f"(by {fall:.4f}, standard error {error:.4f}): the teacher of step {best} anchors"
        )
        return KeptChoice(best, True, "run", message, curve)
    what = {"run": "runs all the same, by config", "light": "runs lightly", "skip": "is skipped"}[config.if_not_degraded]
    message = (
        f"patch consistency did not fall: {curve[best]:.4f} at its best (step {best}), {curve[last]:.4f} at step {last} "
        f"(difference {fall:.4f}, standard error {error:.4f}); the Gram stage {what}"
    )
    return KeptChoice(best, False, config.if_not_degraded, message, curve)
