import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torchlinop import GGNLinearOperator, HessianLinearOperator, JacobianLinearOperator

torch.manual_seed(0)
digits = load_digits()
X = torch.tensor(digits.data[:600] / 16)  # float64
y = torch.tensor(digits.target[:600])
data = [(X[:250], y[:250]), (X[250:500], y[250:500]), (X[500:], y[500:])]

model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double()
loss_function = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
for _ in range(60):
    optimizer.zero_grad()
    loss_function(model(X), y).backward()
    optimizer.step()
optimizer.zero_grad()

H = HessianLinearOperator(model, loss_function, model.parameters(), data)
G = GGNLinearOperator(model, loss_function, model.parameters(), data)
