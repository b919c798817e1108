"""Train or score a TrellisNet on character-level Penn Treebank: `python char_ptb/train.py --help`."""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends without a traceback

from char_ptb import data
from char_ptb.model import Config
from trellisnet.training.language_model import LanguageModelProgram

program = LanguageModelProgram(Config, data.load)
main = program.main
setup = program.setup

if __name__ == "__main__":
    sys.exit(main())
