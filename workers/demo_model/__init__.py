"""The small trained model that ships with Spillway: where its weights are. For whoever picks the default model."""

from pathlib import Path


def weights_path() -> Path:
    """The folder to give to `mlx_lm.load`."""
    return Path(__file__).resolve().parent / "weights"
