"""Kronecker-factored approximate curvature."""

from __future__ import annotations

from torchlinop.kronecker.factored import KroneckerFactoredLinearOperator
from torchlinop.kronecker.passes import kfac_pass
from torchlinop.sources import EmpiricalRisk
from torchlinop.structured import BlockDiagonalLinearOperator


class KFACLinearOperator(KroneckerFactoredLinearOperator):
    r"""Kronecker-factored approximation of the GGN or Fisher matrix.

    Block diagonal, one block for each weight (with its bias):

    .. math::
        G_W \approx \Big(\sum_{n,t,c} g_{ntc} g_{ntc}^\top\Big) \otimes
        \Big(\sum_n \frac{w_n}{T_n \sum_m w_m} \sum_t a_{nt} a_{nt}^\top\Big)

    with inputs :math:`a_{nt}` of the weight at positions ``t`` of sample ``n``, output
    gradients :math:`g_{ntc} = J_{nt}^\top s_{nc}`, columns :math:`s_{nc}` of a root of the
    loss Hessian (divided by the risk's normaliser), and weights :math:`w_n` of the samples
    in the loss. So a sample of weight zero does not count, and batches, however the data
    is cut, make one matrix. Blocks of scales and shifts (layer, group and batch norm) are
    exact.

    Layers are recognized by the calls of torch functions, not by modules: ``linear``,
    ``@``, ``addmm``, convolutions, ``embedding``, normalizations, attention; plain
    functions are covered, and weights that are used several times. Of a weight that is tied
    between an embedding and a head, or used as a matrix and as its transpose, the block is
    the Kronecker product with the partial traces of the sum over both uses; one of its
    factors is vocabulary times vocabulary. The factors are computed when the operator is
    built and after a change of parameters or data.

    Parameters
    ----------
    model, loss_function, params, data
        What :class:`~torchlinop.EmpiricalRisk` describes. With ``"type-2"`` any loss that
        is a sum or mean of convex terms, with ``"mc"`` one with a known likelihood.
    fisher_type
        ``"type-2"``: the GGN; a backward pass for each class and loss term of a sample.
        ``"mc"``: labels drawn from the likelihood; a backward pass for each of them.
        ``"empirical"``: the data's own gradients. ``"forward-only"``: output gradients
        are replaced by the identity, nothing is differentiated.
    mc_samples, seed
        For ``"mc"``, as in :class:`~torchlinop.FisherMCLinearOperator`; the labels of all
        loss terms of a sample are drawn independently and pulled back together.
    weight_sharing
        ``"expand"``: the positions at which a sample uses a weight are data of their own.
        ``"reduce"``: inputs are averaged over them, output gradients added up.
    joint_bias
        Whether a weight and its bias share a block.
    uncovered
        ``"error"``, or ``"diagonal"``: for parameters that no rule covers a block of the
        exact diagonal, by one backward pass for each sample.
    **options
        Keyword arguments of :class:`~torchlinop.EmpiricalRisk`.

    Attributes
    ----------
    space : ParameterSpace

    Raises
    ------
    ValueError
        An option is unknown, a parameter is covered by no rule, a factor is not finite.
    TypeError
        Labels are to be drawn for a loss without a likelihood.

    References
    ----------
    Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate
    curvature" (2015), https://arxiv.org/abs/1503.05671; Grosse and Martens (2016),
    https://arxiv.org/abs/1602.01407, for convolutions; Eschenhagen et al.,
    "Kronecker-factored approximate curvature for modern neural network architectures"
    (2023), https://arxiv.org/abs/2311.00636, for shared weights

    Examples
    --------
    For one linear layer and squared error KFAC is the GGN:

    >>> import torch
    >>> from torchlinop import GGNLinearOperator, KFACLinearOperator
    >>> model, loss = torch.nn.Linear(3, 2), torch.nn.MSELoss()
    >>> data = [(torch.rand(5, 3), torch.rand(5, 2))]
    >>> K = KFACLinearOperator(model, loss, model.parameters(), data)
    >>> G = GGNLinearOperator(model, loss, model.parameters(), data)
    >>> torch.allclose(K.to_dense(), G.to_dense(), atol=1e-6)
    True
    >>> inverse = K.inverse(damping=1e-2)  # for SciPy: cg(A, b, M=inverse)
    >>> list(K.blocks)
    [('weight', 'bias')]
    """

    def _computed(self, risk: EmpiricalRisk) -> BlockDiagonalLinearOperator:
        result = kfac_pass(risk, self.settings)
        return result.operator(risk, [block.operator() for block in result.blocks])
