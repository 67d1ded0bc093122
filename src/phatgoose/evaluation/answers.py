"""What counts as a generated answer, and as a right one: rules on text and token ids, no model.

The answer is the text generated up to an end token or the first newline (unless a target of the row holds a newline),
stripped. It is right if and only if it equals one of the row's targets, stripped; case counts. A generation that
reaches its limit of tokens without an end is wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from phatgoose.records import Prediction


@dataclass(frozen=True)
class Rule:
    """How one row's generation is judged."""

    tokenizer: PreTrainedTokenizerBase
    targets: frozenset[str]
    """Stripped."""
    ends: Collection[int]
    limit: int
    """Most tokens, the end token included."""

    def judge(self, tokens: Sequence[int], *, to_the_end: bool = False) -> Prediction | None:
        """The verdict on a generation that starts with `tokens`; None as long as it hangs on what follows.

        Gives up (`complete` is False) where no continuation can equal a target, unless `to_the_end`.
        """
        stop = next((place for place, token in enumerate(tokens) if token in self.ends), None)
        kept = list(tokens[:stop])
        text = str(self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        if self._newline_ends and "\n" in text:
            text, stop = text.partition("\n")[0], len(tokens)
        answer = text.strip()
        if stop is not None:
            return Prediction(answer in self.targets, answer)
        if len(tokens) >= self.limit or not (to_the_end or any(_may_become(text, t) for t in self.targets)):
            return Prediction(False, answer, complete=False)
        return None

    @property
    def _newline_ends(self) -> bool:
        return not any("\n" in target for target in self.targets)


def _may_become(text: str, target: str) -> bool:
    """Whether some continuation of `text`, stripped, can equal `target` (stripped)."""
    # A character's last bytes may still be missing; they decode to U+FFFD until they come.
    start = text.rstrip("\ufffd").lstrip()
    return target.startswith(start) or start.rstrip() == target
