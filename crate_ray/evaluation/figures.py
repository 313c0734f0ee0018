"""Figures of the report: charts as SVG, pictures as PNG. Colours are Okabe and Ito's; lines also differ by marker."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from crate_ray.evaluation.classification import Classification, EncoderScores
from crate_ray.evaluation.intervals import Estimate
from crate_ray.evaluation.layers import Structure
from crate_ray.evaluation.learning import Learning
from crate_ray.evaluation.reconstruction import VISIBLE_MEAN, Pictures, Reconstruction
from crate_ray.evaluation.segmentation import Example, MapScore, Segmentation
from crate_ray.structure.signals import norm_over_weights

_INK = {"trained": "#0072B2", "untrained": "#7F7F7F", "baseline": "#D55E00", "control": "#009E73"}
_MARKER = {"trained": "o", "untrained": "s", "baseline": "^", "control": "D"}
_LINE = {"trained": "-", "untrained": "--", "baseline": "-.", "control": ":"}
STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "svg.hashsalt": "crate-ray",  # fixed, so that the same numbers give the same file
}


class Image(NamedTuple):
    """A figure as a file."""

    mime: str
    """'image/svg+xml' or 'image/png'."""
    data: bytes
    """Content of the file."""
    alt: str
    """Alternative text."""
    caption: str
    """Text on what the figure shows and how to read it."""


def accuracies(result: Classification) -> Image:
    """Test accuracies of all encoders and of pixels, with intervals."""
    rows: list[tuple[str, str, Estimate, str]] = []
    for name, scores in result.encoders.items():
        for title, found in _kinds(scores):
            rows.append((f"{scores.title}\n{title}", "control" if name == "pixels" else name, found[0], found[1]))
    with rc_context(STYLE):
        figure = Figure(figsize=(8.6, 0.36 * len(rows) + 1.1), layout="constrained")
        axis = figure.subplots()
        for place, (_, ink, estimate, kind) in enumerate(rows):
            marker = "o" if kind == "linear" else "s"
            _interval(axis, place, estimate, _INK[ink], marker, 100)
        axis.axvline(100 * result.majority.value, color="black", linewidth=0.8, linestyle=":")
        axis.set_yticks(range(len(rows)), [row[0].replace("\n", ": ") for row in rows])
        axis.invert_yaxis()
        figure.supxlabel(
            "test accuracy / %, with 95 % intervals (dotted: always the most frequent class)", size="medium"
        )
        handles = [
            axis.plot([], [], marker, color="black", label=label)[0]
            for marker, label in (("o", "linear probe"), ("s", f"k-NN, k = {result.neighbours}"))
        ]
        figure.legend(handles=handles, loc="outside upper right", ncols=2)
        return _svg(
            figure,
            "Dot plot of test accuracies with 95 % intervals",
            f"Accuracy on {result.test_samples:,} test samples. 'Best' features were chosen on a fifth of the training "
            "samples, never on test samples.",
        )


def accuracy_by_layer(result: Classification) -> Image | None:
    """Held-out accuracies of every layer; None if layers were not compared."""
    encoders = {name: scores for name, scores in result.encoders.items() if scores.layers}
    if not encoders:
        return None
    with rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.4), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        depths = [max(one.layer or 0 for one in scores.layers) + 1 for scores in encoders.values()]
        for axis, kind, title in zip(axes, ("linear", "knn"), ("linear probe", "k-NN"), strict=True):
            for name, scores in encoders.items():
                for feature, filled in (("mean", True), ("cls", False)):
                    # The output of the last norm comes last. The requested feature may repeat a layer.
                    points = {one.layer: getattr(one, kind) for one in scores.layers if one.feature == feature}
                    last = max((layer for layer in points if layer is not None), default=0) + 1
                    curve = sorted((layer or last, 100 * value) for layer, value in points.items())
                    if not curve:
                        continue
                    label = f"{scores.title}, {'mean of patches' if filled else 'CLS'}"
                    face = _INK[name] if filled else "white"
                    style = {"color": _INK[name], "marker": _MARKER[name], "linestyle": _LINE[name], "ms": 4}
                    axis.plot(*zip(*curve, strict=True), markerfacecolor=face, label=label, **style)
            if len(set(depths)) == 1:
                axis.set_xticks(range(1, depths[0] + 1), [*map(str, range(1, depths[0])), "norm"])
            axis.set_xlabel("encoder layer" + (" (norm: after the last norm)" if len(set(depths)) == 1 else ""))
            axis.set_title(title)
        axes[0].set_ylabel("accuracy on held-out\ntraining samples / %")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        return _svg(
            figure,
            "Accuracy of the linear probe and of k-NN by encoder layer",
            "Accuracy by layer on the held-out fifth of the training samples, which is used to choose the best layer.",
        )


def reconstruction_errors(result: Reconstruction) -> Image:
    """Reconstruction errors by mask ratio."""
    panels = {
        "normalised_mse": "squared error / patch variance",
        "psnr": "PSNR over hidden patches / dB",
        "ssim": "SSIM of the whole picture",
    }
    with rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.1), layout="constrained")
        axes = figure.subplots(1, 3)
        for axis, (measure, label) in zip(axes, panels.items(), strict=True):
            for name, predictor in result.predictors.items():
                known = [(r.mask_ratio, e) for r in predictor.ratios if (e := getattr(r, measure)) is not None]
                if known:
                    ink = "control" if name == VISIBLE_MEAN else name
                    _curve(axis, [100 * r for r, _ in known], [e for _, e in known], ink, predictor.title)
            axis.set_xlabel("hidden patches / %")
            axis.set_ylabel(label)
            axis.axvline(100 * result.mask_ratio, color="black", linewidth=0.8, linestyle=":")
        axes[0].set_ylim(bottom=0)
        _legend(figure, axes[0])
        return _svg(
            figure,
            "Reconstruction errors by share of hidden patches",
            f"Means over {result.images} images with 95 % bands. Dotted: the share hidden in training. Left: lower is "
            "better; predicting each patch's own mean would give 1.",
        )


def reconstruction_pictures(pictures: Pictures) -> Image:
    """Originals, masked images and predictions."""
    rows: list[tuple[str, Tensor]] = [("original", pictures.original)]
    for ratio, masked, predicted in pictures.rows:
        rows += [(f"{ratio:.0%} hidden", masked), ("predicted", predicted)]
    count = len(pictures.original)
    with rc_context(STYLE):
        figure = Figure(figsize=(8.6, 8.6 / (count + 1) * len(rows)), layout="constrained")
        axes = figure.subplots(len(rows), count, squeeze=False)
        for (title, images), line in zip(rows, axes, strict=True):
            for axis, image in zip(line, images, strict=True):
                _picture(axis, image.permute(1, 2, 0).numpy())
            line[0].set_ylabel(title, rotation=0, ha="right", va="center")
        return _png(
            figure,
            "Held-out images, their masked forms and the predictions",
            "Held-out images; the same with hidden patches in grey; with the model's prediction in their place.",
        )


def layer_measures(result: Structure) -> Image:
    """Coding rates and sparsity by layer."""
    panels = {
        "rate_after": "$R^c(\\mathrm{LN}\\,Z^{\\ell+1/2}\\,|\\,U)$ / nats",
        "rate_after_span": "$R^c(\\mathrm{LN}\\,Z^{\\ell+1/2}\\,|$ basis of $U)$ / nats",
        "rate_after_raw": "$R^c(Z^{\\ell+1/2}\\,|\\,U)$, no norm / nats",
        "rate_reduction_span": "$\\Delta R$ against the basis of $U$ / nats",
        "effective_rank": "effective rank of $U_k^T\\,\\mathrm{LN}\\,Z^{\\ell+1/2}$",
        "rate_raw": "$R(Z^{\\ell+1/2})$, no norm / nats",
        "zero_share": "zeros in $Z^{\\ell+1}$ / %",
        "below_1": "$|z| < 0.1$ rms of the token / %",
        "gini": "Gini index of $Z^{\\ell+1}$",
    }
    with rc_context(STYLE):
        figure = Figure(figsize=(8.6, 7.6), layout="constrained")
        axes = figure.subplots(3, 3)
        for axis, (measure, label) in zip(axes.ravel(), panels.items(), strict=True):
            for name, encoder in result.encoders.items():
                estimates = encoder.measures[measure]
                scale = 100 if label.endswith("%") else 1
                layers = list(range(1, len(estimates) + 1))
                _curve(axis, layers, estimates, name, encoder.title, scale)
                if measure == "effective_rank":
                    ranks_LK = np.array(encoder.effective_ranks)
                    for edge_L in (ranks_LK.min(1), ranks_LK.max(1)):
                        axis.plot(layers, edge_L, color=_INK[name], linestyle=":", linewidth=0.9)
            _layers_axis(axis, max(len(e.measures[measure]) for e in result.encoders.values()))
            axis.set_title(label)
        _legend(figure, axes[0, 0])
        return _svg(
            figure,
            "Coding rates, effective rank and sparsity by layer",
            f"Means over {result.images} held-out images with 95 % bands. Top: coding rate against the layer's own "
            "codebook on three scales; the paper says it falls. Bottom: sparsity after the layer; the paper says it "
            "rises. Effective rank: mean over the subspaces; dotted: their minimum and maximum.",
        )


def signals(result: Learning) -> Image:
    """Signals of learning by layer: the encoder's, then the decoder's."""
    panels = {
        "token_cosine": "cosine between tokens",
        "token_rank": "effective rank of the tokens",
        "attention_branch": "attention branch / stream",
        "second_branch": "second branch / stream",
        "unused_codes": "unused codes / %",
        "visible_attention": "attention to visible patches",
        "attention_entropy": "entropy of attention",
        "gradients": "gradient norm, all weights",
    }
    with rc_context(STYLE):
        figure = Figure(figsize=(8.6, 5.2), layout="constrained")
        axes = figure.subplots(2, 4)
        for axis, (signal, label) in zip(axes.ravel(), panels.items(), strict=True):
            for name, model in result.models.items():
                values = [*_signal(model.encoder, signal), *_signal(model.decoder, signal)]
                drawn = 100 * np.array(values) if label.endswith("%") else np.array(values)
                style = {"color": _INK[name], "marker": _MARKER[name], "linestyle": _LINE[name]}
                axis.plot(range(1, len(drawn) + 1), drawn, markersize=3, label=model.title, **style)
            axis.axvline(len(result.models["trained"].encoder["token_cosine"]) + 0.5, color="0.7", linewidth=0.8)
            axis.set_title(label)
            axis.set_xlabel("layer")
        axes[1, 1].axhline(result.visible_share, color="0.7", linewidth=0.8, linestyle=":")
        axes[1, 3].set_yscale("log")
        _legend(figure, axes[0, 0])
        return _svg(
            figure,
            "Signals of learning by layer",
            f"On {result.images} masked images. Left of the line: encoder layers; right of it: decoder layers. Cosines "
            "near 1 and ranks near 1 mean that the tokens of an image coincide. Dotted: uniform attention.",
        )


def _signal(signals_of: dict[str, tuple[float, ...]], name: str) -> list[float]:
    """A signal by layer, not a number for layers of a model that has none; of the gradients, the norm over weights."""
    depth = len(signals_of["token_cosine"])
    if name != "gradients":
        return list(signals_of.get(name, (np.nan,) * depth))
    norms = norm_over_weights(values for key, values in signals_of.items() if key.startswith("gradient of"))
    return norms or [np.nan] * depth


def compression_steps(result: Structure) -> Image:
    """Change of the coding rate by each attention step, against the layer's own codebook."""
    panels = {
        "": "against $U$, as attention sees tokens",
        "_span": "against orthonormal bases of $U$",
        "_raw": "against $U$, tokens without norm",
    }
    with rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.0), layout="constrained")
        axes = figure.subplots(1, 3)
        for axis, (suffix, title) in zip(axes, panels.items(), strict=True):
            for name, encoder in result.encoders.items():
                before, after = (
                    np.array([e.value for e in encoder.measures[f"rate_{when}{suffix}"]])
                    for when in ("before", "after")
                )
                change = 100 * (after - before) / np.maximum(before, 1e-12)
                style = {"color": _INK[name], "marker": _MARKER[name], "linestyle": _LINE[name], "ms": 4}
                axis.plot(range(1, len(change) + 1), change, label=encoder.title, **style)
            axis.axhline(0, color="black", linewidth=0.8)
            _layers_axis(axis, max(len(e.measures["rate_before"]) for e in result.encoders.values()))
            axis.set_title(title)
        axes[0].set_ylabel("change of $R^c$ by\nthe attention step / %")
        _legend(figure, axes[0])
        return _svg(
            figure,
            "Relative change of the coding rate by each attention step",
            "By the derivation, each attention step descends R^c of its own layer: below zero, it compresses.",
        )


def codebooks_and_undoing(result: Structure) -> Image:
    """Coherence of the codebooks, and how closely decoder layers invert encoder layers."""
    undone = {name: e for name, e in result.encoders.items() if e.undoing is not None}
    with rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name, encoder in result.encoders.items():
            layers = range(1, len(encoder.coherence_mean) + 1)
            style = {"color": _INK[name], "marker": _MARKER[name], "ms": 4}
            left.plot(layers, encoder.coherence_largest, linestyle="-", label=f"{encoder.title}, largest", **style)
            left.plot(layers, encoder.coherence_mean, linestyle=":", label=f"{encoder.title}, mean of pairs", **style)
        _layers_axis(left, max(len(e.coherence_mean) for e in result.encoders.values()))
        left.set_ylim(0, 1.03)
        left.set_ylabel("coherence of the codebook")
        left.legend(loc="best")
        for name, encoder in undone.items():
            assert encoder.undoing is not None
            layers = range(1, len(encoder.undoing["scaled"]) + 1)
            _curve(right, layers, encoder.undoing["scaled"], name, encoder.title)
            other = [e.value for e in encoder.undoing["other_image"]]
            right.plot(layers, other, color=_INK[name], linestyle=":", label=f"{encoder.title}, another image")
        if undone:
            _layers_axis(right, max(len(e.undoing["scaled"]) for e in undone.values() if e.undoing), "decoder layer")
            right.set_ylim(0, 1.03)
            right.set_ylabel("relative error, best common scale")
            right.legend(loc="best")
        else:
            right.set_visible(False)
        return _svg(
            figure,
            "Coherence of codebooks by layer; errors of decoder layers against encoder layers",
            "Left: largest cosine between directions of two subspaces, 0 if they are orthogonal. Right: distance of a "
            "decoder layer's output from the input of the encoder layer that it should invert, 0 for an exact inverse; "
            "dotted: distance from another image's input.",
        )


def foregrounds(result: Segmentation) -> Image:
    """Jaccard index of every map and control, with intervals."""
    rows: list[tuple[str, str, MapScore]] = []
    for name, encoder in result.encoders.items():
        rows += [(f"{encoder.title}: {_short(score)}", name, score) for score in encoder.scores.values()]
    rows += [(f"control: {_short(score)}", "control", score) for score in result.controls.values()]
    with rc_context(STYLE):
        figure = Figure(figsize=(8.6, 0.27 * len(rows) + 0.8), layout="constrained")
        axis = figure.subplots()
        for place, (_, ink, score) in enumerate(rows):
            _interval(axis, place, score.jaccard, _INK[ink], _MARKER[ink], 1)
        axis.set_yticks(range(len(rows)), [row[0] for row in rows])
        axis.tick_params(axis="y", labelsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1)
        figure.supxlabel("Jaccard index (IoU) of the foreground, mean with 95 % intervals", size="medium")
        return _svg(
            figure,
            "Dot plot of the Jaccard index of maps and controls",
            f"On the {result.test_images} images of the test half. Controls use no model; the last one uses the masks "
            "and is the best possible choice of whole patches.",
        )


def head_table(result: Segmentation) -> Image:
    """Jaccard index of every head of the trained model on the validation half."""
    values = np.array(result.encoders["trained"].heads)
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(max(3.2, 0.5 * values.shape[1] + 1.8), 0.34 * len(values) + 1.1), layout="constrained")
        axis = figure.subplots()
        shown = axis.imshow(values, cmap="cividis", aspect="auto")
        axis.set_xticks(range(values.shape[1]), map(str, range(1, values.shape[1] + 1)))
        axis.set_yticks(range(len(values)), map(str, range(1, len(values) + 1)))
        axis.set_xlabel("head")
        axis.set_ylabel("layer")
        figure.colorbar(shown, ax=axis, label="Jaccard index")
        return _svg(
            figure,
            "Heat map of the Jaccard index by layer and head",
            "Each head of the trained model on the validation half, at the mass threshold.",
        )


def foreground_pictures(examples: Sequence[Example]) -> Image:
    """Images, masks, and the maps of the trained model."""
    rows = ["image", "mask", "attention", "its foreground", "component", "its foreground"]
    with rc_context(STYLE):
        figure = Figure(figsize=(8.6, 8.6 / (len(examples) + 1) * len(rows)), layout="constrained")
        axes = figure.subplots(len(rows), len(examples), squeeze=False)
        for column, example in enumerate(examples):
            _picture(axes[0, column], example.image)
            for row, values in enumerate(
                (
                    example.mask,
                    example.attention,
                    example.attention_found,
                    example.component,
                    example.component_found,
                ),
                1,
            ):
                axes[row, column].imshow(values, cmap="cividis", interpolation="nearest")
                _bare(axes[row, column])
        for line, title in zip(axes, rows, strict=True):
            line[0].set_ylabel(title, rotation=0, ha="right", va="center")
        return _png(
            figure,
            "Images with masks, attention maps and principal components",
            "The trained model's best head and best component of the last keys on images of the test half. Yellow: "
            "high values, or foreground.",
        )


def _kinds(scores: EncoderScores) -> list[tuple[str, tuple[Estimate, str]]]:
    """Accuracies of an encoder: name of the features, estimate, and 'linear' or 'knn'."""
    plain = scores.chosen_linear is None
    where = "" if plain and scores.standard.source == scores.title else f" ({scores.standard.source})"
    rows = [
        (f"probe{where}", (scores.standard.linear.interval, "linear")),
        (f"k-NN{where}", (scores.standard.knn, "knn")),
    ]
    if scores.chosen_linear is not None:
        rows.append((f"probe, best ({scores.chosen_linear.source})", (scores.chosen_linear.linear.interval, "linear")))
    if scores.chosen_knn is not None:
        rows.append((f"k-NN, best ({scores.chosen_knn.source})", (scores.chosen_knn.knn, "knn")))
    return rows


def _short(score: MapScore) -> str:
    return score.title.replace("best head of all layers: ", "best head: ").replace(
        "best head of the last layer: ", "best last head: "
    )


def _interval(axis: Any, place: float, estimate: Estimate, colour: str, marker: str, scale: float) -> None:
    low, high = scale * (estimate.value - estimate.low), scale * (estimate.high - estimate.value)
    axis.errorbar(
        scale * estimate.value, place, xerr=[[low], [high]], fmt=marker, color=colour, markersize=5, capsize=2
    )


def _curve(
    axis: Any, x: Sequence[float], estimates: Sequence[Estimate], ink: str, label: str, scale: float = 1
) -> None:
    value, low, high = (scale * np.array([getattr(e, end) for e in estimates]) for end in ("value", "low", "high"))
    axis.plot(x, value, color=_INK[ink], marker=_MARKER[ink], linestyle=_LINE[ink], markersize=4, label=label)
    axis.fill_between(x, low, high, color=_INK[ink], alpha=0.2, linewidth=0)


def _layers_axis(axis: Any, depth: int, label: str = "encoder layer") -> None:
    axis.set_xticks(range(1, depth + 1, max(1, -(-depth // 12))))
    axis.set_xlabel(label)


def _legend(figure: Figure, axis: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))


def _picture(axis: Any, pixels_HWC: NDArray[np.float32]) -> None:
    """Draw an image in 0 … 1: in colour if it has three channels, else its first channel in grey."""
    if pixels_HWC.shape[-1] == 3:
        axis.imshow(pixels_HWC.clip(0, 1), interpolation="nearest")
    else:
        axis.imshow(pixels_HWC[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    _bare(axis)


def _bare(axis: Any) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _svg(figure: Figure, alt: str, caption: str) -> Image:
    return Image("image/svg+xml", saved(figure, "svg", metadata={"Date": None}), alt, caption)


def _png(figure: Figure, alt: str, caption: str) -> Image:
    return Image("image/png", saved(figure, "png", dpi=130), alt, caption)


def saved(figure: Figure, kind: str, **options: Any) -> bytes:
    """A figure as a file of a kind that matplotlib writes, such as 'png'. Options are those of `Figure.savefig`."""
    out = io.BytesIO()
    figure.savefig(out, format=kind, **options)
    return out.getvalue()
