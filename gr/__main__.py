"""`python -m gr`, which torchrun and TorchX can start as they start any module."""

import sys

from gr.cli import main

sys.exit(main())
