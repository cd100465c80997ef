"""
What a basis does to a kernel
=============================

A kernel of a trained network is a small picture, and neighboring values resemble each other. This
tutorial looks at a few of them.
"""

import torch

import wavprune

model = wavprune.demo.resnet()
weight = model.layer3.conv2.weight.detach()
print(tuple(weight.shape), "that is", weight.shape[0] * weight.shape[1], "kernels of 3x3")

# %%
# Coefficients
# ------------
#
# ``uhaar`` is the Haar wavelet made for odd sizes. Its first vector takes the mean of a kernel, the
# others take differences.

basis = wavprune.basis_for(wavprune.PruneConfig(wavelet="uhaar"), weight)
kernels = weight.flatten(0, 1).double()
coefficients = kernels.flatten(1) @ torch.tensor(basis.analysis).T
energy = coefficients.square().mean(0)
print("share of the energy in each coefficient, largest first:")
print([f"{share:.0%}" for share in (energy / energy.sum()).sort(descending=True).values])

# %%
# Were the weights noise, each of the nine would have 11%. The larger the difference, the more a
# basis gains.
#
# Prune and look
# --------------

sparse = wavprune.demo.resnet()
report = wavprune.fast.prune(sparse, wavelet="uhaar", sparsity=0.8, scope="global")
report

# %%
# The kernels of one layer before and after. What remains is smooth: a few coefficients per kernel.

after = sparse.layer3.conv2.weight.detach()
wavprune.plots.kernels_before_after(weight[:6, :6], after[:6, :6])

# %%
# Minimum-weight pruning keeps as many values, and leaves single weights standing:

baseline = wavprune.demo.resnet()
wavprune.fast.prune(baseline, method="min_weight", match=report, scope="global")
after = baseline.layer3.conv2.weight.detach()
wavprune.plots.kernels_before_after(weight[:6, :6], after[:6, :6])

# %%
# Error by layer
# --------------

wavprune.plots.error_by_layer(report)
