"""Train or score a TrellisNet on sequential CIFAR-10: `python cifar10/train.py --help`."""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends without a traceback

from cifar10 import data
from cifar10.model import Config
from trellisnet.training.classification import ClassificationProgram

program = ClassificationProgram(Config, data.load)
main = program.main
setup = program.setup

if __name__ == "__main__":
    sys.exit(main())
