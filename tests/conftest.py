import pytest
import torch

import timm_ep  # noqa: F401  (registers the models)
from timm_ep import EpVgg

ARCHITECTURES = {
    4: (4, "M", 6, "M", 6, "M", 8, "M"),
    9: (4, 4, "M", 4, 4, "M", 6, 6, "M", 6, 6, 8),
    13: (4, 4, "M", 4, 4, "M", 6, 6, 6, "M", 6, 6, 6, "M", 8, 8, 8),
}


def make_net(depth: int = 4, gain: float = 1.0, seed: int = 0, **kwargs) -> EpVgg:
    """A narrow net of 4, 9 or 13 convolutions in float64; `gain` scales its kernels, so that λ = 1 can settle too."""
    torch.manual_seed(seed)
    kwargs = {"num_classes": 5, "dtype": torch.float64, **kwargs}
    model = EpVgg(ARCHITECTURES[depth], **kwargs)
    with torch.no_grad():
        for conv in model.layers:
            conv.gain.mul_(gain).mul_(torch.empty_like(conv.gain).uniform_(0.8, 1.2))
            conv.bias.uniform_(-0.1, 0.2)
    return model


def make_batch(size: int = 16, batch: int = 3, seed: int = 1, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (batch, 3, size, size) and labels of 5 classes."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)
    return images.to(dtype), torch.arange(batch) % 5


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
