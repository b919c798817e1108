"""A small corpus from a stochastic grammar, to try everything without any data.

A model can learn from it, in order of distance: articles and adjectives go with the noun's class; the verb agrees in
number with its subject across a relative clause or a prepositional phrase; a question ends with the word that its
opening asks for; and every paragraph keeps to one topic, named by its first word. The text is artificial, so scores on
it are not comparable with any others.
"""

import random

TRAIN_LINES, VALID_LINES, TEST_LINES = 6000, 600, 600
SEED = 2019

_TOPICS = {
    "harbour": ("boat sailor gull crane rope captain net anchor", "sail drift load mend"),
    "orchard": ("tree picker wasp ladder basket farmer pear twig", "ripen climb gather prune"),
    "workshop": ("clock joiner saw lathe drawer apprentice hinge plank", "turn carve sand glue"),
    "station": ("train porter pigeon signal ticket guard trunk lamp", "arrive wait whistle depart"),
    "kitchen": ("pot baker cat oven spoon waiter onion table", "boil stir taste serve"),
}
_ADJECTIVES = "old quiet broken heavy bright narrow patient sudden".split()
_PLACES = "behind near under beside above".split()
_ASKED = {"who": "someone", "where": "somewhere", "when": "someday"}


class _Grammar:
    """Source of sentences, drawn with `Random.random` alone, whose sequence for a seed Python promises to keep."""

    def __init__(self, seed: int):
        self._random = random.Random(seed).random

    def _pick(self, choices):
        # The square makes the first choices frequent and the last ones rare, as in natural text.
        return choices[int(len(choices) * self._random() ** 2)]

    def _noun_phrase(self, nouns: list[str], plural: bool, depth: int) -> list[str]:
        words = ["these" if plural else "this"] if self._random() < 0.3 else ["the"]
        if self._random() < 0.4:
            words.append(self._pick(_ADJECTIVES))
        words.append(self._pick(nouns) + ("s" if plural else ""))
        draw = self._random()
        if depth and draw < 0.25:
            words += [self._pick(_PLACES), *self._noun_phrase(nouns, self._random() < 0.5, depth - 1)]
        return words

    def _clause(self, nouns: list[str], verbs: list[str], depth: int) -> list[str]:
        plural = self._random() < 0.5
        subject = self._noun_phrase(nouns, plural, depth)
        if depth and self._random() < 0.35:
            subject += ["that", *self._clause(nouns, verbs, depth - 1), ","]
        return [*subject, self._pick(verbs) + ("" if plural else "s")]  # agrees across the clause in between

    def line(self, topic: str) -> str:
        nouns, verbs = (words.split() for words in _TOPICS[topic])
        words = self._clause(nouns, verbs, depth=2)
        if self._random() < 0.4:
            words += [self._pick(_PLACES), *self._noun_phrase(nouns, self._random() < 0.5, depth=1)]
        if self._random() < 0.2:
            asked = self._pick(list(_ASKED))
            words = [asked, "asks", "whether", *words, "or", _ASKED[asked]]
        return " ".join(words)

    def text(self, lines: int) -> str:
        out = []
        while len(out) < lines:
            topic = list(_TOPICS)[int(len(_TOPICS) * self._random())]
            out.append(f"{topic} :")
            out += [self.line(topic) for _ in range(3 + int(6 * self._random()))]
        return "\n".join(out[:lines]) + "\n"


def texts(seed: int = SEED) -> list[str]:
    """Return train, valid and test text, determined by the seed on every machine."""
    grammar = _Grammar(seed)
    return [grammar.text(lines) for lines in (TRAIN_LINES, VALID_LINES, TEST_LINES)]
