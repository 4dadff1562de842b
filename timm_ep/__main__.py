"""`python -m timm_ep` is `timm-ep`."""

from timm_ep.cli import main

main()
