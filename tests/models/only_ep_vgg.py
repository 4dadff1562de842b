"""A plugin of pytest for timm's own tests (`test_timm_suite.py`): they see this package's models, and no others.

Configurations are tested of all models and tags, as that takes no weights; the rest, where an `ep_vgg19` takes minutes,
of the models that match TIMM_EP_SUITE.
"""

import os

import pytest
import timm

import timm_ep  # noqa: F401  (registers the models)

_list_models = timm.list_models


def list_models(filter="", module="", *args, include_tags=None, **kwargs):
    """`timm.list_models` of those of the chosen models that it would list; `module` names files of timm itself."""
    chosen = "ep_vgg*" if include_tags else os.environ["TIMM_EP_SUITE"]
    names = _list_models(chosen, "", *args, include_tags=include_tags, **kwargs)
    return [name for name in names if not filter or name in _list_models(filter, include_tags=include_tags)]


def pytest_configure(config):
    timm.list_models = list_models


def pytest_collection_modifyitems(config, items):
    """Only tests of these models; and none of TorchScript, which they refuse with a message."""
    others = [item for item in items if "ep_vgg" not in item.name]
    items[:] = [item for item in items if "ep_vgg" in item.name]
    config.hook.pytest_deselected(items=others)
    for item in items:
        if "torchscript" in item.name:
            item.add_marker(pytest.mark.skip(reason="TorchScript is refused: see test_recorded.py"))
