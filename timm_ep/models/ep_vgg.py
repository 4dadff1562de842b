"""VGGs as convergent recurrent nets, trained by Equilibrium Propagation: architectures, configurations, entrypoints.

Architectures after Simonyan & Zisserman, *Very Deep Convolutional Networks* (arXiv:1409.1556); as EP nets after
Laborieux et al., *Scaling Equilibrium Propagation to Deep ConvNets* (2021) and Lin, Bal & Sengupta, *Scalable
Equilibrium Propagation via Intermediate Error Signals for Deep Convolutional CRNNs* (arXiv:2508.15989).

The functions that timm registers differ by a row of the table alone, so they are made from it.
"""

from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files
from typing import Any, NamedTuple, Protocol

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet

from timm_ep.models.architecture import feature_layers, read_architecture
from timm_ep.models.crnn import EpVgg
from timm_ep.models.weights import checkpoint_filter_fn


class _Net(NamedTuple):
    """A row of the table.

    Attributes:
        description: of its entrypoint.
        feedback: λ, weaker where more layers multiply the loop gain: see "What λ does" in `scripts/README.md`.
        channels: out of each convolution; "M" pools the state of the convolution before it.
    """

    description: str
    feedback: float
    channels: tuple[int | str, ...]


_NETS = {
    "vgg5": _Net(
        "4 convolutions, 128 to 512 channels: the net of the EP literature",
        0.02,
        (128, "M", 256, "M", 512, "M", 512, "M"),
    ),
    "vgg7": _Net(
        "6 convolutions, 64 to 256 channels, wide at low resolution: learns small images fastest",
        0.02,
        (64, "M", 64, 256, "M", 256, 256, "M", 256, "M"),
    ),
    "vgg8": _Net(
        "7 convolutions, 32 to 512 channels, two at each resolution: for small images",
        0.02,
        (32, 64, "M", 128, 128, "M", 256, 256, "M", 512, "M"),
    ),
    "vgg9": _Net(
        "8 convolutions, 64 to 512 channels", 0.02, (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M")
    ),
    "vgg11": _Net(
        "VGG-A: 8 convolutions, 64 to 512 channels",
        0.01,
        (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    ),
    "vgg13": _Net(
        "VGG-B: 10 convolutions, 64 to 512 channels",
        0.01,
        (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    ),
    "vgg16": _Net(
        "VGG-D: 13 convolutions, 64 to 512 channels",
        0.01,
        (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"),
    ),
    "vgg19": _Net(
        "VGG-E: 16 convolutions, 64 to 512 channels",
        0.01,
        (64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M", 512, 512, 512, 512, "M", 512, 512, 512, 512, "M"),
    ),
}


def _cfg(size: int, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (7, 7) if size == 224 else (2, 2),
        "crop_pct": 0.875 if size == 224 else 1.0,
        "interpolation": "bicubic" if size == 224 else "bilinear",
        "crop_mode": "center",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "layers.0",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2508.15989",
        "origin_url": "https://arxiv.org/abs/2508.15989",
        **kwargs,
    }


_GREY: dict[str, Any] = {"input_size": (1, 32, 32), "mean": (0.449,), "std": (0.226,)}
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100 = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
    man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
    pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
    tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """.split()  # noqa: SIM905  a hundred lines otherwise
)
_FASHION_MNIST = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


@dataclass(frozen=True)
class _Release:
    """Weights that ship with the package; larger ones are named by `hf_hub_id` in `default_cfgs`."""

    labels: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)  # of the net, where they are not the defaults
    cfg: dict[str, Any] = field(default_factory=dict)


_AT_32 = {"pool_size": (1, 1)}  # five poolings
_RELEASES = {
    "ep_vgg5_025.ep_digits": _Release(tuple("0123456789"), cfg=_GREY),
    "ep_vgg8.ep_cifar100": _Release(_CIFAR100, {"free_sweeps": 2}),
    "ep_vgg8.ep_plain_cifar100": _Release(_CIFAR100, {"free_sweeps": 2}),
    "ep_vgg8.ep_cifar100_ft_cifar10": _Release(_CIFAR10, {"free_sweeps": 2}),
    "ep_vgg8.ep_distilled_cifar10": _Release(_CIFAR10, {"free_sweeps": 2}),
    "ep_vgg9_025.ep_fashion_mnist": _Release(_FASHION_MNIST, {"free_sweeps": 4}, _GREY),
    "ep_vgg9_050.ep_cifar10": _Release(_CIFAR10, {"free_sweeps": 4}),
    "ep_vgg16_025.ep_cifar10": _Release(_CIFAR10, {"free_sweeps": 4}, _AT_32),
    "ep_vgg16_025.ep_strong_cifar10": _Release(_CIFAR10, {"preset": "strong", "tol": 0.02}, _AT_32),
    "ep_vgg16_050.ep_cifar10": _Release(_CIFAR10, {"free_sweeps": 4}, _AT_32),
}


def _release_cfg(name: str, release: _Release) -> dict[str, Any]:
    path = str(files("timm_ep") / "weights" / f"{name}.safetensors")
    return _cfg(32, file=path, num_classes=len(release.labels), label_names=release.labels, **release.cfg)


# A star marks the default of an architecture: its number of classes and channels do not follow from what was released.
default_cfgs = generate_default_cfgs(
    {
        **{name: _release_cfg(name, release) for name, release in _RELEASES.items()},
        "ep_vgg5.untrained*": _cfg(32),
        "ep_vgg5_025.untrained*": _cfg(32),
        "ep_vgg5_050.untrained*": _cfg(32),
        "ep_vgg7.untrained*": _cfg(32),
        "ep_vgg8.untrained*": _cfg(32),
        "ep_vgg9.untrained*": _cfg(32),
        "ep_vgg9_025.untrained*": _cfg(32),
        "ep_vgg9_050.untrained*": _cfg(32),
        "ep_vgg11.untrained*": _cfg(224),
        "ep_vgg11_025.untrained*": _cfg(224),
        "ep_vgg11_050.untrained*": _cfg(224),
        "ep_vgg13.untrained*": _cfg(224),
        "ep_vgg16.untrained*": _cfg(224),
        "ep_vgg16_025.untrained*": _cfg(224),
        "ep_vgg16_050.untrained*": _cfg(224),
        "ep_vgg19.untrained*": _cfg(224),
    }
)


class Entrypoint(Protocol):
    """A registered model: `timm.create_model(NAME, pretrained, **kwargs)`, with the arguments of `EpVgg`."""

    def __call__(self, pretrained: bool = False, **kwargs: Any) -> EpVgg: ...


def _check_weights(variant: str, kwargs: dict[str, Any]) -> None:
    """timm's error for a name without weights says that there are none; this one, what there is instead."""
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if cfg.has_weights or cfg.state_dict:
        return
    released = timm.list_pretrained("ep_*")
    own = [name for name in released if name.partition(".")[0] == variant]
    raise RuntimeError(
        f"No pretrained weights exist for {variant} by its plain name. "
        + (f"It was trained as {', '.join(own)}. " if own else f"There are {', '.join(released)}. ")
        + f"Train it with `timm-ep train --model {variant} …`, from one of timm's feedforward VGGs if you like "
        "(`timm-ep convert`), or use `pretrained=False` for random init."
    )


def _entrypoint(base: str, percent: int = 100) -> Entrypoint:
    """Register the net `base`, or one with so many percent of its channels."""
    net = _NETS[base]
    variant = f"ep_{base}" if percent == 100 else f"ep_{base}_{percent:03d}"
    scaled = tuple(item if isinstance(item, str) else item * percent // 100 for item in net.channels)

    def create(pretrained: bool = False, **kwargs: Any) -> EpVgg:
        if pretrained:
            _check_weights(variant, kwargs)
        if (feature_cls := kwargs.get("feature_cls", "getter")) not in ("getter", FeatureGetterNet):
            raise ValueError(
                f"feature_cls={feature_cls!r} would take features from modules, and those of an ep_vgg* give kernels; "
                "leave it out: features_only=True gives the states."
            )
        # timm's scripts give the whole configuration where its factory gives the tag.
        tag = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg")).tag
        released = _RELEASES.get(f"{variant}.{tag}")
        kwargs = {"architecture": scaled, **(released.settings if released else {}), **kwargs}
        if kwargs.get("preset", "fast") == "fast":
            kwargs.setdefault("feedback", net.feedback)
        features = feature_layers(read_architecture(kwargs["architecture"], kwargs.get("in_chans", 3)))
        return build_model_with_cfg(
            EpVgg,
            variant,
            pretrained,
            pretrained_filter_fn=partial(checkpoint_filter_fn, strict=kwargs.get("pretrained_strict", True)),
            feature_cfg={"feature_cls": "getter", "out_indices": tuple(range(len(features)))},
            **kwargs,
        )

    create.__name__ = create.__qualname__ = variant
    create.__doc__ = f"{net.description}{'' if percent == 100 else f'; {percent} % of the channels'}."
    return register_model(create)


ep_vgg5: Entrypoint = _entrypoint("vgg5")
ep_vgg5_025: Entrypoint = _entrypoint("vgg5", 25)
ep_vgg5_050: Entrypoint = _entrypoint("vgg5", 50)
ep_vgg7: Entrypoint = _entrypoint("vgg7")
ep_vgg8: Entrypoint = _entrypoint("vgg8")
ep_vgg9: Entrypoint = _entrypoint("vgg9")
ep_vgg9_025: Entrypoint = _entrypoint("vgg9", 25)
ep_vgg9_050: Entrypoint = _entrypoint("vgg9", 50)
ep_vgg11: Entrypoint = _entrypoint("vgg11")
ep_vgg11_025: Entrypoint = _entrypoint("vgg11", 25)
ep_vgg11_050: Entrypoint = _entrypoint("vgg11", 50)
ep_vgg13: Entrypoint = _entrypoint("vgg13")
ep_vgg16: Entrypoint = _entrypoint("vgg16")
ep_vgg16_025: Entrypoint = _entrypoint("vgg16", 25)
ep_vgg16_050: Entrypoint = _entrypoint("vgg16", 50)
ep_vgg19: Entrypoint = _entrypoint("vgg19")
