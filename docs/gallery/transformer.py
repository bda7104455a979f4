r"""
A transformer, layer by layer
=============================

Where in a transformer is the curvature? The model is a GPT-2 of the ``transformers``
package, built from a configuration so small that it trains here in seconds, to predict
the next character of English text: the descriptions that scikit-learn ships with its
data sets.

The Gauss-Newton matrix of all of its parameters is an operator, and so is each diagonal
block of it.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn import datasets
from torch import nn
from torchlinop import EmpiricalRisk, GGNLinearOperator, HessianLinearOperator, estimate
from transformers import GPT2Config, GPT2LMHeadModel

torch.manual_seed(0)
torch.set_num_threads(1)

# %%
# Text
# ----

loaders = (
    datasets.load_diabetes,
    datasets.load_wine,
    datasets.load_iris,
    datasets.load_digits,
    datasets.load_breast_cancer,
    datasets.load_linnerud,
)
text = "\n".join(load().DESCR for load in loaders)
alphabet = sorted(set(text))
codes = torch.tensor([alphabet.index(character) for character in text])
length = 32
windows = codes[: len(codes) // (length + 1) * (length + 1)].view(-1, length + 1)
print(f"{len(text)} characters, {len(alphabet)} different ones, {len(windows)} windows")

# %%
# A model
# -------
#
# Three blocks, four heads, 32 numbers a token; no dropout, since a random function has no
# curvature. Embedding and output share one matrix, as in GPT-2 itself.

config = GPT2Config(
    vocab_size=len(alphabet),
    n_positions=length,
    n_embd=32,
    n_layer=3,
    n_head=4,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=None,
    eos_token_id=None,
)
model = GPT2LMHeadModel(config)
loss_function = nn.CrossEntropyLoss()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(150):
    batch = windows[torch.randint(len(windows), (24,))]
    logits = model(input_ids=batch[:, :-1]).logits
    loss = loss_function(logits.flatten(0, 1), batch[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 49:
        print(f"step {step + 1}: loss {loss.item():.3f}")
optimizer.zero_grad()
model.eval()

# %%
# An operator of a Hugging Face model
# -----------------------------------
#
# Its batches are dicts and its output is an object, so a function says how to get from
# one to the logits: it takes the parameters as the dict that is handed over.

params = dict(model.named_parameters())
count = sum(p.numel() for p in params.values())
sample = windows[:16]
data = [({"input_ids": part[:, :-1]}, part[:, 1:].reshape(-1)) for part in sample.split(8)]


def forward(params, X):
    """Logits of all positions, shape ``(positions, characters)``."""
    logits = torch.func.functional_call(model, params, (), dict(X)).logits
    return logits.flatten(0, 1)


risk = EmpiricalRisk(
    forward, loss_function, params, data, batch_size=lambda X: len(X["input_ids"])
)
G, H = GGNLinearOperator(risk), HessianLinearOperator(risk)
print(G)

# %%
# All parameters together
# -----------------------

for name, A in (("Gauss-Newton", G), ("Hessian", H)):
    pairs = estimate.eigsh(A, k=4, tol=1e-2)
    print(f"{name:12}", pairs.eigenvalues.numpy().round(3), f"{pairs.num_matvecs} products")

# %%
# Layer by layer
# --------------
#
# Parameters are grouped by the part of the model that they belong to. One call gives a
# spectral density for the block of each group.

parts = {"attn.c_attn": "query, key, value", "attn.c_proj": "attention output"}
parts |= {"mlp.c_fc": "MLP, first", "mlp.c_proj": "MLP, second"}
groups = {"embedding": ["transformer.wte.weight"]}
for layer in range(config.n_layer):
    for key, part in parts.items():
        names = [name for name in params if f"h.{layer}.{key}." in name]
        groups[f"{layer}: {part}"] = names
densities = estimate.layer_densities(G, groups=groups, num_probes=2, num_steps=25)
for name, density in densities.items():
    print(f"{name:21} {density.dim:5d} parameters, largest {density.bounds[1]:.4f}")

# %%
# The blocks differ by orders of magnitude: curvature is largest next to the input, and
# in the attention's output. That is why one step size does not fit all of a
# transformer. Within a block most eigenvalues are close to zero; the right picture
# shows the others.

figure, axes = plt.subplots(ncols=2, figsize=(12, 4.6), layout="constrained")
width = 0.2
for i, part in enumerate(parts.values()):
    largest = [densities[f"{layer}: {part}"].bounds[1] for layer in range(config.n_layer)]
    places = np.arange(config.n_layer) + (i - 1.5) * width
    axes[0].bar(places, largest, width, label=part, hatch=("", "//", "..", "xx")[i])
axes[0].axhline(densities["embedding"].bounds[1], color="0.4", linestyle="--")
axes[0].text(2.4, 1.1 * densities["embedding"].bounds[1], "embedding", ha="right")
axes[0].set_yscale("log")
axes[0].set_xticks(range(config.n_layer), [f"layer {i}" for i in range(config.n_layer)])
axes[0].set_ylabel("largest eigenvalue of the block")
axes[0].legend(fontsize="small")
sizes = np.geomspace(1e-4, 20, 400)
styles = ("-", "--", "-.", ":")
for part, style in zip(parts.values(), styles, strict=True):
    density = densities[f"1: {part}"]
    axes[1].semilogx(sizes, density.log_density(sizes), style, label=f"layer 1, {part}")
axes[1].set_xlabel("eigenvalue of the block")
axes[1].set_ylabel("share of eigenvalues per decade")
axes[1].legend(fontsize="small")
