# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %%
import importlib.metadata
import subprocess
import sys

# What pip installs on Google Colab: the path of a clone, or "git+" and the address it came from.
PACKAGE = "/content/kd2m_jax"

if "google.colab" in sys.modules:
    # Colab's own versions stay: its GPU plugin is of the same version as its JAX.
    kept = [f"{p}=={importlib.metadata.version(p)}" for p in ("jax", "jaxlib", "flax", "numpy")]
    done = subprocess.run([sys.executable, "-m", "pip", "install", "-q", *kept, PACKAGE])
    if done.returncode:
        raise RuntimeError(
            f"pip cannot install {PACKAGE!r}: set PACKAGE above to the path of a clone on this "
            'machine, or to "git+" followed by the address of the repository you cloned'
        )

# %% [markdown]
# # Distilling digits, from data to what the student gained
#
# A residual network teaches a small MLP to read scikit-learn's handwritten digits (8×8 pixels).
# We watch the training, look at the features before and after, and ask which digits the student
# gained, and whether it gained any.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from IPython.display import display
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.model_selection import train_test_split

from kd2m_jax import fit, losses, models

COLOURS = {"teacher": "#0072B2", "student alone": "#E69F00", "distilled": "#009E73"}
plt.rcParams.update({"figure.dpi": 90, "font.size": 9, "axes.titlesize": 10})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})

x, labels = load_digits(return_X_y=True)
x = ((x - x.mean()) / x.std()).astype(np.float32).reshape(-1, 8, 8, 1)
split = train_test_split(x, labels.astype(np.int32), test_size=450, random_state=0, stratify=labels)
train, test = (split[0], split[2]), (split[1], split[3])

# %% [markdown]
# ## Three trainings, live
#
# The teacher sees all 1,347 training images. The student has only 300 of them, and does not see
# the others: a small network with few data, which is where a teacher has something to give.
# Student alone and distilled student start from the same weights, see the same batches, and take
# the same optimizer; only λ differs. The distance is `cw2`, between features of size 64 for both.
#
# `fit` hands a record of what it did to each callback. This one redraws the figure after an
# epoch's evaluation.

# %%
LAMBDA = 1e-2
few, _ = train_test_split(
    np.arange(len(train[0])), train_size=300, random_state=0, stratify=train[1]
)
few_train = (train[0][few], train[1][few])

figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.9))
left.set(xlabel="epoch", ylabel="test accuracy (%)", ylim=(60, 100))
right.set(xlabel="epoch", ylabel="cw2 (squared distance)")
figure.tight_layout()
live = display(figure, display_id=True)
plt.close(figure)  # or it would be shown a second time


def curves(name):
    """Make a callback that draws a training as it goes."""
    epochs, accuracies, distances = [], [], []
    (accuracy_line,) = left.plot([], [], c=COLOURS[name], label=name)
    (distance_line,) = right.plot([], [], c=COLOURS[name])
    left.legend(frameon=False, loc="lower right")

    def update(record):
        if "test_accuracy" in record:
            epochs.append(record["epoch"])
            accuracies.append(100 * record["test_accuracy"])
            distances.append(record.get("distillation_loss", np.nan))
            accuracy_line.set_data(epochs, accuracies)
            distance_line.set_data(epochs, distances)
            if len(epochs) % 10 == 0:  # drawing takes longer than an epoch
                for axis in (left, right):
                    axis.relim()
                    axis.autoscale_view(scaley=axis is right)
                live.update(figure)

    return update


def trained(name, network, data, epochs, batch_size, **distillation):
    steps = epochs * (len(data[0]) // batch_size)
    optimizer = optax.sgd(optax.cosine_decay_schedule(0.1, steps), momentum=0.9)
    result = fit(
        network, data, epochs=epochs, batch_size=batch_size, optimizer=optimizer, eval_data=test,
        callbacks=[curves(name)], **distillation,
    )  # fmt: skip
    return result.student


def new_student():
    return models.MLP((16, 64), 10, in_features=64, rngs=nnx.Rngs(0))


teacher = trained(
    "teacher", models.resnet8(10, in_channels=1, rngs=nnx.Rngs(0)), train, epochs=6, batch_size=128
)
alone = trained("student alone", new_student(), few_train, epochs=40, batch_size=100)
distilled = trained(
    "distilled", new_student(), few_train, epochs=40, batch_size=100,
    teacher=teacher, metric="cw2", coef=LAMBDA,
)  # fmt: skip

# %%
networks = {"teacher": teacher, "student alone": alone, "distilled": distilled}
outputs = {name: jax.jit(lambda x, n=network: n(x))(test[0]) for name, network in networks.items()}
correct = {name: np.asarray(out.logits.argmax(1)) == test[1] for name, out in outputs.items()}
for name, right_ones in correct.items():
    p = right_ones.mean()
    error = 100 * (p * (1 - p) / len(right_ones)) ** 0.5
    print(
        f"{name:<14}{100 * p:6.2f}% of {len(right_ones)} test images (standard error {error:.1f})"
    )

gained = correct["distilled"] & ~correct["student alone"]
lost = correct["student alone"] & ~correct["distilled"]
difference = 100 * (gained.mean() - lost.mean())
error = 100 * (gained.sum() + lost.sum() - (gained.sum() - lost.sum()) ** 2 / 450) ** 0.5 / 450
print(
    f"\n{gained.sum()} images gained, {lost.sum()} lost: {difference:+.2f} points "
    f"(standard error of the difference {error:.1f})"
)

# %% [markdown]
# Both students are tested on the same images, so the images that both get right or wrong cancel:
# what counts are those gained and lost. This error is that of the test images alone; another seed
# gives another pair of students.
#
# ## Features before and after
#
# The features of all test images, teacher's and students' in one embedding, so that their places
# can be compared. Above, the two main directions of the teacher's features (PCA): a linear map,
# in which distances keep their meaning but 62 directions are left out. Below, t-SNE of all
# clouds at once, which keeps neighbours together and says little of larger distances. Each mark
# is the digit that the image shows: the teacher's in blue, the student's in another colour.

# %%
SHOWN = slice(0, 200)
clouds = {name: np.asarray(out.features)[SHOWN] for name, out in outputs.items()}
clouds = {"untrained": np.asarray(new_student()(test[0]).features)[SHOWN], **clouds}
pca = PCA(2).fit(clouds["teacher"])
tsne = TSNE(perplexity=30, random_state=0).fit_transform(np.concatenate(list(clouds.values())))
embeddings = {
    "PCA of the teacher": {name: pca.transform(z) for name, z in clouds.items()},
    "t-SNE": dict(zip(clouds, np.split(tsne, len(clouds)), strict=True)),
}
shown = {"untrained": "#000000", **{name: COLOURS[name] for name in ("student alone", "distilled")}}
figure, axes = plt.subplots(2, 3, figsize=(8.4, 5.6), sharex="row", sharey="row")
for axis, name in zip(axes[0], shown, strict=True):
    axis.set_title(f"teacher and {name}")
for row, (title, places) in zip(axes, embeddings.items(), strict=True):
    row[0].set_ylabel(title)
    for axis, (name, colour) in zip(row, shown.items(), strict=True):
        for digit in range(10):
            which = test[1][SHOWN] == digit
            style = {"marker": f"${digit}$", "s": 26, "linewidth": 0}
            axis.scatter(*places["teacher"][which].T, c=COLOURS["teacher"], alpha=0.5, **style)
            axis.scatter(*places[name][which].T, c=colour, alpha=0.7, **style)
figure.tight_layout()
plt.show()

for name in shown:
    z = clouds[name]
    w2, cw2 = losses.w2(z, clouds["teacher"]), losses.cw2(z, clouds["teacher"], test[1][SHOWN])
    print(f"{name:<14} w2 to the teacher {w2:6.1f}   cw2 {cw2:6.1f}   (squared distances)")

# %% [markdown]
# Untrained, the student's features are small, lie around one point and mix the digits. Trained
# alone they fall into classes, but in places of their own: by `w2` much further from the teacher's
# than before training. Distilled they are nearer than before, and `cw2` is hardly above `w2`: next
# to nothing would be gained by pairing features of different digits. They have not arrived: in the
# t-SNE the student's classes lie beside the teacher's, not on them.
#
# ## Which digits the student gained

# %%
by_digit = {
    name: [100 * right_ones[test[1] == digit].mean() for digit in range(10)]
    for name, right_ones in correct.items()
}
figure, axis = plt.subplots(figsize=(6.4, 2.8))
axis.vlines(range(10), by_digit["student alone"], by_digit["distilled"], color="#999999", lw=1)
for (name, values), marker in zip(by_digit.items(), "_s^", strict=True):
    axis.plot(range(10), values, marker, c=COLOURS[name], ms=12 if marker == "_" else 6, label=name)
axis.set_xticks(range(10))
axis.set(xlabel="digit", ylabel="test accuracy (%)")
axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
figure.tight_layout()
plt.show()

# %% [markdown]
# Above each image: the digit, then what the student alone says → what the distilled one says.

# %%
predictions = {name: np.asarray(out.logits.argmax(1)) for name, out in outputs.items()}
figure, axes = plt.subplots(2, 8, figsize=(8, 2.6))
for row, title, which in zip(axes, ("gained", "lost"), (gained, lost), strict=True):
    for axis in row:
        axis.axis("off")
    row[0].text(-0.15, 0.5, title, transform=row[0].transAxes, ha="right", va="center")
    for axis, i in zip(row, np.flatnonzero(which), strict=False):
        axis.imshow(test[0][i, ..., 0], cmap="Greys")
        alone_says, distilled_says = (predictions[n][i] for n in ("student alone", "distilled"))
        axis.set_title(f"{test[1][i]}: {alone_says} → {distilled_says}")
figure.tight_layout()
plt.show()

# %% [markdown]
# About as many gained as lost. Where the two students differ, they differ by digit: the distilled
# one reads more twos and sevens, and fewer nines. A digit has about 45 test images, so one image is
# 2.2 points, and differences of two or three images say little. The features have come towards the
# teacher's, and the accuracy has not moved: here a smaller distance is no better student. A claim
# that a teacher helps, or does not, takes more seeds and more test images than this.
#
# **Try:** all training images for the student (`few_train = train`); other λ, from 1e-4 to 1e-1;
# another metric (`metric="jw2"`, or `"kd+cw2"` with logits and features); three seeds instead of
# one. Does the order of the two students hold?
