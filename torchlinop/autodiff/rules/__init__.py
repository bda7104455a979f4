r"""Differentiation rules: derivatives that are right, and second ones that are cheap.

Within :class:`Corrections`, functions of which PyTorch (2.13) has no second derivative, or
a wrong higher one, are replaced by compositions of elementary functions. These hold inside
the transforms of ``torch.func``, too.

- ``layer_norm``, and ``batch_norm`` and ``instance_norm`` with statistics of the input: the
  third derivative is wrong, and with it the Hessian of a gradient penalty. (Right are kept
  statistics, ``group_norm`` and ``rms_norm``.)
- ``weight_norm``: the second derivative is wrong.
- ``logcumsumexp``: the third derivative is NaN.
- ``hardsigmoid``, ``pdist``, ``cdist`` (except by matrix products), ``embedding_bag``,
  ``ctc_loss``, ``multi_margin_loss``, ``multilabel_margin_loss``, fused attention, fused
  recurrent networks on GPUs: there is no second derivative.
- ``embedding``: sparse gradients cannot be differentiated.
- ``torch.cond`` and ``while_loop``: the second derivative is silently wrong.
- In a derivative in forward mode (:class:`ForwardCorrections`): where gradients are turned
  off, tangents are so, too.

The tests search for more among the functions that a model may call. Known and left as they
are: ``segment_reduce``, which has no second derivative; ``cholesky_inverse``, whose second
one by forward over reverse mode is wrong; and third derivatives by nested forward mode of
``det``, ``slogdet``, ``solve``, ``householder_product``, ``scatter_reduce`` with products.

PyTorch's own double-backward formulas are written to be right for any order of
differentiation, not to be evaluated many times at one point. Within
:class:`SecondOrderRules`, moreover:

==================  =============================================================
function            what changes
==================  =============================================================
``batch_norm``      in evaluation mode it is affine and is computed as such
``layer_norm``      its Jacobian :math:`P` is symmetric, so the derivative of
                    :math:`P g` is again two products with :math:`P`
``conv1d/2d/3d``    the derivative of a convolution's gradient uses the library's
                    own backward kernels instead of transposed copies
``gelu``, ``silu``, the factors :math:`f'(x)` and :math:`g f''(x)` are computed once
``tanh``,           and kept
``sigmoid``
``lstm``, ``gru``,  tangents and cotangents of all steps are each one loop of two or three
``rnn_tanh``,       kernels a step, and products with weights are made for all steps at
``rnn_relu``        once (also in forward mode)
==================  =============================================================

Every rule stays differentiable to any order, so a function that itself contains
derivatives (a physics-informed loss, for instance) can be linearized.
"""

from torchlinop.autodiff.rules.modes import (
    Corrections,
    ForwardCorrections,
    SecondOrderRules,
)

__all__ = ["Corrections", "ForwardCorrections", "SecondOrderRules"]
