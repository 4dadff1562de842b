"""timm's own tests of models, from the source release of the timm that is installed, unmodified, on this package's.

`scripts/test` puts the release beside the environment when it can be had. TIMM_EP_SUITE chooses the models, `ep_*` for
all of them (ten minutes).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm

RELEASE = Path(sys.prefix) / f"timm-{timm.__version__}"
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_timms_own_tests_of_models_pass():
    if not (RELEASE / "tests" / "test_models.py").exists():
        pytest.skip(f"the source release of timm {timm.__version__} is not in {RELEASE}; scripts/test fetches it")
    paths = [Path(__file__).parent, ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        "TIMM_EP_SUITE": "ep_vgg*_025",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "only_ep_vgg", "tests/test_models.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=RELEASE, env=environment, check=False)
    print(done.stdout[-5000:], done.stderr[-2000:])
    assert done.returncode == 0
    passed = re.search(r"(\d+) passed", done.stdout.splitlines()[-1])
    assert passed is not None
    assert int(passed[1]) > len(timm.list_models("ep_vgg*", include_tags=True))
