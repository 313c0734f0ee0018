"""Conclusions from the numbers, in sentences: which differences exceed their intervals, and which do not."""

from __future__ import annotations

from typing import Literal

from crate_ray.evaluation.classification import Classification, FeatureScores
from crate_ray.evaluation.intervals import Estimate
from crate_ray.evaluation.layers import EncoderStructure, Structure, Trend
from crate_ray.evaluation.learning import Learning
from crate_ray.evaluation.reconstruction import VISIBLE_MEAN, Reconstruction
from crate_ray.evaluation.segmentation import Segmentation

_COLLAPSED = 0.9
"""Mean cosine between the tokens of an image from which on they count as collapsed."""


def on_classification(result: Classification) -> list[str]:
    """The trained encoder's accuracy compared with each control, and its best layer."""
    scores = result.encoders
    own = scores["trained"].standard
    said = [
        f"A linear probe on the {own.source} classifies {_percent(own.linear.interval)} of {result.test_samples:,} "
        f"test samples correctly, k-NN {_percent(own.knn)}."
    ]
    for name, other in scores.items():
        if name != "trained":
            said.append(
                f"Against {_the(other.title)} ({other.standard.linear.accuracy:.1%} and {other.standard.knn.value:.1%})"
                f" the probe is {_points(own.linear.interval, other.standard.linear.interval)} and k-NN "
                f"{_points(own.knn, other.standard.knn)}."
            )
    best = scores["trained"].chosen_linear
    if best is not None and best.source != own.source:
        said.append(f"Chosen on held-out training samples, the best probe is on the {_with_accuracy(best)}.")
        if (fresh := scores["untrained"].chosen_linear) is not None:
            said.append(
                f"The untrained encoder's best is on the {_with_accuracy(fresh)}. At its best layer the trained one is "
                f"{_points(best.linear.interval, fresh.linear.interval)}."
            )
    elif best is not None:
        said.append("No other layer or feature did better on held-out training samples.")
    return said


def on_reconstruction(result: Reconstruction) -> list[str]:
    """The trained model compared with the controls at its mask ratio in training, and its range of errors."""
    trained = result.predictors["trained"]
    nearest = min(range(len(trained.ratios)), key=lambda i: abs(trained.ratios[i].mask_ratio - result.mask_ratio))
    at = trained.ratios[nearest]
    said = [
        f"With {at.mask_ratio:.0%} of the patches hidden, hidden pixels are predicted with a PSNR of "
        f"{at.psnr.value:.2f} dB" + (f" and the whole picture has an SSIM of {at.ssim.value:.3f}." if at.ssim else ".")
    ]
    for name, other in result.predictors.items():
        if name != "trained":
            theirs = other.ratios[nearest]
            gain = at.psnr.value - theirs.psnr.value
            said.append(
                f"That is {abs(gain):.2f} dB {'better' if gain > 0 else 'worse'} than {_the(other.title)} "
                f"({theirs.psnr.value:.2f} dB){'' if _apart(at.psnr, theirs.psnr) else ' (within the intervals)'}."
            )
    if len(trained.ratios) > 1:
        first, last = trained.ratios[0], trained.ratios[-1]
        said.append(
            f"From {first.mask_ratio:.0%} to {last.mask_ratio:.0%} hidden, the PSNR goes from {first.psnr.value:.2f} "
            f"to {last.psnr.value:.2f} dB."
        )
    if trained.given_patch_statistics:
        said.append(
            "The model predicts normalised patches; its pixels are shown with the true mean and variance of each "
            "patch. So PSNR and SSIM favour it over predictors of plain pixels, such as the mean of the visible "
            "pixels. The normalised error is fair between models with the same targets."
        )
    if VISIBLE_MEAN in result.predictors and at.normalised_mse is not None:
        said.append(
            f"Its normalised error is {at.normalised_mse.value:.3f}; predicting each patch's true mean would give 1."
        )
    return said


def on_structure(result: Structure) -> list[str]:
    """Whether R^c falls and sparsity rises with depth, in the trained model and in the controls."""
    own = result.encoders["trained"]
    if next(iter(own.trends.values())).steps < 1:
        return ["The encoder has only one layer, so there are no trends over layers.", *_on_undoing(result)]
    said = [
        _trend_sentence("R^c against the layer's codebook, on normalised tokens,", own, "rate_after"),
        _trend_sentence(
            "R^c against orthonormal bases of the codebook (free of learned scales)", own, "rate_after_span"
        ),
        _trend_sentence("R^c on tokens without the norm", own, "rate_after_raw"),
        _trend_sentence("The share of zeros", own, "zero_share", percent=True),
        _trend_sentence("The Gini index", own, "gini"),
        f"The attention step lowers R^c of its own layer in {own.compressing_layers} of "
        f"{len(own.coherence_mean)} layers ({own.compressing_layers_span} against orthonormal bases).",
    ]
    compression = _claim(own, "rate_after", "rate_after_span", "falls")
    sparsity = _claim(own, "zero_share", "gini", "rises")
    said.append(
        "The paper says that R^c falls and sparsity rises from layer to layer. Here, R^c "
        f"{compression}, and sparsity {sparsity}."
    )
    for name, other in result.encoders.items():
        if name != "trained":
            trends = other.trends
            said.append(
                f"In the {other.title} (codebook: {other.codebook}), R^c {trends['rate_after'].verdict} "
                f"({_spearman(trends['rate_after'])}) and the share of zeros {trends['zero_share'].verdict} "
                f"({trends['zero_share'].first:.1%} to {trends['zero_share'].last:.1%})."
            )
    if (fresh := result.encoders.get("untrained")) is not None:
        alike = [
            words
            for name, words in (("rate_after", "R^c"), ("zero_share", "the share of zeros"))
            if own.trends[name].verdict == fresh.trends[name].verdict != "has no clear trend"
        ]
        if alike:
            said.append(
                f"The trend of {' and '.join(alike)} has the same direction without training. So it is an effect of "
                "the architecture, and no evidence of learning by itself."
            )
    return said + _on_undoing(result)


def on_learning(result: Learning) -> list[str]:
    """Whether tokens collapse, branches fade, codes stay unused, and masked tokens look at visible ones."""
    said = []
    for name, model in result.models.items():
        cosine, rank = model.encoder["token_cosine"], model.encoder["token_rank"]
        said.append(
            f"{_capital(model.title)}: the cosine between two tokens goes from {cosine[0]:.2f} after the first encoder "
            f"layer to {cosine[-1]:.2f} after the last, their effective rank from {rank[0]:.1f} to {rank[-1]:.1f}."
        )
        if name == "trained" and cosine[-1] > _COLLAPSED:
            said.append(
                "So its last tokens are nearly the same, and little of an image is left in them. Small initial weights "
                "(model.initialization small) and residuals (model.residual all) keep tokens apart."
            )
    own = result.models["trained"].encoder
    unused = own["unused_codes"]
    said.append(f"In the trained encoder, {min(unused):.0%} to {max(unused):.0%} of a layer's codes are never used.")
    if visible := own.get("visible_attention"):
        said.append(
            f"Tokens of removed patches give {min(visible):.2f} to {max(visible):.2f} of their attention to visible "
            f"patches; uniform attention would give {result.visible_share:.2f}."
        )
    return said


def on_segmentation(result: Segmentation) -> list[str]:
    """The best maps compared with the controls and the untrained encoder."""
    own = result.encoders["trained"].scores
    head, component = own["best_head"], own["best_component"]
    best = max((head, component), key=lambda score: score.chosen_on or 0)
    said = [
        f"{_capital(head.title)}: Jaccard index {_plain(head.jaccard)}.",
        f"{_capital(own['mean_head'].title)}: {_plain(own['mean_head'].jaccard)}.",
        f"{_capital(component.title)}: {_plain(component.jaccard)}.",
    ]
    for name in ("everything", "centre", "random", "colours"):
        control = result.controls[name]
        said.append(f"{_capital(control.title)}: {_plain(control.jaccard)}; {_versus(best.jaccard, control.jaccard)}.")
    for name, other in result.encoders.items():
        if name != "trained":
            theirs = max(
                (other.scores["best_head"], other.scores["best_component"]), key=lambda score: score.chosen_on or 0
            )
            said.append(
                f"The {other.title}'s best ({theirs.title}): {_plain(theirs.jaccard)}; "
                f"{_versus(best.jaccard, theirs.jaccard)}."
            )
    said.append(f"No choice of whole patches could exceed {result.controls['grid'].jaccard.value:.3f}.")
    return said


def _on_undoing(result: Structure) -> list[str]:
    """How closely the trained model's decoder inverts its encoder, and for which models this is undefined."""
    said = []
    if (undoing := result.encoders["trained"].undoing) is not None:
        average, other_image = (
            sum(error.value for error in undoing[name]) / len(undoing[name]) for name in ("scaled", "other_image")
        )
        said.append(
            f"Decoder layers reproduce the tokens that they should restore with a relative error of {average:.2f} on "
            f"average (at the best scale; 0 would be exact). Compared with another image's tokens, it is "
            f"{other_image:.2f}."
        )
    if without := [encoder.title for encoder in result.encoders.values() if encoder.undoing is None]:
        said.append(
            f"For the {' and the '.join(without)}, the inversion of encoder layers is not measured: the decoder "
            "differs from the encoder in depth or width, so its layers do not correspond to the encoder's."
        )
    return said


def _claim(encoder: EncoderStructure, first: str, second: str, direction: Literal["falls", "rises"]) -> str:
    """Whether two measures of the same property move in a direction, at every step or overall."""
    trends = encoder.trends[first], encoder.trends[second]
    holds = [trend.verdict == direction for trend in trends]
    if not any(holds):
        return {"falls": "does not fall", "rises": "does not rise"}[direction]
    if not all(holds):
        return f"{direction} by one of its two measures only"
    every = all((trend.falls if direction == "falls" else trend.rises) == trend.steps for trend in trends)
    return f"{direction} at every step" if every else f"{direction} overall, but not at every step"


def _trend_sentence(what: str, encoder: EncoderStructure, name: str, percent: bool = False) -> str:
    trend = encoder.trends[name]
    numbers = f"{trend.first:.1%} to {trend.last:.1%}" if percent else f"{trend.first:.3g} to {trend.last:.3g}"
    return (
        f"{what} {trend.verdict}: {numbers} from the first layer to the last, falling in {trend.falls} and rising in "
        f"{trend.rises} of {trend.steps} steps ({_spearman(trend)})."
    )


def _spearman(trend: Trend) -> str:
    if trend.spearman is None:
        return f"slope {trend.slope.value:.3g} a layer [{trend.slope.low:.3g}, {trend.slope.high:.3g}]"
    rho = trend.spearman
    return (
        f"Spearman {rho.value:+.2f} [{rho.low:+.2f}, {rho.high:+.2f}], slope {trend.slope.value:.3g} a layer "
        f"[{trend.slope.low:.3g}, {trend.slope.high:.3g}]"
    )


def _percent(estimate: Estimate) -> str:
    return f"{estimate.value:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"


def _plain(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _apart(one: Estimate, other: Estimate) -> bool:
    return one.low > other.high or one.high < other.low


def _points(one: Estimate, other: Estimate) -> str:
    """Difference in percentage points, and whether the intervals overlap."""
    gain = 100 * (one.value - other.value)
    words = f"{abs(gain):.1f} points {'better' if gain >= 0 else 'worse'}"
    return words if _apart(one, other) else f"{words} (within the intervals)"


def _versus(one: Estimate, other: Estimate) -> str:
    gain = one.value - other.value
    words = f"the trained model's best is {abs(gain):.3f} {'above' if gain >= 0 else 'below'} it"
    return words if _apart(one, other) else f"{words} (within the intervals)"


def _with_accuracy(scores: FeatureScores) -> str:
    return f"{scores.source}, with {_percent(scores.linear.interval)}"


def _the(title: str) -> str:
    return title if title.startswith("raw") else f"the {title}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
