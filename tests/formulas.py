"""Metrics as textbooks write them, over all samples at once: what torchmetrics over many batches must equal."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def accuracy(label: Array, found: Array) -> float:
    return float((label == found).mean())


def confusion(label: Array, found: Array, classes: int) -> Array:
    """Row: the true class. Column: the one that was found."""
    return np.array([[((label == i) & (found == j)).sum() for j in range(classes)] for i in range(classes)])


def f1(label: Array, found: Array) -> float:
    """Of true and false: 2 TP / (2 TP + FP + FN)."""
    hits, misses = (label & found).sum(), (label ^ found).sum()
    return float(2 * hits / (2 * hits + misses)) if hits + misses else 0.0


def jaccard(label: Array, found: Array) -> float:
    """Of true and false: the intersection over the union."""
    return float((label & found).sum() / (label | found).sum())


def roc_auc(label: Array, score: Array) -> float:
    """The share of pairs of a true and a false one of which the true one scores higher (Hanley and McNeil 1982)."""
    pairs = score[label == 1][:, None] - score[label == 0][None, :]
    return float(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def mse(label: Array, score: Array) -> float:
    return float(((label - score) ** 2).mean())


def mae(label: Array, score: Array) -> float:
    return float(np.abs(label - score).mean())


def r2(label: Array, score: Array) -> Array:
    """1 - residual / total sum of squares, of each column."""
    return 1 - ((label - score) ** 2).sum(0) / ((label - label.mean(0)) ** 2).sum(0)


def perplexity(label: Array, score: Array, ignored: int = -100) -> float:
    """exp of the mean of -log p(label), over labels that count; `score` has the classes last."""
    score = score.astype(np.float64)
    logs = score - np.log(np.exp(score).sum(-1, keepdims=True))
    chosen = np.take_along_axis(logs, np.maximum(label, 0)[..., None], -1)[..., 0]
    return float(np.exp(-chosen[label != ignored].mean()))
