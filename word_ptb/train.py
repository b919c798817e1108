"""Train or score a TrellisNet on word-level Penn Treebank: `python word_ptb/train.py --help`."""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends without a traceback

from trellisnet.training.language_model import LanguageModelProgram
from word_ptb import data
from word_ptb.model import Config

program = LanguageModelProgram(Config, data.load)
main = program.main
setup = program.setup

if __name__ == "__main__":
    sys.exit(main())
