"""How far a student is from its teacher and from the text, some positions' logits at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sailfish.compress.distill.stack import Head

_CHUNK_LOGITS = {"cpu": 1 << 21, "cuda": 1 << 27}
"""Logits worked on at a time; some six times their float32 bytes are held."""


Divergence = Literal["kl", "tvd"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """What is minimised: alpha * divergence + (1 - alpha) * cross-entropy.

    The divergence is T^2 * KL (Hinton et al. 2015, section 2.1), or the total variation distance, 1 less the
    acceptance of a draft (Zhou et al. 2023, "DistillSpec").
    """

    divergence: Divergence
    alpha: float
    temperature: float
    """T, of both models' logits in the divergence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """What a teacher says of some positions."""

    hidden_SD: Tensor
    """After its final norm."""
    head: Head


def losses(aim: Aim, student_SD: Tensor, head: Head, teacher: Teacher, target_S: Tensor) -> Tensor:
    """Return (the aim, the divergence less its T^2, cross-entropy), means over positions, as one tensor.

    Gradients flow from the first into the student's states and its head's weight: they are taken as the
    logits are made, which are never there all at once, nor a second time.
    """
    found: Tensor = _Chunked.apply(student_SD, head.weight_VD, aim, head, teacher, target_S)  # type: ignore[no-untyped-call]
    return found


class _Chunked(torch.autograd.Function):
    """Sums the losses of chunks and keeps their gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SD: Tensor,
        weight_VD: Tensor,
        aim: Aim,
        head: Head,
        teacher: Teacher,
        target_S: Tensor,
    ) -> Tensor:
        """Return the three means."""
        n_positions = len(target_S)
        own = Head(weight_VD=weight_VD.detach().requires_grad_(), softcap=head.softcap)
        total = torch.zeros(3, dtype=torch.float64, device=hidden_SD.device)
        hidden_grad_SD, weight_grad_VD = torch.empty_like(hidden_SD), torch.zeros_like(weight_VD)
        rows = max(1, _CHUNK_LOGITS[hidden_SD.device.type] // len(weight_VD))
        for start in range(0, n_positions, rows):
            chunk = slice(start, start + rows)
            with torch.enable_grad():
                leaf_CD = hidden_SD[chunk].detach().requires_grad_()
                parts = _sums(
                    aim, own.logits(leaf_CD), teacher.head.logits(teacher.hidden_SD[chunk]), target_S[chunk]
                )
                grads = torch.autograd.grad(parts[0] / n_positions, (leaf_CD, own.weight_VD))
            hidden_grad_SD[chunk] = grads[0]
            weight_grad_VD += grads[1]
            total += parts.detach()
        ctx.save_for_backward(hidden_grad_SD, weight_grad_VD)
        return (total / n_positions).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Scale the gradients kept by that of the aim; the other two means have none."""
        hidden_grad_SD, weight_grad_VD = ctx.saved_tensors
        by = grads[0][0]
        return hidden_grad_SD * by, weight_grad_VD * by, None, None, None, None


def _sums(aim: Aim, student_CV: Tensor, teacher_CV: Tensor, target_C: Tensor) -> Tensor:
    """Return the sums over a chunk of the aim, the divergence and the cross-entropy."""
    log_q = F.log_softmax(student_CV, -1)
    cross = F.nll_loss(log_q, target_C, reduction="sum")
    if aim.temperature != 1.0:
        log_q, teacher_CV = F.log_softmax(log_q / aim.temperature, -1), teacher_CV / aim.temperature
    log_p = F.log_softmax(teacher_CV, -1)
    if aim.divergence == "kl":
        apart, scale = F.kl_div(log_q, log_p, log_target=True, reduction="sum"), aim.temperature**2
    else:
        apart, scale = (log_q.exp() - log_p.exp()).abs().sum() / 2, 1.0
    return torch.stack((aim.alpha * scale * apart + (1 - aim.alpha) * cross, apart, cross))
