"""What a student learns from its teacher's answers, beside the labels."""

import torch.nn.functional as F
from torch import Tensor

from training.config import Distil


def distillation_loss(student: Tensor, teacher: Tensor, how: Distil) -> Tensor:
    """Both (N, K) logits. Soft losses are scaled by T^2, so that their gradients don't fade with the temperature."""
    if how.kind == "hard":
        return F.cross_entropy(student, teacher.argmax(dim=1))
    t = how.temperature
    told, said = (teacher / t).log_softmax(dim=1), (student / t).log_softmax(dim=1)
    return t * t * F.kl_div(said, told, reduction="batchmean", log_target=True)
