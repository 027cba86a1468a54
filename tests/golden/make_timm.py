"""Writes timm.npz: what timm's networks compute from seeded weights and images.

    python3 -m venv /tmp/timm && /tmp/timm/bin/pip install torch timm torchvision
    /tmp/timm/bin/python tests/golden/make_timm.py

The weights are seeded by timm's names, so that nothing of ours is needed here and nothing of torch in
the tests. Batch statistics are calibrated on the images of each size, layer by layer, then moved a
little: with arbitrary statistics the signal dies on its way, and any network passes. torchvision's
Inception V3 is compared with timm's here, so that the stored outputs stand for both.
"""

from pathlib import Path

import numpy as np
import timm
import torch
import torchvision
from seeded import disturbed, draw, sample, structured_images

NAMES = ("legacy_xception", "xception41", "xception65", "xception71", "xception41p", "xception65p", "inception_v3")
SIZES = ((299, 299), (150, 214))
IMAGES = 4


def fill(model: torch.nn.Module) -> None:
    norms = {name for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        kind = "bias" if leaf == "bias" else "scale" if module in norms else "kernel"
        fan_in = int(np.prod(parameter.shape[1:]))
        parameter.data = torch.from_numpy(draw(name, kind, parameter.shape, fan_in))


def calibrate(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Gives each normalization the statistics of what enters it, with the variance of the whole population."""

    def take_statistics(module: torch.nn.BatchNorm2d, inputs: tuple[torch.Tensor]) -> None:
        module.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        module.running_var.copy_(inputs[0].var((0, 2, 3), unbiased=False))

    norms = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    hooks = [norm.register_forward_pre_hook(take_statistics) for norm in norms.values()]
    model(images)
    for hook in hooks:
        hook.remove()
    for name, norm in norms.items():
        for kind, statistic in (("mean", norm.running_mean), ("var", norm.running_var)):
            statistic.copy_(torch.from_numpy(disturbed(f"{name}.running_{kind}", kind, statistic.numpy())))


def main() -> None:
    golden = {"versions": np.array([f"timm {timm.__version__}", f"torch {torch.__version__}"])}
    for name in NAMES:
        model = timm.create_model(name).eval()
        fill(model)
        golden[f"{name}/parameters"] = np.array(sum(p.numel() for p in model.parameters()))
        for height, width in SIZES:
            images = torch.from_numpy(structured_images(IMAGES, height, width)).permute(0, 3, 1, 2)
            auxiliary = name == "inception_v3" and min(height, width) >= 299
            if auxiliary:
                model = timm.create_model(name, aux_logits=True).eval()
                fill(model)
            calibrate(model, images)
            key = f"{name}/{height}x{width}"
            if auxiliary:
                logits, auxiliary_logits = model(images)
                golden[f"{key}/auxiliary_logits"] = auxiliary_logits.numpy()
                other = torchvision.models.inception_v3(init_weights=False).eval()
                other.load_state_dict(model.state_dict())
                difference = (other(images) - logits).abs().max() / np.ptp(logits.numpy(), axis=0).max()
                assert difference < 1e-5, difference
                model.aux_logits = False
            golden[f"{key}/logits"] = model(images).numpy()
            for i, stage in enumerate(model.forward_intermediates(images, intermediates_only=True), start=1):
                golden[f"{key}/stage{i}"] = sample(stage.permute(0, 2, 3, 1).numpy())
                golden[f"{key}/stage{i}/shape"] = np.array(stage.permute(0, 2, 3, 1).shape)
            spread = np.ptp(golden[f"{key}/logits"], axis=0).max() / np.abs(golden[f"{key}/logits"]).max()
            print(f"{key}: spread over images {spread:.2f} of the largest logit")
    np.savez_compressed(Path(__file__).with_name("timm.npz"), **golden)


if __name__ == "__main__":
    with torch.no_grad():
        main()
