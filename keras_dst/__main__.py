"""`python -m keras_dst` is the command `keras-dst`."""

import sys

from keras_dst.cli import main

sys.exit(main())
