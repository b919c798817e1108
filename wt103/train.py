"""Train or score a TrellisNet on WikiText-103: `python wt103/train.py --help`."""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends without a traceback

from trellisnet.training.language_model import LanguageModelProgram
from wt103 import data
from wt103.model import Config

program = LanguageModelProgram(Config, data.load)
main = program.main
setup = program.setup

if __name__ == "__main__":
    sys.exit(main())
