"""
How small does the file get?
============================

A pruned network stored as usual is no smaller: zeros take as many bytes as other numbers. This
tutorial stores the demo's ResNet in fewer and fewer bytes.
"""

from pathlib import Path
from tempfile import mkdtemp

import matplotlib.pyplot as plt

import wavprune
from wavprune import checkpoint

folder = Path(mkdtemp())
dense = wavprune.demo.resnet()
test, train = wavprune.demo.digits(), wavprune.demo.digits("train")

pruned = wavprune.demo.resnet()
report = wavprune.fast.prune(pruned, sparsity=0.9, scope="global")
wavprune.match_batchnorm(pruned, dense, train)

# %%
# Bits for each value
# -------------------

points = []
exact = [{"values": "float32"}, {"values": "float16"}]
for settings in (*exact, {"bits": 8}, {"bits": 6}, {"bits": 4}):
    saved = checkpoint.save(pruned, folder / "net.safetensors", report=report, **settings)
    net = wavprune.demo.ResNet()
    net.load_state_dict(checkpoint.load(folder / "net.safetensors"))
    top1 = wavprune.evaluate(net.eval(), test).top1
    name = f"{settings['bits']} bits" if "bits" in settings else settings["values"]
    points.append((name, saved.bytes, top1))
    print(f"{name:>8}  {saved.bytes:7,} bytes  {saved.times_smaller:5.1f}x  {top1:.1%}")

# %%

fig, ax = plt.subplots(figsize=(6.5, 3.6))
ax.plot([size / 1000 for _, size, _ in points], [100 * top1 for *_, top1 in points], "o-")
for name, size, top1 in points:
    place = (size / 1000, 100 * top1)
    ax.annotate(name, place, xytext=(2, 6), textcoords="offset points", rotation=30)
ax.set(xlabel="kilobytes", ylabel="accuracy, %", xlim=(22, 50), ylim=(98, 100))
ax.grid(alpha=0.3)
fig.tight_layout()

# %%
# Where the bytes go
# ------------------

checkpoint.save(pruned, folder / "six.safetensors", report=report, bits=6)

# %%
# Ask for a size
# --------------
#
# With ``target_bytes`` the steps between values follow, finer where a layer needs it:

path = folder / "small.safetensors"
saved = checkpoint.save(pruned, path, report=report, target_bytes=22_000)
net.load_state_dict(checkpoint.load(path))
print(f"{saved.bytes:,} bytes, accuracy {wavprune.evaluate(net, test).top1:.1%}")
