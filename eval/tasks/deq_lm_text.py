"""The task deq_lm_text: one text file as the one document that its tokens are a stream of, with our counts of it."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from deq_lm.data.text_files import documents, read_lines
from deq_lm.data.tokenizers import load_tokenizer, word_level
from deq_lm.errors import ConfigError


def load(text: str | None = None, pretrained: str | None = None, **_: Any) -> dict[str, Dataset]:
    """The splits; `text` is given by --metadata, `pretrained` by --model_args.

    Each document of the file is followed by the tokenizer's end-of-sequence token, spelled out; a word-level tokenizer
    makes one of each line's end.

    Raises:
        ConfigError: no text was given.
        DataError: it, or the model's tokenizer, cannot be read.
    """
    if text is None or pretrained is None:
        raise ConfigError(
            'the task deq_lm_text needs a text and a model: give --metadata \'{"text": "FILE"}\' and --model_args '
            "pretrained=FOLDER."
        )
    tokenizer = load_tokenizer(pretrained)
    whole, tokenized = "", ""
    for document in documents(read_lines(Path(text))):
        whole += document
        if not word_level.ends_lines(tokenizer):
            tokenized += document + str(tokenizer.eos_token)
        else:
            tokenized += document if document.endswith("\n") else document + "\n"
    return {"test": Dataset.from_list([{"text": whole, "tokenized": tokenized}])}


def process_results(doc: dict[str, str], results: tuple[float]) -> dict[str, tuple[float, int]]:
    """The log-likelihood, and what each metric divides it by."""
    (log_likelihood,) = results
    num_words = sum(len(words) for words in word_level.words_by_line(doc["text"]))
    num_bytes = len(doc["text"].encode())
    return {
        "word_perplexity": (log_likelihood, num_words),
        "byte_perplexity": (log_likelihood, num_bytes),
        "bits_per_byte": (log_likelihood, num_bytes),
    }
