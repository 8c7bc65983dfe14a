"""Initialisation of weights (Sec 3.2)."""

from torch import nn


def init_as_paper(layer: nn.Linear) -> None:
    """Draws weights from N(0, 1 / sqrt(d)), with d the number of elements, and sets biases to zero (Sec 3.2).

    1 / sqrt(d) is read as a variance, as everywhere in the paper's notation N(.; mean, covariance).
    """
    nn.init.normal_(layer.weight, std=layer.weight.numel() ** -0.25)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
