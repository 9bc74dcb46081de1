"""Does a probability mean what it says? Confidence against accuracy, and the one number that brings them together (arXiv 1706.04599)."""

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import softmax


def reliability_bins(probabilities: np.ndarray, labels: np.ndarray, bins: int = 10) -> pd.DataFrame:
    """Confidence against accuracy in bins of equal width: columns `confidence`, `accuracy`, `rows` of the bins that hold any."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    frame = pd.DataFrame({"bin": index, "confidence": confidence, "accuracy": right.astype(float), "rows": 1})
    return frame.groupby("bin").agg({"confidence": "mean", "accuracy": "mean", "rows": "sum"}).reset_index(drop=True)


def expected_calibration_error(bins: pd.DataFrame) -> float:
    """Mean gap between confidence and accuracy of `reliability_bins`, weighted by rows (Guo et al. 2017, arXiv 1706.04599, eq. 3)."""
    return float(((bins["confidence"] - bins["accuracy"]).abs() * bins["rows"]).sum() / bins["rows"].sum())


def scale_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities (rows, 3) of logits divided by a temperature: the order of the labels stays."""
    return softmax(np.log(np.clip(probabilities, 1e-12, None)) / temperature, axis=1)


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The temperature in 0.05..20 that makes validation labels most likely (arXiv 1706.04599, section 4.2)."""

    def loss(log_temperature: float) -> float:
        scaled = scale_temperature(probabilities, np.exp(log_temperature))
        return -float(np.log(np.clip(scaled[np.arange(len(labels)), labels], 1e-12, None)).mean())

    return float(np.exp(minimize_scalar(loss, bounds=np.log([0.05, 20]), method="bounded").x))
