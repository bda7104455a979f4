"""Eigenvalues and their densities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from torchlinop._typing import Array
from torchlinop.estimate import SpectralDensity
from torchlinop.plot.axes import BAND, axes_or_new, finished, on_host, require

#: what a curve has to reach of its maximum to be in the picture
_VISIBLE = 2e-3
#: what gives a density
_SOURCE = "estimate.spectral_density(A)"


def eigenvalues(
    values: Array, *, ax: Any = None, label: str | None = None, floor: float = 1e-10
) -> Any:
    """Draw eigenvalues by their rank: sizes on a logarithmic scale, the largest first.

    Negative ones are a line of their own, dotted with hollow markers.

    Parameters
    ----------
    values
        Shape ``(K,)``.
    ax
        Where to draw.
    label
        Name in the legend.
    floor
        Sizes below this part of the largest are rounding errors and are left out.

    Returns
    -------
    matplotlib.axes.Axes

    Examples
    --------
    >>> import numpy as np
    >>> from torchlinop import plot
    >>> ax = plot.eigenvalues(np.array([3.0, 1.0, -0.5]))
    >>> [len(line.get_xdata()) for line in ax.lines]
    [2, 1]
    """
    sizes = np.sort(on_host(values))[::-1]
    if np.iscomplexobj(sizes):
        raise ValueError("Eigenvalues have to be real here: draw their .real or .imag.")
    if not len(sizes) or not np.isfinite(sizes).all():
        raise ValueError("There are no eigenvalues to draw, or some are not finite.")
    ax = axes_or_new(ax)
    least = floor * np.abs(sizes).max()
    positive, negative = sizes[sizes > least], -sizes[::-1][sizes[::-1] < -least]
    name = "eigenvalues" if label is None else label
    symbol = "os^vD"[len(ax.lines) % 5]  # another for each call, for print
    marker = {"marker": symbol, "markersize": 4, "markevery": _few(positive)}
    (line,) = ax.loglog(np.arange(1, len(positive) + 1), positive, label=name, **marker)
    if len(negative):
        marker |= {"markerfacecolor": "none", "markevery": _few(negative)}
        ax.loglog(
            np.arange(1, len(negative) + 1),
            negative,
            color=line.get_color(),
            linestyle=":",
            label=f"{name}, negative",
            **marker,
        )
    ax.set_xlabel("rank")
    ax.set_ylabel("size of the eigenvalue")
    return finished(ax, legend=bool(len(negative)) or label is not None)


def density(
    spectrum: SpectralDensity,
    *,
    ax: Any = None,
    sigma: float | None = None,
    label: str | None = None,
) -> Any:
    """Draw a spectral density with the band of two standard errors.

    The vertical axis is logarithmic and ends where a single eigenvalue is still seen.

    Parameters
    ----------
    spectrum
        Of :func:`torchlinop.estimate.spectral_density`.
    ax
        Where to draw.
    sigma
        Width of the Gaussians.
    label
        Name in the legend.
    """
    require(SpectralDensity, spectrum, _SOURCE)
    ax = axes_or_new(ax)
    x = spectrum.grid()
    width = spectrum.sigma if sigma is None else sigma
    curve = spectrum.density(x, sigma=sigma)
    low, high = spectrum.band(x, sigma=sigma)
    single = 1 / (spectrum.dim * width * np.sqrt(2 * np.pi))
    style = ("-", "--", "-.", ":")[len(ax.lines) % 4]  # another for each call, for print
    (line,) = ax.semilogy(x, np.maximum(curve, 1e-3 * single), style, label=label)
    top = 3 * curve.max()
    ax.fill_between(
        x,
        np.maximum(low, 1e-3 * single),
        np.clip(high, 1e-3 * single, top),
        color=line.get_color(),
        alpha=BAND,
        linewidth=0,
    )
    ax.set_ylim(0.2 * single, top)
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("density")
    return finished(ax, legend=label is not None)


def log_density(
    spectrum: SpectralDensity, *, ax: Any = None, label: str | None = None
) -> Any:
    """Draw the share of the eigenvalues in each decade of their size, with its band.

    Negative eigenvalues are a dashed line of their own. Those that are zero to rounding
    gather at the left end.

    Parameters
    ----------
    spectrum
        Of :func:`torchlinop.estimate.spectral_density`.
    ax
        Where to draw.
    label
        Name in the legend.
    """
    require(SpectralDensity, spectrum, _SOURCE)
    ax = axes_or_new(ax)
    x = spectrum.log_grid()
    name = "" if label is None else f"{label}, "
    color, seen = None, np.zeros(len(x), dtype=bool)
    for sign, word, style in ((1, "positive", "-"), (-1, "negative", "--")):
        curve = spectrum.log_density(x, sign=sign)
        if sign < 0 and not (curve > 0).any():
            continue
        seen |= curve > _VISIBLE * curve.max()
        low, high = spectrum.log_band(x, sign=sign)
        high = np.where(np.isfinite(high), high, curve)
        (line,) = ax.semilogx(x, curve, style, color=color, label=name + word)
        color = line.get_color()
        ax.fill_between(x, low, high, color=color, alpha=BAND, linewidth=0)
    ax.set_xlim(x[seen].min() / 3, x[seen].max() * 3)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("size of the eigenvalue")
    ax.set_ylabel("share per decade")
    return finished(ax, legend=True)


def layers(spectra: Mapping[str, SpectralDensity], *, ax: Any = None) -> Any:
    """Draw the spectra of layers or blocks below one another, on one logarithmic scale.

    Of each the share per decade: positive eigenvalues upwards and filled, negative ones
    downwards and hatched.

    Parameters
    ----------
    spectra
        A density for each name.
    ax
        Where to draw.
    """
    require(Mapping, spectra, "estimate.layer_densities(A)")
    if not spectra:
        raise ValueError("There are no layers to draw.")
    for spectrum in spectra.values():
        require(SpectralDensity, spectrum, _SOURCE)
    ax = axes_or_new(ax, size=(6.4, 1.2 + 0.55 * len(spectra)))
    grids = [spectrum.log_grid(2) for spectrum in spectra.values()]
    x = np.geomspace(min(low for low, _ in grids), max(high for _, high in grids), 1024)
    color, seen = None, np.zeros(len(x), dtype=bool)
    curves = [(s.log_density(x), s.log_density(x, sign=-1)) for s in spectra.values()]
    for row, (up, down) in enumerate(curves):
        unit = 0.8 / max(up.max() + down.max(), 1e-300)  # all of one height
        seen |= up + down > _VISIBLE * (up + down).max()
        base = -row
        (line,) = ax.plot(x, base + unit * up, color=color, linewidth=1)
        color = line.get_color()
        ax.fill_between(x, base, base + unit * up, color=color, alpha=BAND, linewidth=0)
        if (down > 0).any():
            ax.plot(x, base - unit * down, color=color, linewidth=1, linestyle="--")
            ax.fill_between(
                x,
                base,
                base - unit * down,
                facecolor="none",
                edgecolor=color,
                hatch="////",
                linewidth=0,
            )
    ax.set_xscale("log")
    ax.set_xlim(x[seen].min() / 3, x[seen].max() * 3)
    ax.set_yticks([-row for row in range(len(spectra))], list(spectra))
    ax.set_xlabel("size of the eigenvalue")
    return finished(ax, legend=False)


def _few(values: np.ndarray) -> int | float:
    """Where markers are: on all of a few values, else at distances on the page."""
    return 1 if len(values) <= 40 else 0.04
