"""Run the command `keras-dst` with `python -m keras_dst`."""

import sys

from keras_dst_cli import main

sys.exit(main())
