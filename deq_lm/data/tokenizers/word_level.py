"""Whole words, as Transformer-XL had them: words are what white space separates, and each line ends in `<eos>`.

References:
    Dai et al. 2019, Transformer-XL; its WikiText-103 vocabulary: `<eos>` first, then the words of the training split by
    falling count, ties in order of appearance (267,735 entries).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deq_lm.errors import ConfigError, DataError

EOS = "<eos>"
UNKNOWN = "<unk>"


def train(documents: Iterable[str], vocab_size: int | None) -> PreTrainedTokenizerFast:
    """A tokenizer with the words of `documents`, which are read once.

    Ids rise as counts fall, as an adaptive softmax wants them: 0 is `<eos>`. `<unk>` counts what is written so and every
    occurrence of a word that was left out; where the text has neither, it comes last.

    Args:
        documents: the training split.
        vocab_size: entries with `<eos>` and `<unk>`; the rarest words are left out. None keeps every word.

    Raises:
        ConfigError: `vocab_size` is below 3.
        DataError: the text has `<eos>` written in it.
    """
    if vocab_size is not None and vocab_size < 3:
        raise ConfigError(f"vocab_size={vocab_size}: expected at least 3: {EOS}, {UNKNOWN} and a word. Raise it.")
    counts: Counter[str] = Counter()
    for document in documents:
        refuse_written_eos(document)
        for words in words_by_line(document):
            counts.update(words)
    if vocab_size is not None:
        by_count = [word for word, _ in counts.most_common() if word != UNKNOWN]
        for word in by_count[vocab_size - 2 :]:
            counts[UNKNOWN] += counts.pop(word)
    counts.setdefault(UNKNOWN, 0)
    words = [EOS, *(word for word, _ in counts.most_common())]  # most_common keeps ties in order of appearance
    return _tokenizer({word: index for index, word in enumerate(words)})


def words_by_line(document: str) -> Iterator[list[str]]:
    """What `document.split()` gives, a line at a time: all words of a long document take ten times its memory."""
    return (line.split() for line in document.splitlines())  # all that ends a line there is white space


def ends_lines(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokenizer is one of these, which put the end-of-sequence token after each line by themselves."""
    return isinstance(tokenizer.backend_tokenizer.model, models.WordLevel) and tokenizer.eos_token == EOS


def refuse_written_eos(text: str) -> None:
    """Raises a DataError where `<eos>` is written in the text, which would end lines twice or in their middle."""
    if EOS in text:
        place = text.index(EOS)
        raise DataError(
            f"the text has {EOS} written in it (near {text[max(place - 30, 0) : place + 10]!r}); a word-level tokenizer "
            "puts it after every line by itself. Remove it from the text."
        )


def _tokenizer(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Sequence(
        [
            normalizers.Replace("\n", f" {EOS} "),
            # white space to Python's str.split, but not to Rust
            normalizers.Replace(Regex(r"[\x1c-\x1f]"), " "),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # Whitespace would break <unk> and @-@ apart
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )
