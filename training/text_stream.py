"""Text out of tokens that come one after another: each piece as soon as no later token can change it."""

from collections.abc import Sequence

from training.tokens import Tokenizer

_INCOMPLETE = "\ufffd"  # what stands for the first bytes of a character whose others are to come


class TextStream:
    """Turns tokens into pieces of text, which together are the text of all of them.

    Args:
        tokenizer: of the tokens.
        before: tokens of the text that is continued; tokenizers treat a text's first word in a way of its own.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        self._decode = tokenizer.decode
        self._given = list(before)
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        self._pending.append(token)
        piece = self._piece()
        return "" if piece.endswith(_INCOMPLETE) else self._give(piece)

    def end(self) -> str:
        """What is left, with a replacement character for each that was never completed."""
        return self._give(self._piece())

    def _piece(self) -> str:
        before = self._decode(self._given)
        return self._decode(self._given + self._pending)[len(before) :]

    def _give(self, piece: str) -> str:
        # The piece before is context enough, and keeps each turn short; an end token alone is none.
        if piece:
            self._given = self._pending
        self._pending = []
        return piece
