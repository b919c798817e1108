"""Train or score a TrellisNet on character-level Penn Treebank: `python char_ptb/train.py --help`."""

import functools
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main takes signals: no traceback from an import

from char_ptb import data
from char_ptb.model import Config
from trellisnet.training import cli, language_model

setup = functools.partial(language_model.setup, data.load)
main = functools.partial(cli.main, Config, setup)

if __name__ == "__main__":
    sys.exit(main())
