r"""
The energy of a partial differential equation
=============================================

No network: an image is restored by minimizing an energy, and the minimum solves a nonlinear
elliptic equation. With the noisy image :math:`f` and its restoration :math:`u`,

.. math::
    E(u) = \tfrac12 \|u - f\|^2 + \alpha \sum \sqrt{|\nabla u|^2 + \varepsilon^2},
    \qquad u - f = \alpha \operatorname{div} \frac{\nabla u}{\sqrt{|\nabla u|^2 +
    \varepsilon^2}}

(Rudin, Osher and Fatemi, Physica D 60, 1992,
https://doi.org/10.1016/0167-2789(92)90242-F, with a smoothed norm). The energy is ten
lines of torch; ``from_function`` makes its Hessian an operator, and SciPy's ``cg``
solves Newton's equation for 57,600 unknowns. The image is scikit-learn's
photograph of a temple.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.sparse.linalg import cg, eigsh
from sklearn.datasets import load_sample_image
from torchlinop import (
    CGInverseLinearOperator,
    HessianLinearOperator,
    single_threaded_blas,
)

torch.set_num_threads(1)

# %%
# The image and the energy
# ------------------------

photograph = load_sample_image("china.jpg").mean(axis=2)[20:260, 60:300] / 255
noise = np.random.default_rng(0).normal(scale=0.1, size=photograph.shape)
noisy = torch.tensor(photograph + noise)
alpha, eps = 0.06, 0.01


def energy(u):
    """Distance from the noisy image, and the smoothed total variation."""
    right = torch.zeros_like(u)
    down = torch.zeros_like(u)
    right[:, :-1] = u[:, 1:] - u[:, :-1]
    down[:-1] = u[1:] - u[:-1]
    variation = (right**2 + down**2 + eps**2).sqrt().sum()
    return 0.5 * (u - noisy).square().sum() + alpha * variation


def gradient(u):
    """First derivative, by torch."""
    u = u.clone().requires_grad_()
    return torch.autograd.grad(energy(u), u)[0]


# %%
# The Hessian is an operator
# --------------------------
#
# It belongs to the tensor ``u`` and follows it. Its eigenvalues say what Newton's
# method is up against.

u = noisy.clone()
H = HessianLinearOperator.from_function(energy, u)
(largest,) = eigsh(H, k=1, which="LA", return_eigenvectors=False, tol=1e-3)
print(f"{H}: condition number at most {largest:.1f}, since no eigenvalue is below one")

# %%
# Newton's method
# ---------------
#
# Each step solves with the Hessian at the present image; a short line search keeps the
# energy falling. ``u`` is changed in place, and the operator notices.

history, products = [], 0
for _ in range(40):
    g = gradient(u)
    norm = float(g.norm())
    history.append((products, norm))
    if norm < 1e-8:
        break
    steps = []
    with single_threaded_blas():
        solution, _ = cg(
            H, g.numpy().ravel(), atol=min(0.1, norm) * norm, callback=steps.append
        )
    products += len(steps)
    direction = torch.from_numpy(solution).view_as(u)
    slope, length, before = float((g * direction).sum()), 1.0, float(energy(u))
    while length > 1e-6 and energy(u - length * direction) > before - 1e-4 * length * slope:
        length /= 2
    u.sub_(length * direction)
history = np.array(history)
print(
    f"{len(history) - 1} Newton steps, {products} products, gradient {history[-1, 1]:.1e}"
)
assert history[-1, 1] < 1e-6
errors = [np.sqrt(np.mean((a.numpy() - photograph) ** 2)) for a in (noisy, u)]
print(f"distance from the photograph: {errors[0]:.4f} before, {errors[1]:.4f} after")
assert errors[1] < 0.7 * errors[0]

# %%
# What the inverse knows
# ----------------------
#
# At the minimum :math:`\nabla E(u) = 0`, so :math:`\partial u / \partial f = H^{-1}`: a
# column of the inverse is what becomes of the noise of one pixel. The inverse is an
# operator, and three columns are one block solve.

inverse = CGInverseLinearOperator(H, rtol=1e-6)
pixels = [(60, 120), (110, 60), (20, 30)]  # a roof, an eave, the sky
units = np.zeros((H.shape[0], len(pixels)))
for column, (row, position) in enumerate(pixels):
    units[row * u.shape[1] + position, column] = 1
spreads = (inverse @ units).T.reshape(-1, *u.shape)
print(inverse.last_solve)

# %%
# Along an edge noise spreads along it and not across; in the sky it spreads in all
# directions, over many pixels.

figure, axes = plt.subplots(2, 3, figsize=(12, 8), layout="constrained")
for axis, (title, image) in zip(
    axes[0], {"noisy": noisy.numpy(), "restored": u.numpy()}.items(), strict=False
):
    axis.imshow(image, cmap="gray", vmin=0, vmax=1)
    axis.set_title(title)
    axis.set_axis_off()
for (row, position), name in zip(pixels, "ABC", strict=True):
    axes[0, 1].plot(position, row, "o", color="C3", markersize=4)
    axes[0, 1].annotate(
        name, (position, row), (3, 3), textcoords="offset points", color="C3"
    )
axes[0, 2].semilogy(history[:, 0], history[:, 1], "o-")
axes[0, 2].set_xlabel("products with the Hessian")
axes[0, 2].set_ylabel("norm of the gradient")
for axis, (row, position), spread, name in zip(
    axes[1], pixels, spreads, "ABC", strict=True
):
    window = spread[max(row - 12, 0) : row + 13, position - 12 : position + 13]
    shown = axis.imshow(np.log10(np.maximum(window, 1e-5)), vmin=-4, vmax=0)
    axis.set_title(f"where the noise of {name} goes")
    axis.set_axis_off()
figure.colorbar(shown, ax=axes[1], shrink=0.8, label="log10")
