"""Freed memory is kept, or given back: by the pages that the system has to supply again. In processes of their own."""

import os
import platform
import subprocess
import sys

import pytest

from timm_ep.base import malloc

# Four blocks of 8 MB, freed and taken again; prints how many pages that took. The module by itself: to import torch,
# whose maps come from the same malloc, takes a hundred times as long as all of this.
SCRIPT = """
import resource, runpy, sys

keep_freed_memory = runpy.run_path(sys.argv[1])["keep_freed_memory"]
for call in sys.argv[2:]:
    keep_freed_memory(not call.startswith("give back"), override=call.endswith("!"))
def take():
    return [b"x" * (size * 2**20) for size in (8, 8, 8, 8)]
for _ in range(3):
    take()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
take()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages(*calls: str, **environment: str) -> int:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", SCRIPT, malloc.__file__, *calls]
    return int(subprocess.check_output(command, text=True, env={**inherited, **environment}))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_what_is_kept_needs_no_new_pages():
    returned = pages("give back")
    assert pages("keep") < returned / 4
    assert pages("give back", "keep") < returned / 4
    assert pages("keep", "give back") > returned / 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_settings_of_the_environment_stand():
    returning = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    kept = pages("keep")
    assert pages("keep", **returning) > 4 * kept
    assert pages("keep!", **returning) < pages("keep", **returning) / 4
    assert pages("give back!", "keep!", **returning) < pages("keep", **returning) / 4
