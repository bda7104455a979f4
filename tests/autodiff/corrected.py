"""Functions with a correction: torch 2.13 has no second derivative, or a wrong one.

A line is ``name: (function, input, input, ...)``; an input is the shape of a tensor of
random numbers, or a function that makes the tensor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .inputs import module, positive, spread

LABELS = torch.tensor([0, 2, 1, 1])
SETS = torch.tensor([[0, 1, -1], [2, -1, 0], [-1, 0, 1], [0, 2, -1]])
WEIGHT = torch.tensor([0.5, 1.5, 1.0])
INDICES = torch.tensor([0, 2, 1, 2, 2])
OFFSETS = torch.tensor([0, 2, 2])  # the second bag is empty
VISIBLE = torch.tensor([[True, False, True], [False, True, True], [False, True, False]])

HEADS = [(2, 2, 3, 4), (2, 2, 3, 4), (2, 2, 3, 4)]
GROUPED = [(2, 2, 3, 4), (2, 1, 3, 4), (2, 1, 3, 4)]


def attention(**options):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


def bag(indices=INDICES, offsets=OFFSETS, **options):
    return lambda w: F.embedding_bag(indices, w, offsets, **options)


def ctc(targets, lengths, **options):
    steps = torch.tensor([5, 4])[: len(lengths)]
    return lambda x: F.ctc_loss(
        x.log_softmax(-1), torch.tensor(targets), steps, torch.tensor(lengths), **options
    )


CORRECTED = {
    "hardsigmoid": (F.hardsigmoid, spread(4, 6)),
    "hardsigmoid, in place": (lambda x: F.hardsigmoid(1 * x, inplace=True), spread(4, 6)),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (5,), w, b), (2, 3, 5), (5,), (5,)),
    "layer norm over two": (
        lambda x, w: F.layer_norm(x, (3, 5), w, eps=0.1),
        (2, 3, 5),
        (3, 5),
    ),
    "batch norm": (
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
        (4, 3, 2),
        (3,),
        (3,),
    ),
    "batch norm of vectors": (
        lambda x: F.batch_norm(x, None, None, training=True, eps=0.1),
        (6, 3),
    ),
    "instance norm": (
        lambda x, w, b: F.instance_norm(x, None, None, w, b),
        (2, 3, 5),
        (3,),
        (3,),
    ),
    "instance norm of images": (lambda x: F.instance_norm(x, eps=0.1), (2, 2, 2, 3)),
    "weight norm": (torch._weight_norm, (3, 4), positive(3, 1)),
    "weight norm, last": (lambda v, g: torch._weight_norm(v, g, 1), (3, 4), (1, 4)),
    "logcumsumexp": (lambda x: torch.logcumsumexp(x, -1), (3, 5)),
    "logcumsumexp, method": (lambda x: x.logcumsumexp(0), (3, 2)),
    "pdist": (F.pdist, (4, 3)),
    "cdist": (torch.cdist, (3, 4), (2, 4)),
    "cdist of batches": (lambda x, y: torch.cdist(x, y, 3), (2, 3, 4), (2, 2, 4)),
    "cdist, 1": (lambda x, y: torch.cdist(x, y, 1.0), spread(3, 2), (2, 2)),
    "cdist, inf": (lambda x, y: torch.cdist(x, y, float("inf")), spread(3, 2), (2, 2)),
    "cdist of many": (
        lambda x, y: torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist"),
        (30, 2),
        lambda: 9 + torch.randn(2, 2),
    ),
    "embedding bag": (bag(), (3, 2)),
    "embedding bag, sum": (bag(mode="sum"), (3, 2)),
    "embedding bag, max": (bag(mode="max"), spread(3, 2)),
    "embedding bag, sparse": (bag(mode="sum", sparse=True), (3, 2)),
    "embedding bag, padding": (bag(padding_idx=2), (3, 2)),
    "embedding bag, padding, max": (bag(padding_idx=-1, mode="max"), spread(3, 2)),
    "embedding bag, last offset": (
        bag(offsets=torch.tensor([0, 3, 5]), include_last_offset=True),
        (3, 2),
    ),
    "embedding bag, rectangle": (bag(INDICES[:4].view(2, 2), None), (3, 2)),
    "embedding bag, weights": (
        lambda w, s: F.embedding_bag(INDICES, w, OFFSETS, mode="sum", per_sample_weights=s),
        (3, 2),
        (5,),
    ),
    "embedding bag, weights, rectangle": (
        lambda w, s: F.embedding_bag(
            INDICES[:4].view(2, 2), w, mode="sum", per_sample_weights=s
        ),
        (3, 2),
        (2, 2),
    ),
    "attention": (attention(), *HEADS),
    "attention, mask": (attention(attn_mask=VISIBLE), *HEADS),
    "attention, scale": (attention(scale=0.3), *HEADS),
    "attention, causal": (attention(is_causal=True), *HEADS),
    "attention, grouped": (attention(enable_gqa=True), *GROUPED),
    "attention, grouped, causal": (attention(enable_gqa=True, is_causal=True), *GROUPED),
    "attention, bias": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m),
        *HEADS,
        (3, 3),
    ),
    "multi-head attention": module(
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        *[(1, 3, 4)] * 3,
        need_weights=False,
    ),
    "multi-head attention, mask": module(
        lambda: nn.MultiheadAttention(4, 2, batch_first=True, kdim=3, vdim=2),
        (1, 3, 4),
        (1, 3, 3),
        (1, 3, 2),
        need_weights=False,
        attn_mask=~VISIBLE,
    ),
    "transformer layer": module(
        lambda: nn.TransformerEncoderLayer(4, 2, 3, 0.0, F.gelu, batch_first=True),
        (1, 3, 4),
    ),
    "transformer layer, evaluation": module(
        lambda: nn.TransformerEncoderLayer(4, 2, 3, 0.0, F.gelu, batch_first=True).eval(),
        (1, 3, 4),
    ),
    "multi margin": (lambda x: F.multi_margin_loss(x, LABELS), spread(4, 3)),
    "multi margin, 2": (
        lambda x: F.multi_margin_loss(
            x, LABELS, p=2, margin=0.7, weight=WEIGHT.to(x.dtype), reduction="sum"
        ),
        spread(4, 3),
    ),
    "multi margin, one sample": (
        lambda x: F.multi_margin_loss(x, LABELS[1], p=2, weight=WEIGHT.to(x.dtype)),
        spread(3),
    ),
    "multilabel margin": (
        lambda x: F.multilabel_margin_loss(x, SETS, reduction="none"),
        spread(4, 3),
    ),
    "multilabel margin, one sample": (
        lambda x: F.multilabel_margin_loss(x, SETS[0]),
        spread(3),
    ),
    "ctc": (ctc([[1, 1], [2, 1]], [2, 1]), (5, 2, 3)),
    "ctc, concatenated": (ctc([1, 2, 1], [2, 1], reduction="sum"), (5, 2, 3)),
    "ctc, one empty": (ctc([[1, 2], [0, 0]], [2, 0], reduction="none"), (5, 2, 3)),
    "ctc, one sequence": (ctc([0, 1], [2], blank=2), (5, 3)),
    "ctc, impossible": (ctc([[1] * 4, [2] * 4], [4, 2], zero_infinity=True), (5, 2, 3)),
}
