"""Model families. Importing this package registers them with timm."""

from timm_ep.models.ep_vgg import EpVgg

__all__ = ["EpVgg"]
