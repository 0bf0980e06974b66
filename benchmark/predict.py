"""How to split D devices between generator and learner, and what asynchrony will gain, from a few measured times.

    python -m benchmark.predict --generation 1 1.04 2 0.76 --learning 1 1.01 2 0.51 --weights 0.02 --most 16
    python -m benchmark.predict paper

Times are seconds per batch on so many devices: G to generate it, L to label and learn it, W to load new weights.
time(d) = fixed + work / d, fitted to the given points (fixed = 0 with one point): decoding has a floor, because a
token takes as long on many devices as on one, and learning has one, because gradients must be exchanged.
    asynchronous, g generate     max(G(g) + W, L(D - g))
    split, g generate            G(g) + W + L(D - g)         the same devices, one side idle
    colocate                     G(D) + W + L(D)             every device generates, then every device learns
Without floors the best asynchronous step is (work of G + work of L) / D, no faster than colocate: asynchrony pays where
a side scales badly, and where moving between the two tasks costs time or memory.
"""

import sys
from dataclasses import dataclass, field

import numpy as np
import tyro


@dataclass
class Args:
    generation: dict[int, float] = field(default_factory=lambda: {1: 1.04, 2: 0.76})
    """G: devices and seconds, in turn"""
    learning: dict[int, float] = field(default_factory=lambda: {1: 1.01, 2: 0.51})
    """L: devices and seconds, in turn"""
    weights: float = 0.02
    """W: seconds to load new weights"""
    most: int = 1024
    """largest number of devices; 2, 4, 8, ... up to it are shown"""


@dataclass
class Curve:
    """Seconds on d devices: fixed + work / d."""

    fixed: float
    work: float

    def __call__(self, devices: int) -> float:
        return self.fixed + self.work / devices


def fit(points: dict[int, float]) -> Curve:
    """Least squares, neither part negative. Raises ValueError without points, or where a number is not positive."""
    if not points or min(points) < 1 or not min(points.values()) > 0:
        raise ValueError(f"{points}: give devices (1 or more) and seconds (above 0) in turn")
    devices, seconds = np.array(list(points), float), np.array(list(points.values()), float)
    if len(points) == 1:
        return Curve(0.0, float(seconds[0] * devices[0]))
    matrix = np.stack([np.ones_like(devices), 1 / devices], 1)
    fixed, work = np.linalg.lstsq(matrix, seconds, rcond=None)[0]
    if fixed < 0:
        return Curve(0.0, float((seconds / devices).sum() / (1 / devices**2).sum()))
    if work < 0:
        return Curve(float(seconds.mean()), 0.0)
    return Curve(float(fixed), float(work))


def predict(generation: Curve, learning: Curve, weights: float, devices: int) -> dict[str, float]:
    """The best number of generating devices, and the steps in seconds; devices is 2 or more."""
    steps = {g: max(generation(g) + weights, learning(devices - g)) for g in range(1, devices)}
    best = min(steps, key=steps.get)
    split = generation(best) + weights + learning(devices - best)
    colocate = generation(devices) + weights + learning(devices)
    return {"generators": best, "asynchronous": steps[best], "split": split, "colocate": colocate}


def table(generation: Curve, learning: Curve, weights: float, most: int) -> list[str]:
    lines = ["devices  generate  learn  async s  split s  colocate s  split/async  colocate/async"]
    devices = 2
    while devices <= most:
        p = predict(generation, learning, weights, devices)
        a, g = p["asynchronous"], p["generators"]
        steps = f"{a:8.3f} {p['split']:8.3f} {p['colocate']:11.3f}"
        lines.append(f"{devices:7} {g:9} {devices - g:6} {steps} {p['split'] / a:12.2f} {p['colocate'] / a:15.2f}")
        devices *= 2
    return lines


def paper() -> list[str]:
    """What the paper's speed-ups s say: the shorter side takes at least s - 1 of the longer one (arXiv 2410.18252).

    The paper gives ratios, not G and L; which side is the longer one is not known: both are shown, without floors.
    """
    lines = []
    set_ups = ("TL;DR 2.8B", 4, 1, 1.25), ("No Robots 8B", 8, 1, 1.4), ("GSM8K 1B", 4, 1, 1.7)
    for name, devices, g, speedup in set_ups:
        lines.append(f"{name}: {speedup} times as fast on {devices} GPUs, {g} of them generating; times of its step:")
        for longer in ("learning", "generation"):
            times = {side: 1.0 if side == longer else speedup - 1 for side in ("learning", "generation")}
            curves = fit({g: times["generation"]}), fit({devices - g: times["learning"]})
            p = predict(*curves, 0.0, devices)
            lines.append(
                f"  bound by {longer}: best split {p['generators']} + {devices - p['generators']}, a step of "
                f"{p['asynchronous']:.2f} of the paper's, colocate {p['colocate']:.2f}"
            )
    return lines


if __name__ == "__main__":
    if sys.argv[1:] == ["paper"]:
        print("\n".join(paper()))
    else:
        args = tyro.cli(Args)
        try:
            curves = fit(args.generation), fit(args.learning)
        except ValueError as error:
            raise SystemExit(f"predict: {error}") from None
        for name, curve in zip("GL", curves):
            print(f"{name}(d) = {curve.fixed:.3f} + {curve.work:.3f} / d seconds")
        print("\n".join(table(*curves, args.weights, args.most)))
