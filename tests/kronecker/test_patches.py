"""Second moments of patches without the patches."""

from __future__ import annotations

import itertools

import pytest
import torch
from torchlinop.kronecker.patches import Window


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kernel", [2, 3])
def test_moment_is_that_of_the_patches(dims, kernel):
    x = torch.randn(3, 4, *(9, 6, 5)[:dims]).double()
    for groups, dilation, stride, scaled, ones in itertools.product(
        (1, 2), (1, 2), (1, 2), (False, True), (False, True)
    ):
        strides = [1] + [stride] * (dims - 1)
        window = Window(
            [kernel] * dims, strides, [(1, 2)] * dims, [dilation] * dims, groups
        )
        assert window.slides(x)
        a = window.patches(x).reshape(3, -1, groups, 4 // groups * kernel**dims)
        if ones:
            a = torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)
        scales = torch.rand(3).double() if scaled else None
        if scales is not None:
            a = a * scales.view(3, 1, 1, 1)
        expected = torch.einsum("ntgi,ntgj->gij", a, a)
        torch.testing.assert_close(window.moment(x, scales, ones=ones), expected)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(1, 1, 1), (3, 2, 1), (3, 1, 4)]
)
def test_windows_that_do_not_slide(kernel, stride, dilation):
    """Points, steps, and kernels as large as the input."""
    window = Window([kernel, 2], [stride, 1], [(1, 1)] * 2, [dilation, 1], 1)
    assert not window.slides(torch.rand(2, 1, 8, 8))
