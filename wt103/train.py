"""Train or score a TrellisNet on WikiText-103: `python wt103/train.py --help`."""

import functools
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main takes signals: no traceback from an import

from trellisnet.training import cli, language_model
from wt103 import data
from wt103.model import Config

setup = functools.partial(language_model.setup, data.load)
main = functools.partial(cli.main, Config, setup)

if __name__ == "__main__":
    sys.exit(main())
