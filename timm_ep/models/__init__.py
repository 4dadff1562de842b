"""Model families. Importing this package registers them with timm."""

from timm_ep.models import ep_vgg as ep_vgg
from timm_ep.models.crnn import EpVgg

__all__ = ["EpVgg"]
