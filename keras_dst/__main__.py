"""Entry point of `python -m keras_dst`, which runs the command `keras-dst`."""

import sys

from keras_dst_cli import main

sys.exit(main())
