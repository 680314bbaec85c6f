"""SentencePiece's unigram pieces, trained by `sentencepiece` and run by `tokenizers`.

Decoding gives back the text exactly, newlines and repeated spaces included: characters without a piece become bytes. The
one exception is U+2581, SentencePiece's own mark for a space, which comes back as a space.

References:
    Kudo 2018 (unigram pieces); Kudo and Richardson 2018 (SentencePiece).
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deq_lm.errors import DataError

if TYPE_CHECKING:
    import sentencepiece

EOS = "<|endoftext|>"
UNKNOWN = "<|unknown|>"  # has an id because the model wants one; no text is encoded to it
_SPACE = "\u2581"
_MAX_LINE_BYTES = 1 << 24


def train(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with `vocab_size` pieces trained on the lines of `documents`, which are read once.

    Args:
        documents: the training split; lines above 16 MiB are not trained on.
        vocab_size: entries, with 256 bytes, the newline and the end-of-text token.

    Raises:
        DataError: SentencePiece cannot make that many, or that few, pieces of this text; carries its reason;
            or it is not installed.
    """
    try:
        import sentencepiece
    except ImportError as error:
        raise DataError(
            "tokenizer sentencepiece: its package is not installed: pip install sentencepiece. Or choose bpe."
        ) from error
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in documents for line in text.split("\n") if line.strip()),
            model_writer=written,
            model_type="unigram",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            user_defined_symbols=["\n"],
            unk_piece=UNKNOWN,
            eos_piece=EOS,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=_MAX_LINE_BYTES,
            num_threads=1,  # more would make the pieces depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rsplit("] ", 1)[-1].strip()
        raise DataError(f"vocab_size={vocab_size}: sentencepiece cannot train: {reason} Change vocab_size.") from error
    return _tokenizer(sentencepiece.SentencePieceProcessor(model_proto=written.getvalue()))


def _tokenizer(trained: sentencepiece.SentencePieceProcessor) -> PreTrainedTokenizerFast:
    """The same pieces and scores in `tokenizers`, which decodes bytes and spaces exactly and encodes in parallel."""
    pieces = [(trained.id_to_piece(i), trained.get_score(i)) for i in range(trained.get_piece_size())]
    backend = Tokenizer(models.Unigram(pieces, unk_id=trained.unk_id(), byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            # Text that is spelled like a byte or a special token must stay text, so it is never seen whole.
            pre_tokenizers.Split(Regex(r"<(?=0x[0-9A-F]{2}>|\|(?:unknown|endoftext)\|>)"), "isolated"),
            pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="never"),
        ]
    )
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=EOS, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )
