"""The demo's command, on a smaller model than its own."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn
from torchlinop.__main__ import main
from torchlinop.examples import digits


@pytest.fixture
def _small(monkeypatch):
    def train():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 10)).double()
        X, y = torch.randn(90, 8, dtype=torch.float64), torch.arange(90) % 10
        data = list(zip(X.split([40, 30, 20]), y.split([40, 30, 20]), strict=True))
        return model, data, (X, y)

    monkeypatch.setattr(digits, "train", train)


@pytest.mark.usefixtures("_small")
def test_demo(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    main(["demo", "--output", str(tmp_path / "spectrum.png")])
    printed = capsys.readouterr().out
    for solver in ("eigsh Hessian,", "lobpcg GGN,", "cg GGN", "minres Hessian", "svds"):
        (line,) = [row for row in printed.splitlines() if row.startswith(solver + " ")][:1]
        residual, products = line.split()[-4:-2]
        assert float(residual) < 1e-4
        assert int(products) > 5
    assert "What this says about the network" in printed
    assert "effective rank" in printed
    assert (tmp_path / "spectrum.png").stat().st_size > 10_000


def test_without_its_packages(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "sklearn" else found(n)
    )
    with pytest.raises(ImportError, match=r"needs scikit-learn: pip install"):
        main(["demo"])


def test_usage(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "demo" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([])
    assert "usage: python -m torchlinop" in capsys.readouterr().err
