r"""
Vibrations of an atomic cluster
===============================

No network here: the energy of a cluster of atoms is a function of their positions, and
the Hessian of that energy tells how the cluster vibrates. ``from_function`` makes an
operator of any torch function.

The atoms attract and repel one another by the Lennard-Jones potential,
:math:`E = 4 \sum_{i<j} (r_{ij}^{-12} - r_{ij}^{-6})`. Thirteen of them form an icosahedron,
whose energy of -44.3268 is the lowest possible (Hoare and Pal, Adv. Phys. 20, 1971,
https://doi.org/10.1080/00018737100101231). Six directions cost no energy: three shifts and
three rotations. The symmetry of the icosahedron makes most others degenerate, which is what
Lanczos' method finds difficult.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from torchlinop import HessianLinearOperator, estimate

torch.manual_seed(0)
torch.set_num_threads(1)


def energy(positions):
    """Lennard-Jones energy of atoms at positions of shape ``(n, 3)``."""
    i, j = torch.triu_indices(len(positions), len(positions), offset=1)
    inverse = (positions[i] - positions[j]).square().sum(dim=1) ** -3
    return 4 * (inverse**2 - inverse).sum()


# %%
# The icosahedron: one atom in the middle, twelve around it. A few steps of L-BFGS find the
# distances.

golden = (1 + 5**0.5) / 2
corners = [(0.0, a, b * golden) for a in (-1, 1) for b in (-1, 1)]
shell = [tuple(np.roll(corner, turn)) for corner in corners for turn in range(3)]
positions = torch.tensor(np.array([(0.0, 0.0, 0.0), *shell])) * 0.57
positions.requires_grad_()
optimizer = torch.optim.LBFGS(
    [positions], max_iter=200, tolerance_grad=1e-13, tolerance_change=0
)


def closure():
    """Energy and forces, for the optimizer."""
    optimizer.zero_grad()
    value = energy(positions)
    value.backward()
    return value


optimizer.step(closure)
x = positions.detach()
print(f"energy {energy(x).item():.6f}, gradient {positions.grad.norm().item():.1e}")
assert abs(energy(x).item() + 44.326801) < 1e-5

# %%
# Eigenvalues are squared frequencies (for atoms of mass one). The largest twelve, and the
# smallest eight, of which six are zero, next to those of the dense matrix:

H = HessianLinearOperator.from_function(energy, x)
stiff = estimate.eigsh(H, k=12, tol=1e-10)
soft = estimate.eigsh(H, k=8, which="SA", tol=1e-10)
dense = np.linalg.eigvalsh(H.to_dense().numpy())
print("stiffest", stiff.eigenvalues.numpy().round(3))
print("dense   ", dense[-12:].round(3))
print("softest ", soft.eigenvalues.numpy().round(3))
print("dense   ", dense[:8].round(3))
assert np.allclose(stiff.eigenvalues, dense[-12:], rtol=1e-9)
assert np.allclose(soft.eigenvalues, dense[:8], atol=1e-7)

# %%
# Members of a degenerate level come in threes, fours and fives; each was found, with a
# bound for its residual.

frequencies = np.sqrt(dense[6:])
levels, degeneracies = np.unique(frequencies.round(5), return_counts=True)
print("degeneracies", degeneracies)
assert set(degeneracies) <= {1, 3, 4, 5}

# %%
# A larger cluster
# ----------------
#
# Five cells of a crystal in each direction, 500 atoms, have 1,500 directions; nobody needs
# all of their frequencies. The density of states comes from eight random vectors.

cells = np.stack(np.meshgrid(*3 * [np.arange(5)], indexing="ij"), axis=-1).reshape(-1, 3)
corner = np.array([(0, 0, 0), (0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0)])
lattice = (cells[:, None] + corner).reshape(-1, 3)
crystal = torch.tensor(lattice * 1.55)  # near the distance of least energy
crystal.requires_grad_()
optimizer = torch.optim.LBFGS([crystal], max_iter=60, line_search_fn="strong_wolfe")


def closure():
    """Energy and forces, for the optimizer."""
    optimizer.zero_grad()
    value = energy(crystal)
    value.backward()
    return value


optimizer.step(closure)
H = HessianLinearOperator.from_function(energy, crystal.detach())
density = estimate.spectral_density(H, num_probes=8, num_steps=60)
print(density)
top = estimate.eigsh(H, k=3)
print(f"stiffest: {top.eigenvalues.numpy().round(2)}")

# %%
# With :math:`\lambda = \omega^2` the density of frequencies is :math:`2 \omega
# p(\omega^2)`.

omega = np.linspace(0.1, np.sqrt(density.bounds[1]) * 1.02, 500)
states = 2 * omega * density.density(omega**2)
low, high = (2 * omega * edge for edge in density.band(omega**2))
figure, axes = plt.subplots(ncols=2, figsize=(10, 4), layout="constrained")
axes[0].bar(levels, degeneracies, width=0.15)
axes[0].set_xlabel("frequency")
axes[0].set_ylabel("degeneracy")
axes[0].set_title("13 atoms: every mode")
axes[1].fill_between(omega, low, high, alpha=0.3)
axes[1].plot(omega, states)
axes[1].set_xlabel("frequency")
axes[1].set_ylabel("density of states")
axes[1].set_title("500 atoms: eight random vectors")
