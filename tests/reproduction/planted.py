"""Results that nobody measured: rows with accuracies that a test chooses."""

from typing import Any

from xception_flax.reproduction.results import Results, Run

IMAGES = 1000  # of the test split


def row(results: Results, run: Run, accuracy: float, *, raw: float = 0.5, loss: float = 1.0) -> dict[str, Any]:
    """Returns the row of a run; `accuracy`, of 0 to 1, is that of the validation and of the averaged weights."""
    score = {"top1": accuracy, "loss": loss}
    test = {"ema": score, "raw": {"top1": raw, "loss": loss}, "images": IMAGES}
    return {
        **run._asdict(),
        "recipe": results.recipe_name(run.data_set, run.setting),
        "steps": 20,
        "validation": score,
        "test": None if run.is_search else test,
        "parameters": 1000,
        "multiply_adds": 2_000_000,
        "losses": [[5, 2.0], [20, 1.0 + run.seed / 10]],
        "accuracies": [[20, accuracy]],
        "seconds": 10.0,
        "step_seconds": 0.1,
        "versions": {"jax": "1"},
        "machine": {"cpu": "none", "cpus": 2, "date": "2026-01-01"},
    }
