"""Losses whose gradients torch cannot differentiate, written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinop.autodiff.rules.functions import EXACT, Rules, is_differentiated

#: log-probability of what is impossible; infinite ones would have no derivative
_NEVER = -1e30


def _reduced(losses: Tensor, reduction: str) -> Any:
    match reduction:
        case "none":
            return losses
        case "sum":
            return losses.sum()
        case "mean":
            return losses.mean()
    return NotImplemented


def _multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Any:
    r""":math:`\frac1C \sum_{j \ne y} w_y \max(0, m - x_y + x_j)^p`."""
    if input.dtype not in EXACT or not is_differentiated(input) or p not in (1, 2):
        return NotImplemented
    if size_average is not None or reduce is not None:
        return NotImplemented
    index = target.reshape(*input.shape[:-1], 1)
    terms = (margin - input.gather(-1, index) + input).relu() ** p
    terms = terms.scatter(-1, index, 0.0)
    if weight is not None:
        terms = terms * weight[index]
    return _reduced(terms.mean(-1), reduction)


def _multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Any:
    r""":math:`\frac1C \sum_{j \in y, i \notin y} \max(0, 1 - x_j + x_i)`.

    The labels are those before the first -1.
    """
    if input.dtype not in EXACT or not is_differentiated(input):
        return NotImplemented
    if size_average is not None or reduce is not None or target.shape != input.shape:
        return NotImplemented
    valid = (target >= 0).cumprod(-1)
    count = torch.zeros_like(target).scatter_add(-1, target.clamp(min=0), valid)
    others = (count == 0).to(input.dtype)
    label_scores = input.gather(-1, target.clamp(min=0))
    terms = (1 - label_scores.unsqueeze(-1) + input.unsqueeze(-2)).relu()
    terms = terms * others.unsqueeze(-2) * valid.unsqueeze(-1)
    return _reduced(terms.sum((-1, -2)) / input.shape[-1], reduction)


def _ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Any:
    """Forward recursion of A. Graves et al., Connectionist Temporal Classification, 2006.

    The states are the labels with a blank before, between and after them.
    """
    if log_probs.dtype not in EXACT or not is_differentiated(log_probs):
        return NotImplemented
    batched = log_probs.ndim == 3
    log_p = log_probs if batched else log_probs.unsqueeze(1)
    device = log_p.device
    steps = torch.as_tensor(input_lengths, device=device).reshape(-1)
    lengths = torch.as_tensor(target_lengths, device=device).reshape(-1)
    labels = _padded(targets.to(device), lengths, blank)
    states = F.pad(labels.unsqueeze(-1), (1, 0), value=blank).flatten(1)
    states = F.pad(states, (0, 1), value=blank)
    may_skip = states != F.pad(states, (2, 0), value=blank)[:, :-2]
    scores = log_p.gather(2, states.expand(len(log_p), -1, -1))
    reachable = torch.arange(states.shape[1], device=device) < 2
    alpha = scores[0].masked_fill(~reachable, _NEVER)
    for t in range(1, len(scores)):
        one = F.pad(alpha, (1, 0), value=_NEVER)[:, :-1]
        two = F.pad(alpha, (2, 0), value=_NEVER)[:, :-2].masked_fill(~may_skip, _NEVER)
        step = torch.stack([alpha, one, two]).logsumexp(0) + scores[t]
        alpha = torch.where((t < steps).unsqueeze(1), step, alpha)
    last = 2 * lengths.unsqueeze(1)
    ends = torch.cat([alpha.gather(1, last), alpha.gather(1, (last - 1).clamp(min=0))], 1)
    ends = torch.stack([ends[:, 0], ends[:, 1].masked_fill(lengths == 0, _NEVER)])
    losses = -ends.logsumexp(0)
    impossible = losses > -_NEVER / 2
    losses = losses.masked_fill(impossible, 0.0 if zero_infinity else float("inf"))
    if reduction == "mean":
        losses = losses / lengths.clamp(min=1)
    return _reduced(losses if batched else losses.squeeze(0), reduction)


def _padded(targets: Tensor, lengths: Tensor, blank: int) -> Tensor:
    """Targets as rows of one length, the rest of a row filled with blanks."""
    width = int(lengths.max())
    column = torch.arange(width, device=targets.device)
    valid = column < lengths.unsqueeze(1)
    if targets.ndim == 2:
        rows = targets[:, :width]
    else:  # one after the other
        starts = (lengths.cumsum(0) - lengths).unsqueeze(1)
        rows = targets[(starts + column).clamp(max=max(len(targets) - 1, 0))]
    return rows.long().masked_fill(~valid, blank)


CORRECTIONS: Rules = {
    F.multi_margin_loss: _multi_margin_loss,
    F.multilabel_margin_loss: _multilabel_margin_loss,
    F.ctc_loss: _ctc_loss,
}
