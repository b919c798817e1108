"""Train or score a TrellisNet on sequential or permuted MNIST: `python pmnist/train.py --help`."""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends without a traceback

from pmnist import data
from pmnist.model import Config
from trellisnet.training.classification import ClassificationProgram

program = ClassificationProgram(Config, data.load)
main = program.main
setup = program.setup

if __name__ == "__main__":
    sys.exit(main())
