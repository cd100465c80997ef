"""
How much accuracy does it cost?
===============================

The demo's ResNet tells handwritten digits apart. We prune it harder and harder, in three ways.
"""

import itertools

import matplotlib.pyplot as plt

import wavprune

dense = wavprune.demo.resnet()
test, train = wavprune.demo.digits(), wavprune.demo.digits("train")
wavprune.evaluate(dense, test)

# %%
# Without a repair
# ----------------

pruned = wavprune.demo.resnet()
report = wavprune.fast.prune(pruned, sparsity=0.9, scope="global")
print(f"{wavprune.evaluate(pruned, test).top1:.1%}")

# %%
# The weights are fine. What suffers are the batch norms: they expect the statistics of the unpruned
# network. ``match_batchnorm`` restores them without labels.

wavprune.match_batchnorm(pruned, dense, train)
print(f"{wavprune.evaluate(pruned, test).top1:.1%}")

# %%
# Methods at equal size
# ---------------------
#
# ``compare`` prunes, repairs and measures copies. Each method keeps the same number of values.

sparsities = [0.8, 0.9, 0.95, 0.97]
result = wavprune.compare(
    dense,
    test,
    calibration=train,
    sparsities=sparsities,
    wavelets=["uhaar", "dct"],
    methods=["dwt", "min_weight"],
    seeds=[0],
)
result

# %%
# With inputs instead of magnitudes
# ---------------------------------
#
# The same training images, still without labels, can also choose what is kept.

batches = list(itertools.islice(train, 1))
calibration = wavprune.calibrate(dense, batches)
calibrated = {}
for sparsity in (0.95, 0.97):
    net = wavprune.demo.resnet()
    wavprune.fast.prune(
        net, calibration=calibration, wavelet="dct", sparsity=sparsity, scope="global"
    )
    calibrated[sparsity] = wavprune.evaluate(net, test).top1
    print(f"{sparsity:.0%} pruned: {calibrated[sparsity]:.1%}")

# %%

lines = {}
for trial in result:
    if trial.matched == "kept":
        point = (trial.evaluation.sparsity, 100 * trial.evaluation.top1)
        lines.setdefault(trial.basis, []).append(point)

fig, ax = plt.subplots(figsize=(6.5, 3.6))
for basis, points in lines.items():
    ax.plot(*zip(*points), "o-", label=basis)
ax.plot(
    calibrated.keys(), [100 * top1 for top1 in calibrated.values()], "s-", label="dct, from inputs"
)
ax.set(xlabel="sparsity", ylabel="accuracy, %")
ax.grid(alpha=0.3)
ax.legend()
fig.tight_layout()

# %%
# Up to 90% there is little to choose. Beyond that a wavelet basis loses later than single weights
# do, and pruning from inputs loses last. On 600 images, differences below half a point mean
# nothing.
