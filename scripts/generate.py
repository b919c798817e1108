"""Generate text from a trained language model.

    python scripts/generate.py --run runs/word_ptb/small --prompt "the company said"
    python scripts/generate.py --task char_ptb --preset small --load_weight weights.pkl --temperature 0.7 --samples 3

The text goes to standard output, with a line feed for each `<eos>`, the speed to standard error. The model reads the
prompt from a zero state, as the first words (or characters) of a text. A line feed in the prompt is `<eos>`, unless the
model reads bytes, and an empty prompt is a single line feed. All words must be in the vocabulary, which lies beside the
weights; the data are read only if it does not. The same seed gives the same text on the same machine.
"""

import functools
import signal
import sys
import textwrap
import time
from collections.abc import Sequence

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main takes signals: no traceback from an import

from scripts import trained
from scripts.common import check_bounds
from trellisnet.errors import UserError, shown
from trellisnet.evaluation.generate import Sampling
from trellisnet.models import count_parameters
from trellisnet.training.cli import guarded
from trellisnet.training.config import Parser


def wrapped(text: str, width: int) -> str:
    """Wrap text to lines of at most `width` characters; 0: leave it as it is."""
    lines = text.split("\n")
    if width:
        lines = [textwrap.fill(line.strip(), width, break_long_words=False, break_on_hyphens=False) for line in lines]
    return "\n".join(lines)


def run(argv: Sequence[str]) -> None:
    """Parse, load, generate, print."""
    parser = Parser(description=__doc__.splitlines()[0])
    trained.add_flags(parser)
    parser.add_argument("--prompt", default="", help="beginning of the text (default: the end of a line)")
    parser.add_argument("--length", type=int, default=200, help="tokens to generate (default: 200)")
    parser.add_argument("--samples", type=int, default=1, help="number of texts, generated in parallel (default: 1)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the most probable token (default: 1)")
    parser.add_argument("--top_k", type=int, default=0, help="draw from the K most probable tokens; 0: from all")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from the smallest set with total probability P")
    parser.add_argument("--seed", type=int, default=1111, help="seed of the draws (default: 1111)")
    parser.add_argument("--width", type=int, default=100, help="length of printed lines; 0: no wrapping (default: 100)")
    args, flags = parser.parse_known_args(argv)
    check_bounds(args, length=1, samples=1, width=0, seed=0)
    try:
        sampling = Sampling(args.temperature, args.top_k, args.top_p)
    except ValueError as e:
        raise UserError(f"--{e}") from e
    model = trained.load(args, flags)
    vocabulary = model.vocabulary
    try:
        prompt = vocabulary.encode_prompt(args.prompt)
        start = prompt or vocabulary.line_end()
    except UserError as e:
        raise UserError(f"--{e}") from e
    if not prompt:
        print(f"empty prompt: starting from {vocabulary.tokens[start[0]]}, the end of a line", file=sys.stderr)
    begin = time.perf_counter()
    texts = model.continuations(prompt, args.length, sampling, samples=args.samples, seed=args.seed)
    seconds = time.perf_counter() - begin
    for i, text in enumerate(texts, 1):
        if args.samples > 1:
            print(f"--- {i} ---")
        if sys.stdout.isatty():  # a word of the vocabulary may be an escape code
            text = "\n".join(map(shown, text.split("\n")))
        print(wrapped(text, args.width))
    count, parameters, noun = args.length * args.samples, count_parameters(model.model), vocabulary.spelling.noun
    print(
        f"{count:,} {noun} in {seconds:.1f} s, {count / seconds:,.0f} {noun}/s, "
        f"prompt of {len(start):,} included; {model.config.model}, {parameters:,} parameters, {model.device}",
        file=sys.stderr,
    )


main = functools.partial(guarded, run)

if __name__ == "__main__":
    sys.exit(main())
